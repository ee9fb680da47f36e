"""A comparison as tables, JSON and forest plots, with published numbers of RE-LLM and BLSP-Emo beside it, as printed.

Protocols, splits and scorers of the papers are not those of a run here, so no test sets the two against each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from relllm.data.journal import write_json, write_whole
from relllm.plots import ForestLine, plot_forest, plot_levels

from .comparison import SYSTEM_TITLES, Cell, Comparison, Gain, Metric, compare_runs
from .empathy.quality import describe_quality, find_weaknesses
from .evaluation_settings import LEVELS, MECHANISMS, ComparisonSettings
from .fingerprints import check_extras
from .runs import Run, read_run
from .summary import summarize_levels
from .tables import DASH, Table, show_table, to_latex, to_markdown

if TYPE_CHECKING:
    from rich.console import Console

COMPARISON_FORMAT = "relllm-comparison-1"
SOURCE = "RE-LLM, arXiv 2602.10716"
BLSP_EMO_SOURCE = "BLSP-Emo, arXiv 2406.03872, as cited by EmotionThinker, ICLR 2026"
PUBLISHED = "RE-LLM, published"
TITLES = {
    "empathy": "Empathy: mean level of the replies, 0 to 2",
    "replies": "Replies: words, share of repeated runs of three words, distinct-2 over all",
    "recognition": "Speech emotion recognition, per cent",
    "dimensions": "Emotion dimensions, CCC",
}
GAIN_TITLES = {
    "empathy": "Empathy: relative gain, per cent",
    "replies": "Replies: difference",
    "recognition": "Speech emotion recognition: gain in percentage points",
    "dimensions": "Emotion dimensions: difference in CCC",
}
PART_TITLES = {"distinct_2": "distinct-2"}
METRIC_TITLES = {"ua": "UA", "wa": "WA", "macro_f1": "macro-F1", "ccc": "CCC"}


@dataclass(frozen=True)
class Published:
    """A number as printed: a value of a system, or a gain of RE-LLM."""

    corpus: str  # as `CorpusFacts.name`
    metric: str  # "ER" (mean level, 0 to 2), "EX", "ua" or "wa"
    value: float  # per cent for "ua" and "wa"; a gain in the unit below
    source: str = SOURCE
    baseline: Literal["text-only", "speech-only"] | None = None  # of a gain, where it is known
    unit: Literal["%", "points"] | None = None  # of a gain: of the baseline, or percentage points

    @property
    def system(self) -> str:
        """Name the row of a table in which a value stands."""
        return f"{self.source.split(',')[0]}, published"


PUBLISHED_VALUES = (
    Published("iemocap", "ER", 1.856),
    Published("esd", "ER", 1.851),
    Published("msp-podcast", "ER", 1.889),
    Published("iemocap", "ua", 76.6),
    Published("esd", "ua", 98.9),
    Published("msp-podcast", "ua", 66.4),
    Published("iemocap", "wa", 76.0, BLSP_EMO_SOURCE),
    Published("meld", "wa", 57.3, BLSP_EMO_SOURCE),
    Published("ravdess", "wa", 72.0, BLSP_EMO_SOURCE),
)
PUBLISHED_GAINS = (
    Published("iemocap", "EX", 35.42, SOURCE, "text-only", "%"),
    Published("iemocap", "EX", 3.91, SOURCE, "speech-only", "%"),
    Published("esd", "EX", 139.28, SOURCE, "text-only", "%"),
    Published("esd", "EX", 9.83, SOURCE, "speech-only", "%"),
    Published("msp-podcast", "EX", 60.95, SOURCE, "text-only", "%"),
    Published("msp-podcast", "EX", 22.64, SOURCE, "speech-only", "%"),
    Published("esd", "ER", 14.79, SOURCE, "text-only", "%"),
    Published("esd", "ER", 6.76, SOURCE, "speech-only", "%"),
    Published("iemocap", "ua", 5.4, SOURCE, None, "points"),
    Published("esd", "ua", 2.3, SOURCE, None, "points"),
    Published("msp-podcast", "ua", 6.9, SOURCE, None, "points"),
)


def report_comparison(settings: ComparisonSettings, console: Console) -> None:
    """Do what `relllm compare` does: write a comparison of runs, and print its tables and notes."""
    check_extras("Comparing runs", "matplotlib", "scipy")
    options: dict[str, Any] = {"resample": settings.resample, "seed": settings.seed, "group": settings.group}
    comparison = compare_runs([read_run(path) for path in settings.runs], settings.baseline, **options)
    written = write_comparison(comparison, settings.output_dir)
    tables = comparison_tables(comparison)
    for table in tables:
        show_table(table, console)
    for note in dict.fromkeys(note for table in tables for note in table.notes):
        console.print(note, style="dim", soft_wrap=False)
    console.print(f"{', '.join(path.name for path in written)} in {settings.output_dir}")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Make a table of values of each task that was measured, and behind them all one of its gains."""
    measured = {cell.metric.table for cell in comparison.cells}
    gained = {gain.metric.table for gain in comparison.gains}
    values = [_value_table(comparison, name) for name in TITLES if name in measured]
    return values + [_gain_table(comparison, name) for name in TITLES if name in gained]


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Write comparison.md, .tex and .json, forest_*.png and levels_*.png; return the files."""
    tables = comparison_tables(comparison)
    texts = {"md": "# Comparison\n\n" + "\n".join(map(to_markdown, tables)), "tex": "\n".join(map(to_latex, tables))}
    written = [out / f"comparison.{suffix}" for suffix in (*texts, "json")]
    for path, text in zip(written, texts.values(), strict=False):
        with write_whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    write_json(comparison_json(comparison), written[2])
    over = {gain.baseline for gain in comparison.gains}
    for name, title in GAIN_TITLES.items():
        if panels := _forest_panels(comparison, name):
            title += f", over {min(over)}" if len(over) == 1 else ""
            written.append(plot_forest(panels, out / f"forest_{name}.png", title=title))
    for corpus in comparison.runs:
        if levels := _count_levels(comparison, corpus):
            name = re.sub(r"[^\w.=-]+", "_", corpus)  # what is held out may have any mark
            written.append(plot_levels(levels, out / f"levels_{name}.png", title=corpus))
    return written


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """Return every number with its n; `None` where it is not defined."""
    return {
        "format": COMPARISON_FORMAT,
        "settings": comparison.settings,
        "runs": {
            corpus: [{"path": str(run.path), "name": run.name, "system": run.system, "data": run.data} for run in runs]
            for corpus, runs in comparison.runs.items()
        },
        "values": [asdict(cell) for cell in comparison.cells],
        "gains": [asdict(gain) for gain in comparison.gains],
        "published": {
            "source": SOURCE,
            "values": [asdict(value) for value in PUBLISHED_VALUES if value.corpus in comparison.runs],
            "gains": [asdict(gain) for gain in PUBLISHED_GAINS if gain.corpus in comparison.runs],
        },
        "notes": comparison.notes,
    }


def _value_table(comparison: Comparison, name: str) -> Table:
    cells = {(cell.corpus, cell.system, cell.metric): cell for cell in comparison.cells if cell.metric.table == name}
    columns = list(dict.fromkeys((corpus, _column(metric)) for corpus, _, metric in cells))
    header = [("", "system"), *([("", "by")] if name == "recognition" else [])]
    num_stubs = len(header)
    header += [(_group(corpus, cells), title) for corpus, title in columns]
    rows = []
    for system in comparison.systems:
        for by in dict.fromkeys(_row(metric) for _, label, metric in cells if label == system):
            wanted = [key for key in cells if (key[1], _row(key[2])) == (system, by)]
            of_row = {(key[0], _column(key[2])): cells[key] for key in wanted}
            stubs = [system, by][:num_stubs]
            rows.append([*stubs, *(_show_cell(of_row.get(column)) for column in columns)])
            if any(cell.fold_mean is not None for cell in of_row.values()):
                rows[-1][0] = f"{system}, folds pooled"
                means = [_show_cell(of_row.get(column), fold_mean=True) for column in columns]
                rows.append([f"{system}, mean over folds", *stubs[1:], *means])
    notes, digits = [], 1 if name == "recognition" else 3
    for source in dict.fromkeys(value.source for value in PUBLISHED_VALUES):
        printed = [value for value in PUBLISHED_VALUES if value.source == source]
        published = {(value.corpus, METRIC_TITLES.get(value.metric, value.metric)): value for value in printed}
        known = [f"{published[column].value:.{digits}f}" if column in published else DASH for column in columns]
        if any(text != DASH for text in known):
            system = printed[0].system
            rows.append([system, *[DASH] * (num_stubs - 1), *known])
            notes.append(f"{system}: printed in {source}, not measured here; splits and protocol are its own.")
    if name == "empathy":
        notes += _scorer_notes(comparison)
    return Table(name, TITLES[name], header, num_stubs, rows, notes + _count_notes(cells))


def _scorer_notes(comparison: Comparison) -> list[str]:
    """Say how good the scorers are that gave the levels, and whether they are too weak."""
    scored = [run for runs in comparison.runs.values() for run in runs if "empathy scorers" in run.protocol]
    scorers = ("empathy scorers", "held-out empathy scorers")
    notes = []
    for run in {tuple(map(run.protocol.get, scorers)): run for run in scored}.values():
        notes += describe_quality(run.scorer_quality)
        notes += [f"Too weak to report: {weakness}." for weakness in find_weaknesses(run.scorer_quality)]
        if not run.scorer_quality:
            notes.append(f"How good the scorers of {run.name} are is not in its metrics.json: evaluate it again.")
    return notes + [note for runs in comparison.runs.values() for run in runs for note in _length_notes(run)]


def _length_notes(run: Run) -> Iterator[str]:
    """Say how long a run's replies are at each level, and how many the scorers read in part."""
    for name in MECHANISMS:
        found = summarize_levels(run.clips.values(), name) or {}
        if "share_cut" in found:
            means = " / ".join(DASH if mean is None else f"{mean:.0f}" for mean in found["mean_tokens_of_level"])
            tokens = f"{means} tokens a reply at level 0 / 1 / 2"
            yield f"{run.name}, {name}: {tokens}; {found['share_cut']:.1%} read in part only."


