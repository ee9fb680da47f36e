"""`relllm score-replies`: sampled replies to each clip, their rewards, and the best and the worst as a pair.

Beside the pairs lie `NAME.samples.jsonl`, every reply with its scores, a report, and a plot. Everything is checked
before a model is loaded; a clip's line is in the journal when it has been scored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeAlias

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from relllm.data.journal import Journal, check_columns, check_out, make_file, write_rows, write_whole
from relllm.data.loading import load_corpus
from relllm.evaluation.evaluating import plan_batches
from relllm.evaluation.fingerprints import data_fingerprint, folder_fingerprint, model_fingerprint
from relllm.evaluation.wording import count_words, distinct_share, repeated_share
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.plots import check_matplotlib, plot_scores
from relllm.processing.processing_relllm import ReLLMProcessor

from .preference_settings import RewardSettings, ScoreRepliesSettings
from .rewards import WeightedRewards, check_rewards, load_rewards, of_last_clip, weigh_replies
from .sampling import row_seed, sample_replies

LoadModel: TypeAlias = Callable[[], tuple[ReLLMForConditionalGeneration, ReLLMProcessor]]
TOTAL = "total"


def score_corpus(settings: ScoreRepliesSettings, load_model: LoadModel) -> dict:
    """Write pairs of replies to `settings.file`, and return the report, which lies beside them.

    Killed, the same call goes on where it was, with the same replies. The report has `rows`, `pairs`, `dropped`
    (reason -> `count` and `ids`), `scores` and `replies`, which [`describe_scores`] explains. `load_model` is called
    once, if there is anything left to do.

    Raises:
        ValueError: If a reward cannot be given, no row makes a pair, or an unfinished run has other settings.
        FileExistsError: If the file is there from another run.
    """
    check_matplotlib()
    check_rewards(settings.weights, settings)
    rows = load_corpus(settings.data, settings.split or "all")
    assert isinstance(rows, Dataset)  # it is not streamed
    check_columns(rows, {"id", "audio"})
    check_out(rows, settings.file)

    def fill(journal: Journal) -> None:
        if not all(row_id in journal.done for row_id in rows["id"]):
            _sample_all(rows, settings, load_model, journal)

    def finish(done: Mapping[str, dict]) -> tuple[dict, Callable[[Path], None]]:
        samples = {row_id: done[row_id].get("replies", []) for row_id in rows["id"]}
        reasons = {row_id: done[row_id].get("reason") for row_id in rows["id"]}
        pairs: dict[str, tuple[dict, dict]] = {}
        for row_id, replies in samples.items():
            if reasons[row_id] is None:
                found = choose_pair(replies, settings.margin)
                if isinstance(found, str):
                    reasons[row_id] = found
                else:
                    pairs[row_id] = found
        dropped = _group_reasons(reasons)
        if not pairs:
            raise ValueError(f"No row makes a pair of replies, and {settings.file} is not written: {_say(dropped)}.")
        scored = [replies for replies in samples.values() if replies]
        report = {
            "rows": len(rows),
            "pairs": len(pairs),
            "dropped": dropped,
            **describe_scores(scored, list(pairs.values())),
        }

        def write(path: Path) -> None:
            plot_scores(score_columns(scored, list(pairs.values())), path.with_suffix(".png"), title=path.stem)
            _write_samples(samples, samples_path(path))
            write_rows(_paired_rows(rows, pairs), path)

        return report, write

    return make_file(settings.file, _identity(settings, rows), fill, finish)


def choose_pair(replies: Sequence[Mapping], margin: float) -> tuple[dict, dict] | str:
    """Return the best and the worst of a row's scored replies, or why they make no pair.

    A reply that ran into the token limit is never the best: it would teach to stop in the middle. One that the judge
    gave no number, or that says nothing, is neither.
    """
    known = [dict(one) for one in replies if one["text"].strip() and not math.isnan(one["scores"][TOTAL])]
    whole = [one for one in known if one["finished"]]
    if not known:
        return "not scored"
    if not whole:
        return "no reply was finished"
    best = max(whole, key=lambda one: one["scores"][TOTAL])
    worst = min(known, key=lambda one: one["scores"][TOTAL])
    gap = best["scores"][TOTAL] - worst["scores"][TOTAL]
    if gap <= 0 or best["text"] == worst["text"]:
        tie = len({one["scores"][TOTAL] for one in known}) == 1
        return "all replies score the same" if tie else "no finished reply is better than the others"
    return (best, worst) if gap >= margin else "below the margin"


def describe_scores(samples: Sequence[Sequence[Mapping]], pairs: Sequence[tuple[Mapping, Mapping]]) -> dict:
    """Return what a report says of the replies to each clip, and of the pairs.

    `scores`: by reward and for their weighted `total`, the `mean` over replies, the mean `range` between the best and
    the worst reply to one clip (near 0 a reward tells nothing apart), and the means of the `chosen` and the
    `rejected`. `replies`: how many were `cut` by the token limit, the `words` and the `repetition` of all, chosen and
    rejected ones, `distinct_2` of the chosen, and `total_with_words`, the correlation of total and length over all
    replies: near 1, the reward pays for length.
    """
    columns = score_columns(samples, pairs)
    ranges: dict[str, list[float]] = {name: [] for name in columns}
    for replies in samples:
        for name, of in ranges.items():
            if values := _known(one["scores"][name] for one in replies):
                of.append(max(values) - min(values))
    everything = [one for replies in samples for one in replies]
    texts = {
        "all": [one["text"] for one in everything],
        "chosen": [best["text"] for best, _ in pairs],
        "rejected": [worst["text"] for _, worst in pairs],
    }
    known = [one for one in everything if not math.isnan(one["scores"][TOTAL])]
    totals, words = [one["scores"][TOTAL] for one in known], [count_words(one["text"]) for one in known]
    varies = len(set(totals)) > 1 and len(set(words)) > 1
    return {
        "scores": {
            name: {
                "mean": _mean(column["all"]),
                "range": _mean(ranges[name]),
                "chosen": _mean(column["chosen"]),
                "rejected": _mean(column["rejected"]),
            }
            for name, column in columns.items()
        },
        "replies": {
            "count": len(everything),
            "cut": sum(not one["finished"] for one in everything),
            "words": {name: _mean([count_words(text) for text in of]) for name, of in texts.items()},
            "repetition": {name: _mean([repeated_share(text) for text in of]) for name, of in texts.items()},
            "distinct_2": distinct_share(texts["chosen"], 2),
            "total_with_words": float(np.corrcoef(totals, words)[0, 1]) if varies else None,
        },
    }


def score_columns(
    samples: Sequence[Sequence[Mapping]], pairs: Sequence[tuple[Mapping, Mapping]]
) -> dict[str, dict[str, list[float]]]:
    """Return the scores by reward, of all replies, the chosen and the rejected ones; unknown ones are left out."""
    everything = [one["scores"] for replies in samples for one in replies]
    parts = {
        "all": everything,
        "chosen": [best["scores"] for best, _ in pairs],
        "rejected": [worst["scores"] for _, worst in pairs],
    }
    return {name: {part: _known(one[name] for one in of) for part, of in parts.items()} for name in everything[0]}


def samples_path(out: Path) -> Path:
    """Return where every reply lies with its scores."""
    return out.with_name(out.stem + ".samples.jsonl")


def _sample_all(rows: Dataset, settings: ScoreRepliesSettings, load_model: LoadModel, journal: Journal) -> None:
    model, processor = load_model()
    rewards = _load_rewards(settings, str(model.device))
    with tqdm(total=len(rows), initial=len(journal.done), desc="Scoring replies", unit="clip", disable=None) as bar:
        for batch in plan_batches(rows, settings.batch_size, "re-llm"):
            todo = [row for row in rows.select(batch) if row["id"] not in journal.done]
            if todo:
                journal.append(_score_batch(todo, model, processor, rewards, settings))
                bar.update(len(todo))


def _load_rewards(settings: ScoreRepliesSettings, device: str) -> WeightedRewards:
    own = {field.name: getattr(settings, field.name) for field in fields(RewardSettings)}
    return load_rewards(settings.weights, device=device, **own)


def _score_batch(
    rows: Sequence[dict],
    model: ReLLMForConditionalGeneration,
    processor: ReLLMProcessor,
    rewards: WeightedRewards,
    settings: ScoreRepliesSettings,
) -> list[dict]:
    """Return the line of each row: its replies with their scores, or the reason why it has none."""
    entries, read, clips = [], [], []
    for row in map(of_last_clip, rows):
        if lacking := _lacks({**row, "heard": "later"}, rewards):
            entries.append({"id": row["id"], "reason": lacking})
            continue
        try:
            clips.append({"waveform": processor.feature_extractor.read_clip(row["audio"])})
            read.append(row)
        except (OSError, ValueError, TypeError) as error:
            entries.append({"id": row["id"], "reason": "not read", "detail": f"{error}"})
    if not read:
        return entries
    seeds = [row_seed(row["id"], settings.seed) for row in read]
    how = {name: getattr(settings, name) for name in ("samples", "temperature", "top_p", "max_new_tokens")}
    sampled = sample_replies(model, processor, clips, seeds, **how)
    told = [({**row, "heard": heard.emotion}, replies) for row, (heard, replies) in zip(read, sampled, strict=True)]
    entries += [{"id": row["id"], "reason": lacking} for row, _ in told if (lacking := _lacks(row, rewards))]
    told = [(row, replies) for row, replies in told if _lacks(row, rewards) is None]
    asked = [(row, reply.text) for row, replies in told for reply in replies]
    scores = iter(weigh_replies(rewards, [row for row, _ in asked], [text for _, text in asked]))
    for row, replies in told:
        entries.append({"id": row["id"], "replies": [{**asdict(one), "scores": next(scores)} for one in replies]})
    return entries


def _lacks(row: Mapping, rewards: WeightedRewards) -> str | None:
    """Say what a reward misses in a row."""
    lacking = (reward.needs for reward, _ in rewards if reward.needs and reward.find(row) is None)
    return next((f"no {' or '.join(needs)}" for needs in lacking), None)


def _paired_rows(rows: Dataset, pairs: Mapping[str, tuple[Mapping, Mapping]]) -> Dataset:
    """Return the rows that have a pair, with TRL's `chosen` and `rejected`, and the scores of each."""
    kept = rows.select([index for index, row_id in enumerate(rows["id"]) if row_id in pairs])
    both = [pairs[row_id] for row_id in kept["id"]]
    for at, name in enumerate(("chosen", "rejected")):
        scores = [{key: _or_none(value) for key, value in pair[at]["scores"].items()} for pair in both]
        columns = {name: [pair[at]["text"] for pair in both], f"{name}_scores": scores}
        for column, values in columns.items():
            if column in kept.column_names:
                kept = kept.remove_columns(column)
            kept = kept.add_column(column, values)
    return kept


