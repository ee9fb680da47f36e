"""From answers to a verdict: UA with intervals over voice packs, recalls, languages apart, paired tests, pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from relllm.data.journal import write_json
from relllm.evaluation.statistics import Resampler, holm, percentile_interval, wilcoxon_test
from relllm.metrics import recognition_metrics
from relllm.plots import plot_confusion_matrix

EMOTIONS = ("happy", "angry", "alarm", "pain")
SYSTEMS = {
    "people": "RE-LLM, emotion tower taught on the training packs",
    "synthetic": "RE-LLM, emotion tower taught on synthetic prosody",
    "random": "RE-LLM, emotion tower with random weights",
    "speech-only": "without an emotion tower",
    "probe": "linear probe on Whisper's frames",
    "egemaps": "eGeMAPS and a linear SVM",
    "majority": "majority",
    "people projector": "probe on what RE-LLM's projector gives",
    "speech-only projector": "probe on what the projector gives, without an emotion tower",
}
PAIRS = (  # a system and what it is held against
    *(("people", other) for other in ("speech-only", "synthetic", "random", "probe", "people projector")),
    *(("speech-only", other) for other in ("probe", "egemaps", "speech-only projector")),
    ("egemaps", "probe"),
)
RESAMPLES = 10_000


def write_results(
    rows: Sequence[Mapping], predictions: Mapping[str, Mapping[str, str]], out: Path, console: Console
) -> dict:
    """Write `results.json`, `results.md` and a confusion matrix for each system; return what is in the JSON.

    `rows` have `id`, `emotion`, `speaker` (the pack) and `language`; `predictions` are answers by id, by system.
    """
    shown = [name for name in SYSTEMS if name in predictions]
    answers = {name: [predictions[name][row["id"]] for row in rows] for name in shown}
    found = {name: measure(rows, answers[name]) for name in shown}
    pairs = [(one, other) for one, other in PAIRS if one in found and other in found]
    results = {"systems": found, "tests": compare(rows, answers, pairs), "clips": len(rows)}
    for name in shown:
        scores = recognition_metrics([row["emotion"] for row in rows], answers[name], EMOTIONS)
        place = out / "plots" / f"{name.replace(' ', '-')}.png"
        plot_confusion_matrix(scores["confusion_matrix"], EMOTIONS, place, title=SYSTEMS[name])
    write_json(results, out / "results.json")
    text = results_table(results)
    (out / "results.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def measure(rows: Sequence[Mapping], answers: Sequence[str]) -> dict:
    """Return UA, its interval over packs, the recalls, UA of the English packs and of the others, and of each pack."""
    right = class_sums(rows, answers)
    interval = None
    if len({row["speaker"] for row in rows}) > 1:
        resampler = Resampler([row["speaker"] for row in rows], num_resamples=RESAMPLES, seed=0)
        interval = percentile_interval(mean_recall(resampler.sums(right)), resampler.num_units)
    english = np.array([row["language"] == "en" for row in rows])
    packs = np.array([row["speaker"] for row in rows])
    sums = right.sum(0)
    return {
        "ua": float(mean_recall(sums[None])[0]),
        "interval": interval,
        "recall": {name: float(sums[at] / sums[at + len(EMOTIONS)]) for at, name in enumerate(EMOTIONS)},
        "ua_english": _ua(right[english]),
        "ua_others": _ua(right[~english]),
        "ua_of_pack": {pack: _ua(right[packs == pack]) for pack in sorted(set(packs))},
    }


def compare(
    rows: Sequence[Mapping], answers: Mapping[str, Sequence[str]], pairs: Sequence[tuple[str, str]]
) -> list[dict]:
    """Return the gain in UA of each pair, its interval over packs, and Wilcoxon's test over packs, corrected by Holm.

    The packs' gains are the pairs of the test: clips of one actor are not independent.
    """
    if len({row["speaker"] for row in rows}) < 2:
        return []
    resampler = Resampler([row["speaker"] for row in rows], num_resamples=RESAMPLES, seed=0)
    found = []
    for pair in pairs:
        right = [class_sums(rows, answers[name]) for name in pair]
        drawn = [mean_recall(resampler.sums(one)) for one in right]
        of_packs = [measure(rows, answers[name])["ua_of_pack"] for name in pair]
        gains = [of_packs[0][pack] - of_packs[1][pack] for pack in of_packs[0]]
        found.append(
            {
                "pair": list(pair),
                "gain": float(_ua(right[0]) - _ua(right[1])),
                "interval": percentile_interval(drawn[0] - drawn[1], resampler.num_units),
                "p": wilcoxon_test(np.round(gains, 9)).p_value,
                "packs_better": int(np.sum(np.array(gains) > 1e-9)),
                "packs_worse": int(np.sum(np.array(gains) < -1e-9)),
            }
        )
    for one, p in zip(found, holm([one["p"] for one in found]), strict=True):
        one["p_holm"] = p
    return found


def class_sums(rows: Sequence[Mapping], answers: Sequence[str]) -> np.ndarray:
    """Return `(clips, 2 * classes)`, whose sums are how many of each class are right, and how many there are."""
    truth = np.array([[row["emotion"] == name for name in EMOTIONS] for row in rows], dtype=float)
    right = np.array([row["emotion"] == answer for row, answer in zip(rows, answers, strict=True)], dtype=float)
    return np.concatenate([truth * right[:, None], truth], axis=1)


def mean_recall(sums: np.ndarray) -> np.ndarray:
    """Return UA `(n,)` of sums `(n, 2 * classes)`: the mean recall of the classes that occur."""
    right, count = np.split(sums, 2, axis=1)
    recall = np.divide(right, count, out=np.full_like(right, np.nan), where=count > 0)
    return np.nanmean(recall, axis=1)


def results_table(results: Mapping) -> str:
    """Return the Markdown of `results.md`."""
    head = ["", "UA", "95 %, over packs", *EMOTIONS, "English packs", "other packs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, one in results["systems"].items():
        between = "–" if one["interval"] is None else " to ".join(f"{end:.2f}" for end in one["interval"])
        apart = [f"{one['recall'][emotion]:.2f}" for emotion in EMOTIONS]
        apart += [f"{one['ua_english']:.2f}", f"{one['ua_others']:.2f}"]
        lines.append("| " + " | ".join([SYSTEMS[name], f"{one['ua']:.3f}", between, *apart]) + " |")
    head = ["gain in UA", "points", "95 %, over packs", "packs better, worse", "p", "p after Holm"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in results["tests"]:
        between = " to ".join(f"{100 * end:+.1f}" for end in one["interval"])
        cells = [" over ".join(one["pair"]), f"{100 * one['gain']:+.1f}", between]
        cells += [f"{one['packs_better']}, {one['packs_worse']}", f"{one['p']:.3f}", f"{one['p_holm']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{results['clips']} clips; chance UA {1 / len(EMOTIONS):.2f}.\n"


def _ua(right: np.ndarray) -> float:
    return float(mean_recall(right.sum(0)[None])[0]) if len(right) else float("nan")