def _gain_table(comparison: Comparison, name: str) -> Table:
    gains = [gain for gain in comparison.gains if gain.metric.table == name]
    header = ["data", "metric", "system", "over", "gain", "95 % interval", "p", "p (Holm)", "n", "differ"]
    rows = []
    for gain in gains:
        value, interval = _shown_gain(gain)
        limits = DASH if interval is None else f"[{_signed(interval[0], name)}, {_signed(interval[1], name)}]"
        p_value, different = (gain.test.p_value, str(gain.test.num_different)) if gain.test else (None, DASH)
        numbers = [_signed(value, name), limits, _show_p(p_value), _show_p(gain.p_holm)]
        numbers += [str(gain.num_clips), different]
        rows.append([gain.corpus, _metric_title(gain.metric), gain.system, gain.baseline, *numbers])
    rows += _published_gains(comparison, name)
    notes = [f"Intervals: paired bootstrap, {comparison.settings['num_resamples']} resamples, expanded percentiles."]
    if tests := sum(gain.test is not None for gain in gains):
        notes.append(
            f"p: Wilcoxon's signed-rank test of the paired clips; Holm over the {tests} tests of this table. differ: "
            "clips on which the two differ."
        )
    if name == "replies":
        notes.append("Distinct-2 is of all replies at once: it has neither interval nor test.")
    if name == "recognition":
        notes.append("Macro-F1 is no mean over clips: it has an interval and no test.")
    if len(rows) > len(gains):
        notes.append(f"Rows marked published: printed in {SOURCE}, not measured here.")
    columns = [("", title) for title in header]
    return Table(f"{name}-gains", GAIN_TITLES[name], columns, 4, rows, notes + comparison.notes)