def _write_samples(samples: Mapping[str, Sequence[Mapping]], path: Path) -> None:
    with write_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row_id, replies in samples.items():
            shown = [
                {**one, "scores": {name: _or_none(value) for name, value in one["scores"].items()}} for one in replies
            ]
            file.write(json.dumps({"id": row_id, "replies": shown}, ensure_ascii=False) + "\n")


def _identity(settings: ScoreRepliesSettings, rows: Dataset) -> dict[str, object]:
    """Return what two runs must share to make one file."""
    named = ("weights", "samples", "margin", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
    own = ("min_words", "max_words", "judge_endpoint", "judge_model")
    used = settings.scorers is not None and any(name in settings.weights for name in ("ER", "IP", "EX"))
    return {
        "task": "score-replies",
        "model": settings.model,
        "model_fingerprint": model_fingerprint(settings.model, revision=settings.revision),
        "data_fingerprint": data_fingerprint(rows),
        "scorers_fingerprint": folder_fingerprint(str(settings.scorers)) if used else None,
        **{name: getattr(settings, name) for name in (*named, *own)},
    }


def _group_reasons(reasons: Mapping[str, str | None]) -> dict[str, dict]:
    grouped: dict[str, dict] = {}
    for row_id, reason in reasons.items():
        if reason is not None:
            grouped.setdefault(reason, {"count": 0, "ids": []})["ids"].append(row_id)
            grouped[reason]["count"] += 1
    return grouped


def _say(dropped: Mapping[str, Mapping]) -> str:
    return ", ".join(f"{reason} {one['count']}" for reason, one in dropped.items())


def _known(values: Iterator[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
