"""Runs side by side, counted anew from the clips that all have: numbers, gains over baselines, tests and intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from relllm.labels import DIMENSIONS
from relllm.metrics import dimension_metrics, recognition_metrics

from .evaluation_settings import EMPATHY_PARTS, LEVELS, NO_TRANSCRIPT, REPLY_PARTS, SYSTEMS, WAYS, Grouping, Resampling
from .runs import Run, find_differences, group_by_corpus
from .statistics import PairedTest, Resampler, holm, percentile_interval, wilcoxon_test
from .summary import answered_emotion
from .wording import count_words, distinct_share, repeated_share

MAX_MISSING = 0.01  # of the clips of a data set; with more, the runs are not of one evaluation
MIN_SPEAKERS = 10  # fewer make no interval that holds
PARTS = (
    *(("empathy", name) for name in EMPATHY_PARTS),
    *(("replies", name) for name in REPLY_PARTS),
    *(("recognition", way) for way in WAYS),
    *(("dimensions", name) for name in DIMENSIONS),
)
SYSTEM_TITLES = {
    "text-only": "Text-only LLM on transcripts",
    "text-only-tuned": "Text-only LLM, fine-tuned on the replies",
    "speech-only": "Speech-LLM without the emotion module",
    "re-llm": "RE-LLM",
}
# From sums over clips, `(resamples, values)`, to the metric of each resample; not finite where it is not defined.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One number of the tables."""

    table: str  # "empathy", "replies", "recognition" or "dimensions"
    part: str  # the mechanism, what of the wording, the way of recognition, or the dimension
    name: str  # "mean_level", "value", "ua", "wa", "macro_f1" or "ccc"


@dataclass(frozen=True)
class Measured:
    """A system's metric."""

    value: float | None  # in the metric's own unit; None where it is not defined
    summands: np.ndarray  # (clips, values): what `statistic` needs the sums of
    statistic: Statistic  # the metric from these sums
    paired: np.ndarray | None  # (clips,): values whose mean is the metric; None where it is none


@dataclass(frozen=True)
class Cell:
    """A system's number on a corpus."""

    corpus: str
    system: str
    metric: Metric
    value: float | None  # in the metric's own unit (shares are not per cent); None where it is not defined
    num_clips: int
    fold_mean: float | None  # where there are folds
    num_runs: int = 1  # of which `value` is the mean
    deviation: float | None = None  # between runs, where there are several: of the sample (n - 1)


@dataclass
class Gain:
    """How much better a system is than a baseline, on the same clips."""

    corpus: str
    system: str
    baseline: str
    metric: Metric
    num_clips: int
    difference: float | None = None  # in the metric's own unit
    difference_interval: tuple[float, float] | None = None  # 95 %; None where a resample does not define it
    relative: float | None = None  # in per cent of the baseline's value; None where that is not positive, and for CCC
    relative_interval: tuple[float, float] | None = None
    test: PairedTest | None = None  # None where the metric is no mean over clips
    p_holm: float | None = None  # corrected over the table's family of tests


@dataclass(frozen=True)
class Comparison:
    """What [`compare_runs`] found: systems in the order of the tables, cells, gains, and sentences to print below."""

    systems: list[str]
    kinds: dict[str, str]
    runs: dict[str, list[Run]]
    cells: list[Cell]
    gains: list[Gain]
    notes: list[str]
    settings: dict[str, object]
    rows: dict[Path, str]  # the row of each run