def _published_gains(comparison: Comparison, name: str) -> list[list[str]]:
    rows = []
    for gain in PUBLISHED_GAINS:
        table = "recognition" if gain.unit == "points" else "empathy"
        if table == name and gain.corpus in comparison.runs:
            over = "its baseline" if gain.baseline is None else SYSTEM_TITLES[gain.baseline]
            title = METRIC_TITLES.get(gain.metric, gain.metric)
            rows.append([gain.corpus, title, PUBLISHED, over, f"{gain.value:+g}".replace("-", "−"), *[DASH] * 5])
    return rows


def _forest_panels(comparison: Comparison, name: str) -> dict[tuple[str, str], list[ForestLine]]:
    """Return one line a pair of systems for each metric and corpus, and the published gain over the same system."""
    panels: dict[tuple[str, str], list[ForestLine]] = {}
    several = len({gain.baseline for gain in comparison.gains}) > 1
    for gain in comparison.gains:
        if gain.metric.table != name or gain.metric.name in ("wa", "macro_f1"):
            continue
        value, interval = _shown_gain(gain)
        scale = 100 if name == "recognition" else 1
        panels.setdefault((_metric_title(gain.metric), gain.corpus), []).append(
            ForestLine(
                label=f"{gain.system}\nover {gain.baseline}" if several else gain.system,
                value=None if value is None else scale * value,
                interval=None if interval is None else (scale * interval[0], scale * interval[1]),
                published=_published_beside(comparison, gain),
            )
        )
    return panels


