"""`relllm score-replies`: sampled replies to each clip, their rewards, and the best and the worst as a pair.

Beside the pairs lie `NAME.samples.jsonl`, every reply with its scores, a report, and a plot. Everything is checked
before a model is loaded; a clip's line is in the journal when it has been scored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeAlias

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from relllm.data.journal import Journal, check_columns, check_out, make_file, write_rows
from relllm.data.loading import load_corpus
from relllm.data.table_files import write_table
from relllm.evaluation.evaluating import plan_batches
from relllm.evaluation.evaluation_settings import MECHANISMS
from relllm.evaluation.fingerprints import data_fingerprint, folder_fingerprint, model_fingerprint
from relllm.evaluation.wording import count_words, distinct_share, repeated_share
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.plots import check_matplotlib, plot_scores
from relllm.processing.processing_relllm import ReLLMProcessor

from .preference_settings import RewardSettings, ScoreRepliesSettings
from .rewards import WeightedRewards, check_rewards, first_text, load_rewards, of_last_clip, weigh_replies
from .sampling import row_seed, sample_replies

LoadModel: TypeAlias = Callable[[], tuple[ReLLMForConditionalGeneration, ReLLMProcessor]]
Pair: TypeAlias = tuple[dict, dict]  # the better reply and the worse one, as in the samples
TOTAL = "total"


def score_corpus(settings: ScoreRepliesSettings, load_model: LoadModel) -> dict:
    """Write pairs of replies to `settings.file`, and return the report, which lies beside them.

    Killed, the same call goes on where it was, with the same replies. The report has `rows`, `pairs`, `dropped`
    (reason -> `count` and `ids`), `scores` and `replies`, which [`describe_scores`] explains. `load_model` is called
    once, if there is anything left to do. A reward that cannot be given, rows of which none makes a pair, and an
    unfinished run of other settings are a `ValueError`, a file from another run is a `FileExistsError`.
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
        pairs: dict[str, Pair] = {}
        dropped: dict[str, list[str]] = defaultdict(list)
        for row_id, replies in samples.items():
            found = done[row_id].get("reason") or choose_pair(replies, settings.margin)
            if isinstance(found, str):
                dropped[found].append(row_id)
            else:
                pairs[row_id] = found
        if not pairs:
            told = ", ".join(f"{reason} {len(ids)}" for reason, ids in dropped.items())
            raise ValueError(f"No row makes a pair of replies, and {settings.file} is not written: {told}.")
        scored, chosen = [replies for replies in samples.values() if replies], list(pairs.values())
        left_out = {reason: {"count": len(ids), "ids": ids} for reason, ids in dropped.items()}
        counts = {"rows": len(rows), "pairs": len(pairs), "dropped": left_out}

        def write(path: Path) -> None:
            plot_scores(score_columns(scored, chosen), path.with_suffix(".png"), title=path.stem)
            lines = [{"id": name, "replies": list(map(_without_nan, replies))} for name, replies in samples.items()]
            write_table(lines, samples_path(path))
            write_rows(_paired_rows(rows, pairs), path)

        return counts | describe_scores(scored, chosen), write

    return make_file(settings.file, _identity(settings, rows), fill, finish)


def choose_pair(replies: Sequence[Mapping], margin: float) -> Pair | str:
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


def describe_scores(samples: Sequence[Sequence[Mapping]], pairs: Sequence[Pair]) -> dict:
    """Return what a report says of the replies to each clip, and of the pairs.

    `scores`: by reward and for their weighted `total`, the `mean` over replies, the mean `range` between the best and
    the worst reply to one clip (near 0 a reward tells nothing apart), and the means of the `chosen` and the
    `rejected`. `replies`: how many were `cut` by the token limit, the `words` and the `repetition` of all, chosen and
    rejected ones, `distinct_2` of the chosen, and `total_with_words`, the correlation of total and length over all
    replies: near 1, the reward pays for length.
    """
    scores = {}
    for name, column in score_columns(samples, pairs).items():
        of_clips = (_known(one["scores"][name] for one in replies) for replies in samples)
        ranges = [max(values) - min(values) for values in of_clips if values]
        everything, chosen, rejected = map(_mean, column.values())
        scores[name] = {"mean": everything, "range": _mean(ranges), "chosen": chosen, "rejected": rejected}
    parts = _by_part(samples, pairs)
    known = [one for one in parts["all"] if not math.isnan(one["scores"][TOTAL])]
    totals, words = [one["scores"][TOTAL] for one in known], [count_words(one["text"]) for one in known]
    varies = len(set(totals)) > 1 and len(set(words)) > 1
    return {
        "scores": scores,
        "replies": {
            "count": len(parts["all"]),
            "cut": sum(not one["finished"] for one in parts["all"]),
            "words": {part: _mean([count_words(one["text"]) for one in of]) for part, of in parts.items()},
            "repetition": {part: _mean([repeated_share(one["text"]) for one in of]) for part, of in parts.items()},
            "distinct_2": distinct_share([one["text"] for one in parts["chosen"]], 2),
            "total_with_words": float(np.corrcoef(totals, words)[0, 1]) if varies else None,
        },
    }