def compare_runs(
    runs: Sequence[Run],
    baselines: Sequence[str],
    *,
    resample: str = "auto",
    num_resamples: int = 2000,
    seed: int = 0,
    group: str | None = None,
) -> Comparison:
    """Set two runs or more side by side, as the paper does: systems x corpora, gains over the baselines.

    Rows are the systems; where a corpus has two runs of one, the runs' names. Only clips count that every run of a
    corpus with that task has; a run that lacks more than 1 % of them is refused. A baseline is a system, a run's name,
    or its folder. The bootstrap draws `"clips"` or `"speakers"`; `"auto"`: speakers where it has 10. With `group`
    (`"system"` or `"name"`) such runs on a corpus are one row, as seeds of one training: its value is their mean, the
    bootstrap draws runs too, tests are of the clips' means over runs.
    """
    for name, value, known in (("resample", resample, Resampling), ("group", group or "name", Grouping)):
        if value not in get_args(known):
            raise ValueError(f"--{name} {value}: expected one of {', '.join(get_args(known))}.")
    groups = group_by_corpus(runs)
    rows, kinds = _name_rows(groups, group)
    chosen = [_find_baseline(name, runs, rows) for name in baselines]
    systems = list(kinds)
    notes: list[str] = []
    cells: list[Cell] = []
    gains: list[Gain] = []
    for corpus, members in groups.items():
        ordered = sorted(members, key=lambda run: systems.index(rows[run.path]))
        present = [rows[run.path] for run in ordered]
        titles = {path: name if present.count(name) == 1 else f"{name} ({path})" for path, name in rows.items()}
        pairs = _pairs(list(dict.fromkeys(present)), chosen)
        own = [f"no run of the baseline {name}" for name in chosen if name not in present] + find_differences(members)
        own += [note for run in ordered for note in _say_seen(titles[run.path], run)]
        for measured, units in _measure_parts(corpus, {titles[run.path]: run for run in ordered}, resample, own):
            resampler = Resampler(units, num_resamples=num_resamples, seed=seed) if len(set(units)) > 1 else None
            for metric, of_run in measured.items():
                of_row: dict[str, Measured] = {}
                for name in dict.fromkeys(rows[run.path] for run, _ in of_run):
                    seeds = [(run, one) for run, one in of_run if rows[run.path] == name]
                    of_row[name] = combine_runs([one for _, one in seeds], (seed, systems.index(name)))
                    cells.append(_cell(corpus, name, metric, seeds))
                both = [pair for pair in pairs if of_row.keys() >= set(pair)]
                gains += [_gain(corpus, pair, metric, [of_row[one] for one in pair], resampler) for pair in both]
        notes += [f"{corpus}: {note}." for note in dict.fromkeys(own)]
    if not gains:
        raise ValueError(f"Nothing to compare: no corpus has a baseline ({', '.join(baselines)}) and another run.")
    _correct(gains)
    settings = {"baselines": chosen, "resample": resample, "num_resamples": num_resamples, "seed": seed}
    return Comparison(systems, kinds, groups, cells, gains, notes, settings, rows)


def combine_runs(measured: Sequence[Measured], seed: tuple[int, ...]) -> Measured:
    """Return the mean of one metric over several runs on the same clips; a resample draws runs as well as clips.

    What the drawn runs move it by is widened by sqrt(n / (n - 1)): resamples of few runs vary by that much too little.
    """
    if len(measured) == 1:
        return measured[0]
    widths = np.cumsum([one.summands.shape[1] for one in measured])[:-1]

    def statistic(sums: np.ndarray) -> np.ndarray:
        parts = np.split(sums, widths, axis=1)
        of_runs = np.stack([one.statistic(part) for one, part in zip(measured, parts, strict=True)], axis=1)
        drawn = np.random.default_rng(seed).integers(len(measured), size=of_runs.shape)
        mean, count = of_runs.mean(axis=1), len(measured)
        return mean + (np.take_along_axis(of_runs, drawn, axis=1).mean(axis=1) - mean) * np.sqrt(count / (count - 1))

    paired = [one.paired for one in measured if one.paired is not None]
    return Measured(
        value=_mean([one.value for one in measured]),
        summands=np.concatenate([one.summands for one in measured], axis=1),
        statistic=statistic,
        paired=np.mean(paired, axis=0) if len(paired) == len(measured) else None,
    )


