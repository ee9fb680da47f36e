"""How good a scorer is: a bag of words beside it, and what makes `relllm evaluate` refuse it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from relllm.metrics import recognition_metrics

from ..evaluation_settings import LEVELS, MECHANISMS, METRICS
from .epitome import Pair

LEVEL_NAMES = [str(level) for level in range(LEVELS)]


def measure_bag_of_words(train: Sequence[Pair], test: Sequence[Pair]) -> dict:
    """Return accuracy, macro-F1 and recalls on `test` of a logistic regression on the words of the response, untuned.

    Pairs of one level alone are a `ValueError`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    levels = [pair.level for pair in train]
    if len(set(levels)) < 2:
        raise ValueError(f"All {len(train)} pairs to train on have the level {levels[:1]}: there is nothing to learn.")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"[^\W_]+|[?!]")
    model = make_pipeline(words, LogisticRegression(class_weight="balanced", max_iter=2000))
    model.fit([pair.response_post for pair in train], levels)
    guesses = model.predict([pair.response_post for pair in test])
    return level_scores([pair.level for pair in test], guesses.tolist())


def level_scores(levels: Sequence[int], guesses: Sequence[int]) -> dict:
    """Return `accuracy`, `macro_f1`, the `recall` of each level, `confusion_matrix` and `num_pairs`."""
    found = recognition_metrics(levels, guesses, LEVEL_NAMES)
    same = {name: found[name] for name in ("macro_f1", "recall", "confusion_matrix")}
    return {"accuracy": found["wa"], **same, "num_pairs": found["num_clips"]}


def read_quality(scorers: str | Path) -> dict[str, dict | None]:
    """Return what the scorers of a folder reached on their test split, by mechanism; `None` where it is not known."""
    found: dict[str, dict | None] = {}
    for folder in find_scorers(Path(scorers)):
        mechanism = json.loads((folder / "config.json").read_text(encoding="utf-8"))["mechanism"]
        path = folder / METRICS
        found[mechanism] = quality_of(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    return found


def find_scorers(root: Path) -> list[Path]:
    """Return the folder of a scorer itself, or those of the mechanisms in it."""
    if (root / "config.json").is_file():
        return [root]
    return [root / name for name in MECHANISMS if (root / name / "config.json").is_file()]


def find_weaknesses(quality: Mapping[str, Mapping | None]) -> list[str]:
    """Say of each scorer of [`read_quality`] why its levels should not be reported."""
    found = []
    for mechanism, scorer in quality.items():
        if scorer is None:
            found.append(f"{mechanism} has no {METRICS}: how good it is is not known")
            continue
        if never := " and ".join(level for level, recall in scorer["recall"].items() if recall == 0):
            found.append(f"{mechanism} finds none of the pairs of level {never} in its test split (recall 0)")
        bag = scorer["bag_of_words"]
        if bag is not None and scorer["macro_f1"] < bag:
            found.append(f"{mechanism} has macro-F1 {scorer['macro_f1']:.3f}, and a bag of words {bag:.3f}")
    return found


def check_scorers(scorers: str | Path, mechanisms: Sequence[str] = MECHANISMS) -> None:
    """Raise a `ValueError` that says why scorers in a folder are too weak to measure by, if they are."""
    quality = {name: one for name, one in read_quality(scorers).items() if name in mechanisms}
    if weaknesses := find_weaknesses(quality):
        raise ValueError(
            f"The scorers in {scorers} are too weak to measure by: {'; '.join(weaknesses)}. Train them again (`relllm "
            "empathy train`, by default with a learning rate for the encoder's size), or with a larger encoder; "
            "--allow-weak-scorers uses them all the same, and the comparison shows how good they are."
        )


def describe_quality(quality: Mapping[str, Mapping | None]) -> list[str]:
    """Return a sentence for each scorer, to stand below a table of levels."""
    lines = []
    for mechanism, scorer in quality.items():
        if scorer is None:
            lines.append(f"Scorer of {mechanism}: not measured.")
            continue
        recalls = " / ".join("–" if value is None else f"{value:.2f}" for value in scorer["recall"].values())
        bag = "" if scorer["bag_of_words"] is None else f", a bag of words {scorer['bag_of_words']:.3f}"
        lines.append(
            f"Scorer of {mechanism} on {scorer['num_pairs']} test pairs: accuracy {scorer['accuracy']:.3f}, macro-F1 "
            f"{scorer['macro_f1']:.3f}{bag}; recall of levels 0 / 1 / 2: {recalls}."
        )
    return lines


def quality_of(metrics: Mapping) -> dict:
    """Return what a scorer's `metrics.json` says of its levels, and the macro-F1 of its `bag_of_words`, if any."""
    own = {name: metrics["test"]["level"][name] for name in ("accuracy", "macro_f1", "recall", "num_pairs")}
    bag = metrics.get("bag_of_words")  # which scorers of older releases have not
    return {**own, "bag_of_words": bag and bag["macro_f1"]}