def _published_beside(comparison: Comparison, gain: Gain) -> float | None:
    wanted = (gain.corpus, gain.metric.part, comparison.kinds[gain.baseline])
    if comparison.kinds[gain.system] != "re-llm" or gain.metric.table != "empathy":
        return None
    return next((one.value for one in PUBLISHED_GAINS if (one.corpus, one.metric, one.baseline) == wanted), None)


def _count_levels(comparison: Comparison, corpus: str) -> dict[str, dict[str, list[int]]]:
    """Count how many replies of each system have each level, of all its clips."""
    found: dict[str, dict[str, list[int]]] = {}
    for run in comparison.runs[corpus]:
        parts = {name: part for name in MECHANISMS if (part := summarize_levels(run.clips.values(), name))}
        if len(parts) == len(MECHANISMS):
            of_row = found.setdefault(comparison.rows[run.path], {name: [0] * LEVELS for name in MECHANISMS})
            for name, part in parts.items():
                of_row[name] = [sum(counts) for counts in zip(of_row[name], part["levels"], strict=True)]
    return {name: found[name] for name in comparison.systems if name in found}


def _shown_gain(gain: Gain) -> tuple[float | None, tuple[float, float] | None]:
    if gain.metric.table == "empathy":
        return gain.relative, gain.relative_interval
    return gain.difference, gain.difference_interval


def _column(metric: Metric) -> str:
    return METRIC_TITLES[metric.name] if metric.table == "recognition" else PART_TITLES.get(metric.part, metric.part)


def _row(metric: Metric) -> str:
    return metric.part if metric.table == "recognition" else ""


def _metric_title(metric: Metric) -> str:
    return f"{METRIC_TITLES[metric.name]}, {metric.part}" if metric.table == "recognition" else _column(metric)


def _group(corpus: str, cells: Mapping[tuple[str, str, Metric], Cell]) -> str:
    counts = {cell.num_clips for (of, _, _), cell in cells.items() if of == corpus}
    low, high = min(counts), max(counts)
    return f"{corpus} (n = {low})" if low == high else f"{corpus} (n = {low} to {high})"


def _count_notes(cells: Mapping[tuple[str, str, Metric], Cell]) -> list[str]:
    folds = sorted({corpus for (corpus, _, _), cell in cells.items() if cell.fold_mean is not None})
    notes = [f"{corpus}: 'folds pooled' counts the clips of all folds at once." for corpus in folds]
    runs = {(cell.corpus, cell.system): cell.num_runs for cell in cells.values() if cell.num_runs > 1}
    how = "intervals resample runs and clips, tests are of the clips' means over runs"
    for (corpus, system), count in runs.items():
        notes.append(f"{corpus}: {system} is the mean ± standard deviation of {count} runs; {how}.")
    return notes


def _show_cell(cell: Cell | None, *, fold_mean: bool = False) -> str:
    value = None if cell is None else cell.fold_mean if fold_mean else cell.value
    if cell is None or value is None:
        return DASH
    scale, form = (100, ".1f") if cell.metric.table == "recognition" else (1, ".3f")
    text = f"{scale * value:{form}}"
    if cell.deviation is not None and not fold_mean:
        text += f" ± {scale * cell.deviation:{form}}"
    return text.replace("-", "−")


def _signed(value: float | None, table: str) -> str:
    if value is None:
        return DASH
    text = {"empathy": f"{value:+.2f}", "recognition": f"{100 * value:+.1f}"}.get(table, f"{value:+.3f}")
    return text.replace("-", "−")


def _show_p(value: float | None) -> str:
    return DASH if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