def _cell(corpus: str, row: str, metric: Metric, seeds: Sequence[tuple[Run, Measured]]) -> Cell:
    values = [one.value for _, one in seeds]
    folds = [run.folds.get("mean", {}).get(metric.table, {}).get(metric.part, {}) for run, _ in seeds]
    fold_mean, mean = _mean([of.get(metric.name) for of in folds]), _mean(values)
    deviation = None if mean is None or len(seeds) < 2 else float(np.std(np.array(values, dtype=float), ddof=1))
    return Cell(corpus, row, metric, mean, len(seeds[0][1].summands), fold_mean, len(seeds), deviation)


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean; `None` where one of the values is."""
    return None if None in values else float(np.mean(np.array(values, dtype=float)))


def _name_rows(groups: Mapping[str, Sequence[Run]], group: str | None) -> tuple[dict[Path, str], dict[str, str]]:
    """Return what row each run is in, and the system of each row, in the order of the rows."""
    by_system = all(len({run.system for run in members}) == len(members) for members in groups.values())
    by_system = group == "system" or (by_system and group is None)
    everyone = sorted((run for group in groups.values() for run in group), key=lambda run: SYSTEMS.index(run.system))
    rows = {run.path: SYSTEM_TITLES[run.system] if by_system else run.name for run in everyone}
    for corpus, members in groups.items() if group is None else ():
        names = Counter(rows[run.path] for run in members)
        if again := [run for run in members if names[rows[run.path]] > 1]:
            raise ValueError(
                f"Two runs on {corpus} are called {again[0].name!r}, one of them {again[0].path}. Leave one out, or "
                "evaluate it with another --name, or set them side by side as seeds of one training with --group name."
            )
    kinds: dict[str, str] = {}
    for run in everyone:
        if kinds.setdefault(rows[run.path], run.system) != run.system:
            raise ValueError(
                f"The name {run.name!r} stands for a {kinds[run.name]} and for a {run.system} ({run.path}). Give each "
                "system a name of its own with `relllm evaluate --name`."
            )
    return rows, kinds


def _say_seen(title: str, run: Run) -> list[str]:
    """Say what a system reads in the place of transcripts, and what its training has to do with the rows."""
    notes, seen = [], run.seen
    if column := run.data.get("text_column"):
        notes.append(f"{title} reads the column {column!r}, not the corpus's own transcripts")
    if not seen:
        return notes
    if count := seen["trained_on"] + seen["validated_on"] * bool(seen["chosen_by"]):
        notes.append(f"{title} is NOT CLEAN: {count} of the clips trained it or chose its checkpoint")
    if seen["validated_on"] and not seen["chosen_by"]:
        watched = f"{seen['validated_on']} of the clips while it trained"
        notes.append(f"{title} was evaluated on {watched}; who chose it may have looked")
    if not count and str(run.data.get("corpus")) in seen["corpora"]:
        held = "on other clips of it" if seen["recorded"] else "on it, and on which clips is not known"
        notes.append(f"{title}, or a tower of it, was trained {held}")
    return notes


def _find_baseline(name: str, runs: Sequence[Run], rows: Mapping[Path, str]) -> str:
    place = Path(name).absolute()
    found = {
        rows[run.path]
        for run in runs
        if name in (run.system, run.name, rows[run.path]) or run.path.absolute() == place
    }
    if len(found) != 1:
        known = ", ".join(sorted({run.system for run in runs} | {run.name for run in runs}))
        what = f"could be {' or '.join(sorted(found))}" if found else "is none of the runs"
        raise ValueError(f"--baseline {name} {what}; name one of {known}, or a run's folder.")
    return found.pop()


def _pairs(present: Sequence[str], baselines: Sequence[str]) -> list[tuple[str, str]]:
    """Pair each system with each baseline, but no pair twice, the other way round."""
    pairs: list[tuple[str, str]] = []
    for baseline in baselines:
        if baseline in present:
            pairs += [(one, baseline) for one in present if one != baseline and (baseline, one) not in pairs]
    return list(dict.fromkeys(pairs))


def _measure_parts(
    corpus: str, runs: Mapping[str, Run], resample: str, notes: list[str]
) -> Iterator[tuple[dict[Metric, list[tuple[Run, Measured]]], list[str]]]:
    """Return for each part of each table its metrics by run, and what the bootstrap draws, of each clip."""
    for table, part in PARTS:
        having = {title: own for title, run in runs.items() if (own := _ids_with(run, table, part))}
        if not having:
            continue
        first = runs[next(iter(having))]
        names = first.class_names.get(part, [])
        shared = _common(corpus, having, runs, notes)
        clips = [clip for clip_id, clip in first.clips.items() if clip_id in shared]
        clips = [clip for clip in clips if _is_labelled(clip, table, part, names)]
        if not clips:
            continue
        sources = {str(clip.get("dimension_source") or "label") for clip in clips} - {"label"}
        if table == "dimensions" and sources:
            notes.append(f"dimensions are partly or wholly no labels, but readings of {sorted(sources)}")
        measured: dict[Metric, list[tuple[Run, Measured]]] = defaultdict(list)
        for run in map(runs.__getitem__, having):
            for metric, one in measure_part([run.clips[clip["id"]] for clip in clips], table, part, names):
                measured[metric].append((run, one))
        yield measured, _units(corpus, clips, resample, notes)


def _ids_with(run: Run, table: str, part: str) -> set[str]:
    if table == "replies":
        return {clip_id for clip_id, clip in run.clips.items() if "reply" in clip}
    return {clip_id for clip_id, clip in run.clips.items() if part in clip.get(table, {})}


def _is_labelled(clip: Mapping, table: str, part: str, names: Sequence[str]) -> bool:
    if table == "recognition":
        return clip.get("emotion") in names
    return table != "dimensions" or clip.get(part) is not None


def _common(corpus: str, having: Mapping[str, set[str]], runs: Mapping[str, Run], notes: list[str]) -> set[str]:
    """Return the clips that all runs with this part have."""
    everything = set().union(*having.values())
    for title, ids in having.items():
        lacking = sorted(everything - ids)
        named = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        failed = runs[title].data.get("failed") or {}
        unread = sum(failed.get(clip_id) == NO_TRANSCRIPT for clip_id in lacking)
        if len(lacking) - unread > MAX_MISSING * len(everything):
            raise ValueError(
                f"{runs[title].path} lacks {len(lacking)} of the {len(everything)} clips that other runs on {corpus} "
                f"have ({named}), more than {MAX_MISSING:.0%}. Find out why, and evaluate them."
            )
        if lacking:
            why = f" ({unread} without a transcript)" if unread else ""
            share = f"{len(lacking)} of {len(everything)} clips{why}"
            notes.append(f"{title} lacks {share}, left out of all: {named}")
    return set.intersection(*having.values())


def _units(corpus: str, clips: Sequence[dict], resample: str, notes: list[str]) -> list[str]:
    """Return what the bootstrap draws, for each clip; one without a speaker is drawn alone."""
    num_speakers = len({clip.get("speaker") for clip in clips} - {None})
    if resample == "speakers" and num_speakers < 2:
        raise ValueError(f"--resample speakers: {corpus} has {num_speakers} known speakers. Use --resample clips.")
    if resample == "clips" or (resample == "auto" and num_speakers < MIN_SPEAKERS):
        reason = f" (only {num_speakers} known speakers: they say nothing of further speakers)" * (resample == "auto")
        notes.append(f"the intervals resample clips{reason}")
        return [clip["id"] for clip in clips]
    notes.append(f"the intervals resample {num_speakers} speakers with all their clips")
    speakers = ((clip["id"], clip.get("speaker")) for clip in clips)
    return [f"clip {clip_id}" if speaker is None else f"speaker {speaker}" for clip_id, speaker in speakers]


def _gain(
    corpus: str, pair: tuple[str, str], metric: Metric, measured: Sequence[Measured], resampler: Resampler | None
) -> Gain:
    one, other = measured
    gain = Gain(corpus, *pair, metric, len(one.summands))
    if one.paired is not None and other.paired is not None:
        gain.test = wilcoxon_test(one.paired - other.paired)
    if one.value is None or other.value is None:
        return gain
    gain.difference = one.value - other.value
    if metric.name != "ccc" and other.value > 0:
        gain.relative = 100 * (one.value / other.value - 1)
    if resampler is not None:
        ours, theirs = (each.statistic(resampler.sums(each.summands)) for each in measured)
        gain.difference_interval = percentile_interval(ours - theirs, resampler.num_units)
        if gain.relative is not None:
            with np.errstate(all="ignore"):
                relative = np.where(theirs > 0, 100 * (ours / theirs - 1), np.nan)
            gain.relative_interval = percentile_interval(relative, resampler.num_units)
    return gain


def _correct(gains: Sequence[Gain]) -> None:
    """Holm's correction; the family is all tests of one table: its metrics, corpora and pairs of systems."""
    for table in ("empathy", "replies", "recognition"):
        tested = [gain for gain in gains if gain.metric.table == table and gain.test is not None]
        for gain, p_value in zip(tested, holm([gain.test.p_value for gain in tested if gain.test]), strict=True):
            gain.p_holm = p_value