def score_columns(samples: Sequence[Sequence[Mapping]], pairs: Sequence[Pair]) -> dict[str, dict[str, list[float]]]:
    """Return the scores by reward, of all replies, the chosen and the rejected ones; unknown ones are left out."""
    parts = _by_part(samples, pairs)
    names = parts["all"][0]["scores"]
    return {name: {part: _known(one["scores"][name] for one in of) for part, of in parts.items()} for name in names}


def _by_part(samples: Sequence[Sequence[Mapping]], pairs: Sequence[Pair]) -> dict[str, Sequence[Mapping]]:
    chosen, rejected = ([pair[at] for pair in pairs] for at in (0, 1))
    return {"all": [one for replies in samples for one in replies], "chosen": chosen, "rejected": rejected}


def samples_path(out: Path) -> Path:
    """Return where every reply lies with its scores."""
    return out.with_name(out.stem + ".samples.jsonl")


def _sample_all(rows: Dataset, settings: ScoreRepliesSettings, load_model: LoadModel, journal: Journal) -> None:
    model, processor = load_model()
    own = {field.name: getattr(settings, field.name) for field in fields(RewardSettings)}
    rewards = load_rewards(settings.weights, device=model.device, **own)
    with tqdm(total=len(rows), initial=len(journal.done), desc="Scoring replies", unit="clip", disable=None) as bar:
        for batch in plan_batches(rows, settings.batch_size, "re-llm"):
            todo = [row for row in rows.select(batch) if row["id"] not in journal.done]
            if todo:
                journal.append(_score_batch(todo, model, processor, rewards, settings))
                bar.update(len(todo))


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
    asked = []
    for row, (heard, replies) in zip(read, sampled, strict=True):
        told = {**row, "heard": heard.emotion}
        if lacking := _lacks(told, rewards):
            entries.append({"id": row["id"], "reason": lacking})
        else:
            asked += [(told, reply) for reply in replies]
    scores = weigh_replies(rewards, [row for row, _ in asked], [reply.text for _, reply in asked])
    lines: dict[str, list[dict]] = defaultdict(list)
    for (row, reply), one in zip(asked, scores, strict=True):
        lines[row["id"]].append({**asdict(reply), "scores": one})
    entries += [{"id": row_id, "replies": replies} for row_id, replies in lines.items()]
    return entries


def _lacks(row: Mapping, rewards: WeightedRewards) -> str | None:
    """Say what a reward misses in a row."""
    lacking = (reward.needs for reward, _ in rewards if reward.needs and first_text(row, reward.needs) is None)
    return next((f"no {' or '.join(needs)}" for needs in lacking), None)


def _paired_rows(rows: Dataset, pairs: Mapping[str, Pair]) -> Dataset:
    """Return the rows that have a pair, with TRL's `chosen` and `rejected`, and the scores of each."""
    kept = rows.select([index for index, row_id in enumerate(rows["id"]) if row_id in pairs])
    for at, name in enumerate(("chosen", "rejected")):
        replies = [_without_nan(pairs[row_id][at]) for row_id in kept["id"]]
        columns = {name: [one["text"] for one in replies], f"{name}_scores": [one["scores"] for one in replies]}
        for column, values in columns.items():
            if column in kept.column_names:
                kept = kept.remove_columns(column)
            kept = kept.add_column(column, values)
    return kept


def _without_nan(reply: Mapping) -> dict:
    scores = {name: None if math.isnan(value) else value for name, value in reply["scores"].items()}
    return {**reply, "scores": scores}


def _identity(settings: ScoreRepliesSettings, rows: Dataset) -> dict[str, object]:
    """Return what two runs must share to make one file."""
    named = ("weights", "samples", "margin", "temperature", "top_p", "max_new_tokens", "seed", "dtype")
    own = ("min_words", "max_words", "judge_endpoint", "judge_model")
    used = settings.scorers is not None and not set(settings.weights).isdisjoint(MECHANISMS)
    return {
        "task": "score-replies",
        "model": settings.model,
        "model_fingerprint": model_fingerprint(settings.model, revision=settings.revision),
        "data_fingerprint": data_fingerprint(rows),
        "scorers_fingerprint": folder_fingerprint(str(settings.scorers)) if used else None,
        **{name: getattr(settings, name) for name in (*named, *own)},
    }


def _known(values: Iterator[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
