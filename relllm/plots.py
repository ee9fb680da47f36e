"""Every picture of the package, as PNG files in one palette: of a run, of runs side by side, of a data set.

Each function writes one file, whose folder it makes, and returns its path. matplotlib is imported on use.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS
from .metrics import CalibrationBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which colour-blind readers can tell apart, and two more.
_GREY, _ORANGE, _BLUE = "#666666", "#D55E00", "#0072B2"
_COLOURS = (_GREY, "#E69F00", _ORANGE, _BLUE, "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#AA7744")
_FAINT, _INK = "#BBBBBB", "#222222"
_MAX_POINTS = 2000  # of an emotion: more would be a blot
_JITTER = 0.02  # ratings lie on a few values, and equal ones would hide each other


def check_matplotlib() -> None:
    """Raise `ImportError` before the work rather than after it, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install relllm[eval]`, or `relllm[data]`.") from error


def plot_over_time(
    edges_s: Sequence[float],
    probabilities: Mapping[str, Sequence[float]],
    dimensions: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    title: str = "",
) -> Path:
    """Draw what was heard in the windows of one clip, over its seconds: emotions as a stack, dimensions as lines.

    `edges_s` are where each window begins, and where the last one ends.
    """
    _check_lengths(edges_s[1:], *probabilities.values(), *dimensions.values())
    figure = _new_figure(min(9.0 + len(edges_s) / 40, 30.0), 5.2)
    panels = figure.subplots(2, 1, sharex=True)
    below = np.zeros(len(edges_s) - 1)
    for index, name in enumerate(_in_order(probabilities)):
        top = below + np.asarray(probabilities[name])
        panels[0].stairs(top, edges_s, baseline=below, fill=True, color=_colour(index), label=name)
        below = top
    for name, colour in zip(dimensions, (_ORANGE, _GREY, _BLUE), strict=False):
        panels[1].stairs(dimensions[name], edges_s, baseline=None, color=colour, linewidth=1.5, label=name)
    panels[0].set(ylabel="probability", ylim=(0, 1))
    panels[0].set_title(title, parse_math=False)  # a file may have any name
    panels[1].set(ylabel="dimension", xlabel="seconds", xlim=(edges_s[0], edges_s[-1]))
    for axes in (axes for axes, shown in zip(panels, (probabilities, dimensions), strict=True) if shown):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, path)


def plot_confusion_matrix(
    confusion_matrix: Sequence[Sequence[int]], class_names: Sequence[str], path: str | Path, *, title: str = ""
) -> Path:
    """Draw a confusion matrix, true class by row: colour and per cent by row (the diagonal is the recall), counts."""
    figure = _new_figure(2.8 + 0.85 * len(class_names), 2.2 + 0.85 * len(class_names))
    from sklearn.metrics import ConfusionMatrixDisplay

    counts, size = np.asarray(confusion_matrix), len(class_names)
    if counts.shape != (size, size):
        raise ValueError(f"Expected a {size} x {size} matrix for {list(class_names)}, got {counts.shape}.")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (true, predicted)
    axes = figure.add_subplot()
    display = ConfusionMatrixDisplay(shares, display_labels=class_names)
    display.plot(ax=axes, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 1})
    for place, text in np.ndenumerate(display.text_):
        text.set(text=f"{counts[place]}\n{shares[place]:.0%}", color="white" if shares[place] > 0.55 else _INK)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in np.arange(0.5, size - 1):  # white lines between the cells
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    bar = figure.colorbar(display.im_, ax=axes, fraction=0.046, pad=0.03, format="{x:.0%}")
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    return _save(figure, path)


def plot_reliability(bins: Sequence[CalibrationBin], path: str | Path, *, title: str = "") -> Path:
    """Draw a reliability curve: the accuracy of each bin of confidence, and below how many clips it has."""
    filled = [one for one in bins if one["num_clips"]]
    if not filled:
        raise ValueError("No bin has a clip: there is no reliability curve to draw.")
    centres = [(one["lower"] + one["upper"]) / 2 for one in filled]
    widths = [(one["upper"] - one["lower"]) * 0.92 for one in filled]
    confidences, accuracies = [one["confidence"] for one in filled], [one["accuracy"] for one in filled]
    figure = _new_figure(5.4, 6.2)
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1, label="perfectly calibrated")
    curve.bar(centres, accuracies, widths, color=_BLUE, alpha=0.35, linewidth=0, label="accuracy of the bin")
    curve.plot(confidences, accuracies, "o-", color=_BLUE, markersize=5, label="at its mean confidence")
    curve.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", title=title)
    curve.legend(loc="upper left", frameon=False)
    counts.bar(centres, [one["num_clips"] for one in filled], widths, color=_GREY, linewidth=0)
    counts.set(xlabel="confidence (highest probability)", ylabel="clips")
    return _save(figure, path)


def plot_valence_arousal(
    true_valence: Sequence[float],
    true_arousal: Sequence[float],
    predicted_valence: Sequence[float],
    predicted_arousal: Sequence[float],
    emotions: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
) -> Path:
    """Draw true and predicted points by true emotion, and arrows from the true mean of each to the predicted one."""
    _check_lengths(true_valence, true_arousal, predicted_valence, predicted_arousal, emotions)
    true = np.stack([true_valence, true_arousal], axis=1)  # (clips, 2)
    predicted = np.stack([predicted_valence, predicted_arousal], axis=1)
    members = {name: np.array(emotions) == name for name in dict.fromkeys(emotions)}
    figure = _new_figure(9.6, 6.0)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, shown, marker, what in zip(panels, (true, predicted), "o^", ("true", "predicted"), strict=True):
        for index, of_emotion in enumerate(members.values()):
            axes.scatter(*shown[of_emotion].T, s=22, marker=marker, color=_colour(index), alpha=0.55, linewidths=0)
            start, end = true[of_emotion].mean(axis=0), predicted[of_emotion].mean(axis=0)
            axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": _INK, "lw": 1.1}, zorder=3)
            _draw_mean(axes, start, _colour(index), "o")
            _draw_mean(axes, end, _colour(index), "^")
        _draw_plane(axes)
        axes.set(xlabel="valence", title=what)
    everything = np.concatenate([true, predicted])
    lowest, highest = np.minimum(0, everything.min(axis=0)) - 0.02, np.maximum(1, everything.max(axis=0)) + 0.02
    panels[0].set(ylabel="arousal", xlim=(lowest[0], highest[0]), ylim=(lowest[1], highest[1]))
    handles = [_marker("s", _colour(index), name) for index, name in enumerate(members)]
    handles += [_marker("o", "white", "mean, true", _INK), _marker("^", "white", "mean, predicted", _INK)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, columnspacing=1.2)
    figure.suptitle(title)
    return _save(figure, path)


def plot_levels(levels: Mapping[str, Mapping[str, Sequence[int]]], path: str | Path, *, title: str = "") -> Path:
    """Draw how many replies have each level of empathy (0, 1, 2, …), by system and mechanism (`"ER"`, …): a panel for
    each mechanism, a bar for each system.
    """
    shapes = {tuple((name, len(counts)) for name, counts in of_system.items()) for of_system in levels.values()}
    if len(shapes) != 1 or shapes == {()}:
        raise ValueError(f"Expected the same mechanisms and levels for every system, got {dict(levels)}.")
    for system, of_system in levels.items():
        if empty := [mechanism for mechanism, counts in of_system.items() if not sum(counts)]:
            raise ValueError(f"{system} has no replies with a level of {', '.join(empty)}.")
    mechanisms = [mechanism for mechanism, _ in shapes.pop()]
    figure = _new_figure(1.2 + (1.7 + 0.45 * len(levels)) * len(mechanisms), 4.0)
    panels = figure.subplots(1, len(mechanisms), sharey=True, squeeze=False)[0]
    for axes, mechanism in zip(panels, mechanisms, strict=True):
        shares = {system: np.array(one[mechanism]) / sum(one[mechanism]) for system, one in levels.items()}
        means = [float(one @ np.arange(len(one))) for one in shares.values()]
        mean = f", mean {means[0]:.2f}" if len(means) == 1 else ""
        _draw_bars(axes, shares, label="{:.0%}", size=7.5)
        axes.set(xlabel="level", title=mechanism + mean)
    panels[0].set(ylim=(0, 1.08), ylabel="share of the replies")
    panels[0].yaxis.set_major_formatter("{x:.0%}")
    if len(levels) > 1:
        _legend_below(figure, panels, min(len(levels), 4))
    figure.suptitle(title)
    return _save(figure, path)


def plot_scores(scores: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path, *, title: str = "") -> Path:
    """Draw how the scores of replies are spread: a panel for each reward, a line for all, the chosen, the rejected."""
    known = {name: {part: values for part, values in of.items() if values} for name, of in scores.items()}
    return _plot_histograms(known, Path(path), title, shares_of="replies")


@dataclass(frozen=True)
class ForestLine:
    """One line of a forest plot: what is compared, the gain, its interval, a published gain; `None` for none."""

    label: str
    value: float | None
    interval: tuple[float, float] | None
    published: float | None


def plot_forest(panels: Mapping[tuple[str, str], Sequence[ForestLine]], path: str | Path, *, title: str = "") -> Path:
    """Draw gains with their intervals: a row of panels for each metric, a column for each data set, which are the
    keys. Where not every one has a gain, those that have are drawn below each other.
    """
    if not panels:
        raise ValueError("There is no gain to draw.")
    metrics, corpora = (list(dict.fromkeys(key[index] for key in panels)) for index in (0, 1))
    is_grid = len(panels) == len(metrics) * len(corpora)
    rows = [[(metric, corpus) for corpus in corpora] for metric in metrics] if is_grid else [[key] for key in panels]
    every = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    labels = [every if len(keys) > 1 else [line.label for line in panels[keys[0]]] for keys in rows]
    heights = [0.55 + 0.48 * len(of_row) for of_row in labels]
    figure = _new_figure(3.0 + 2.9 * len(rows[0]), 1.3 + sum(heights))
    shared: dict[str, Any] = {"sharex": "row", "sharey": "row", "height_ratios": heights}
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, **shared)
    for (row, column), axes in np.ndenumerate(grid):
        _draw_forest(axes, panels[rows[row][column]], labels[row])
        axes.set_title(", ".join(rows[row][column]), fontsize=10, loc="left")
        axes.set_yticks(range(len(labels[row])), labels[row])
        axes.set_ylim(len(labels[row]) - 0.4, -0.6)
    if any(line.published is not None for lines in panels.values() for line in lines):
        measured = _marker("s", _BLUE, "measured, with its 95 % interval")
        measured.set(linestyle="-", linewidth=2.2, markersize=6)
        handles = [measured, _marker("D", "white", "published, RE-LLM", _ORANGE)]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return _save(figure, path)


class SplitNumbers(Protocol):
    """What [`plot_report`] draws of the rows of a split."""

    durations_s: list[float]
    emotions: Counter[str]  # rows by emotion
    dimensions: dict[str, list[float]]  # labels of the rows that have them
    points: list[tuple[float, float, str]]  # valence, arousal and emotion


def plot_report(summary: Mapping[str, SplitNumbers], folder: Path, *, title: str) -> list[Path]:
    """Draw class counts, durations, and where there are labels the three dimensions and the valence-arousal plane."""
    names = _in_order(name for split in summary.values() for name in split.emotions)
    figure = _new_figure(max(6.4, 0.9 * len(names) * max(1.0, 0.55 * len(summary))), 4.2)
    axes = figure.add_subplot()
    bars = {
        f"{split} ({len(known.durations_s):,})": np.array([known.emotions[name] for name in names])
        for split, known in summary.items()
    }
    _draw_bars(axes, bars, label="{:,.0f}", size=8)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="utterances", title=title)
    axes.margins(y=0.1)
    _legend_below(figure, [axes], 6)
    files = [_save(figure, folder / "class_counts.png")]
    durations = {"duration (s)": {name: split.durations_s for name, split in summary.items()}}
    files.append(_plot_histograms(durations, folder / "durations.png", title))
    values = {
        name: {split: known for split, of_split in summary.items() if (known := of_split.dimensions[name])}
        for name in DIMENSIONS
    }
    if any(values.values()):
        files.append(_plot_histograms(values, folder / "dimensions.png", title, limits=(0.0, 1.0)))
    if points := [point for split in summary.values() for point in split.points]:
        valence, arousal, emotions = zip(*points, strict=True)
        path = folder / "valence_arousal.png"
        files.append(plot_valence_arousal_labels(valence, arousal, emotions, path, title=title))
    return files


def plot_valence_arousal_labels(
    valence: Sequence[float], arousal: Sequence[float], emotions: Sequence[str], path: str | Path, *, title: str = ""
) -> Path:
    """Draw the labels of a data set, in [0, 1], on the valence-arousal plane: points, and the mean of each emotion.

    Of an emotion with many clips some are drawn, each moved a little; the means are of all, where they are.
    """
    _check_lengths(valence, arousal, emotions)
    points, of_clips = np.stack([valence, arousal], axis=1), np.array(emotions)  # (clips, 2)
    figure = _new_figure(7.8, 5.8)
    axes = figure.add_subplot()
    generator = np.random.default_rng(0)
    for index, name in enumerate(_in_order(emotions)):
        members, colour = points[of_clips == name], _colour(index)
        shown = members if len(members) <= _MAX_POINTS else generator.choice(members, _MAX_POINTS, replace=False)
        shown = shown + generator.uniform(-_JITTER, _JITTER, shown.shape)
        axes.scatter(shown[:, 0], shown[:, 1], s=10, color=colour, alpha=0.35, linewidths=0, zorder=2)
        _draw_mean(axes, members.mean(axis=0), colour, "o").set_label(f"{name} ({len(members):,})")
    _draw_plane(axes)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="valence", ylabel="arousal", title=title)
    meaning = f"large: mean (clips)\nsmall: up to {_MAX_POINTS:,} clips,\nmoved by up to {_JITTER}"
    figure.legend(loc="outside right center", frameon=False, title=meaning)
    return _save(figure, path)


def _plot_histograms(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    title: str,
    *,
    limits: tuple[float, float] | None = None,
    shares_of: str = "split",
) -> Path:
    """Draw one histogram for each quantity, as shares of the split, so that splits of any size can be compared."""
    from matplotlib.ticker import PercentFormatter

    figure = _new_figure(max(6.4, 3.9 * len(values)), 3.8)
    splits = list(dict.fromkeys(split for by_split in values.values() for split in by_split))
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (quantity, by_split) in zip(panels, values.items(), strict=True):
        if by_split:
            every = [value for known in by_split.values() for value in known]
            low, high = limits or (min(0.0, *every), max(0.0, *every) or 1.0)
            edges = np.linspace(low, high, 31 if limits is None else 26).tolist()
            for split, known in by_split.items():
                weights, colour = np.full(len(known), 1 / len(known)), _colour(splits.index(split) + 3)
                axes.hist(known, edges, weights=weights, histtype="step", linewidth=1.6, color=colour, label=split)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel=quantity)
    panels[0].set(ylabel=f"share of the {shares_of}")
    _legend_below(figure, panels, len(splits))
    figure.suptitle(title)
    return _save(figure, path)


def _check_lengths(*columns: Sequence) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"Expected the same number of values for every clip, and at least one clip; got {lengths}.")


def _in_order(emotions: Iterable[str]) -> list[str]:
    """Return each once: the package's names in their order, then others, such as "unlabelled"."""
    found = set(emotions)
    known = [name for name in (*EMOTIONS, *FURTHER_EMOTIONS) if name in found]
    return known + sorted(found - set(known))


def _draw_bars(axes: Axes, heights: Mapping[str, np.ndarray], *, label: str, size: float) -> None:
    """Groups of bars at 0, 1, 2, …, one bar in each for every series, with its height above."""
    width = 0.84 / len(heights)
    for index, (series, values) in enumerate(heights.items()):
        places = np.arange(len(values)) + (index - (len(heights) - 1) / 2) * width
        bars = axes.bar(places, values, width * 0.94, color=_colour(index + 3), label=series)
        axes.bar_label(bars, fmt=label, padding=2, fontsize=size)
    axes.set_xticks(range(len(values)))


def _draw_forest(axes: Axes, lines: Sequence[ForestLine], labels: Sequence[str]) -> None:
    axes.axvline(0, color="#999999", linewidth=1, zorder=0)
    for line in lines:
        at = labels.index(line.label)
        if line.interval is not None:
            axes.plot(line.interval, [at, at], color=_BLUE, linewidth=2.2, solid_capstyle="butt")
        if line.value is not None:
            axes.plot(line.value, at, "s", color=_BLUE, markersize=6)
        else:
            axes.text(0, at, " not defined", va="center", fontsize=8, color=_GREY)
        if line.published is not None:
            axes.plot(line.published, at, "D", markerfacecolor="white", markeredgecolor=_ORANGE, markersize=6)
    axes.grid(axis="x", color="#EEEEEE", zorder=-1)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.locator_params(axis="x", nbins=4)  # more would touch each other where values have three decimals
    axes.spines["left"].set_visible(False)


def _draw_mean(axes: Axes, mean: np.ndarray, colour: str, marker: str) -> PathCollection:
    x, y = mean
    return axes.scatter(x, y, s=120, marker=marker, color=colour, edgecolors=_INK, linewidths=1.3, zorder=4)


def _draw_plane(axes: Axes) -> None:
    axes.axhline(0.5, color=_FAINT, linewidth=0.8, zorder=0)
    axes.axvline(0.5, color=_FAINT, linewidth=0.8, zorder=0)
    axes.set_box_aspect(1)


def _marker(shape: str, colour: str, label: str, edge: str | None = None) -> Line2D:
    from matplotlib.lines import Line2D

    line = Line2D([], [], linestyle="", marker=shape, markersize=8, color=colour, label=label)
    line.set_markeredgecolor(edge or colour)
    return line


def _legend_below(figure: Figure, panels: Sequence[Axes], num_columns: int) -> None:
    """Write each label of the panels once."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found, loc="outside lower center", ncols=num_columns, frameon=False)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _new_figure(width_inches: float, height_inches: float) -> Figure:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=150)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if title := figure.get_suptitle():  # nine characters of its size are an inch
        figure.suptitle(textwrap.fill(title, int(9 * figure.get_figwidth())))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", facecolor="white")
    return path