def measure_part(
    clips: Sequence[dict], table: str, part: str, class_names: Sequence[str]
) -> Iterator[tuple[Metric, Measured]]:
    """Yield the metrics of one part of one table, from lines of predictions.jsonl that have it and its label."""
    if table == "empathy":
        levels = [clip["empathy"][part]["level"] for clip in clips]
        if wrong := sorted(set(levels).difference(range(LEVELS)), key=str):
            raise ValueError(f"Levels of {part} are {wrong}, expected 0 to {LEVELS - 1}. Evaluate again.")
        yield Metric(table, part, "mean_level"), _mean_measured(levels)
    elif table == "replies":
        yield Metric(table, part, "value"), _wording_measured([clip["reply"] for clip in clips], part)
    elif table == "dimensions":
        yield Metric(table, part, "ccc"), _concordance(clips, part)
    else:
        for name, one in _recognition_measured(clips, part, class_names).items():
            yield Metric(table, part, name), one


def _mean_measured(values: Sequence[float]) -> Measured:
    paired = np.array(values, dtype=float)
    summands = np.stack([paired, np.ones(len(paired))], axis=1)
    return Measured(float(paired.mean()), summands, lambda sums: sums[:, 0] / sums[:, 1], paired)


def _wording_measured(replies: Sequence[str], part: str) -> Measured:
    if part != "distinct_2":
        return _mean_measured(list(map(count_words if part == "words" else repeated_share, replies)))
    ones = np.ones((len(replies), 1))  # no resample defines it: a reply that is drawn twice is no less distinct
    return Measured(distinct_share(replies, 2), ones, lambda sums: np.full(len(sums), np.nan), None)


def _recognition_measured(clips: Sequence[dict], way: str, names: Sequence[str]) -> dict[str, Measured]:
    truth = [clip["emotion"] for clip in clips]
    predictions = [answered_emotion(clip, way, names) for clip in clips]
    values = recognition_metrics(truth, predictions, names)
    true = np.array([names.index(name) for name in truth])[:, None] == np.arange(len(names))  # (clips, classes)
    predicted = np.array([[name == prediction for name in names] for prediction in predictions])
    right = (true & predicted).any(axis=1).astype(float)
    # Weighted so that the mean over all clips is UA.
    support = true.sum(axis=0)
    weights = (len(clips) / (np.count_nonzero(support) * np.maximum(support, 1)))[true.argmax(axis=1)]
    summands = np.concatenate([true & predicted, true, predicted], axis=1).astype(float)
    paired = {"ua": right * weights, "wa": right, "macro_f1": None}
    return {
        name: Measured(values[name], summands, partial(_rate, name), each)  # type: ignore[literal-required]
        for name, each in paired.items()
    }


def _rate(name: str, sums: np.ndarray) -> np.ndarray:
    hits, true, predicted = np.split(sums, 3, axis=1)
    if name == "wa":
        return hits.sum(axis=1) / true.sum(axis=1)
    of_class = hits / np.maximum(true, 1) if name == "ua" else 2 * hits / np.maximum(true + predicted, 1)
    return np.where(true > 0, of_class, 0).sum(axis=1) / (true > 0).sum(axis=1)


def _concordance(clips: Sequence[dict], dimension: str) -> Measured:
    truth = [float(clip[dimension]) for clip in clips]
    predicted = [float(clip["dimensions"][dimension]) for clip in clips]
    value = dimension_metrics({dimension: truth}, {dimension: predicted})[dimension]["ccc"]
    x, y = np.array(truth) - np.mean(truth), np.array(predicted) - np.mean(truth)  # small sums of squares
    return Measured(value, np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1), _ccc, None)


def _ccc(sums: np.ndarray) -> np.ndarray:
    count, x, y, xx, yy, xy = sums.T
    spread = xx + yy - 2 * x * y / count  # n (var x + var y + (mean x - mean y)^2)
    with np.errstate(all="ignore"):
        return np.where(spread > 1e-12, 2 * (xy - x * y / count) / spread, np.nan)
