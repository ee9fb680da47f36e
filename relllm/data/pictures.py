"""Pictures of a data set, as PNG files: classes, durations, dimensions, labels on the valence-arousal plane.

What lives here: drawing. What does not: counting and checking. matplotlib is imported on use, without pyplot: no
display, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relllm.labels import DIMENSIONS, EMOTIONS, FURTHER_EMOTIONS

from .report import SplitSummary, order_emotions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
# Okabe and Ito's colours, which colour-blind readers can tell apart; as in the plots of a run.
_COLOURS = (
    "#666666",
    "#E69F00",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
    "#AA7744",
)
_MAX_POINTS = 2000  # of an emotion: more would be a blot
_JITTER = 0.02  # ratings lie on a few values, and equal ones would hide each other


def plot_valence_arousal_labels(
    valence: Sequence[float],
    arousal: Sequence[float],
    emotions: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
) -> Path:
    """Draws the labels of a data set on the valence-arousal plane: points, and the mean of each emotion.

    Of an emotion with many clips some are drawn, each moved a little; the means are of all, where they are.

    Args:
        valence (`Sequence[float]`): One value a clip, in [0, 1].
        arousal (`Sequence[float]`): One value a clip, in [0, 1].
        emotions (`Sequence[str]`): Canonical names, or another word for what has none.
        path (`str` or `Path`): The PNG file to write; its folder is made.
        title (`str`, *optional*): Drawn above.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: Different lengths, or no clips.
        ImportError: matplotlib is missing (`pip install relllm[data]`).
    """
    if len({len(valence), len(arousal), len(emotions)}) != 1 or not emotions:
        raise ValueError(
            f"Expected the same number of values for every clip, and at least one clip; got {len(valence)}, "
            f"{len(arousal)} and {len(emotions)}."
        )
    order = [name for name in EMOTIONS + FURTHER_EMOTIONS if name in emotions]
    order += sorted(set(emotions) - set(order))
    points, members = np.stack([valence, arousal], axis=1), np.array(emotions)  # (clips, 2)
    figure = _new_figure(7.8, 5.8)
    axes = figure.add_subplot()
    for index, name in enumerate(order):
        _draw_emotion(axes, points[members == name], name, _COLOURS[index % len(_COLOURS)])
    axes.axhline(0.5, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.axvline(0.5, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="valence", ylabel="arousal", title=title)
    axes.set_box_aspect(1)
    axes.spines[["top", "right"]].set_visible(False)
    meaning = f"large: mean (clips)\nsmall: up to {_MAX_POINTS:,} clips,\nmoved by up to {_JITTER}"
    figure.legend(loc="outside right center", frameon=False, title=meaning)
    return _save(figure, path)


def plot_report(summary: Mapping[str, SplitSummary], folder: Path, *, title: str) -> list[Path]:
    """Draws what a report says: class counts, durations, and where there are labels the three dimensions.

    Args:
        summary (`Mapping[str, SplitSummary]`): By split, as [`~relllm.data.report.summarise_shards`] gives it.
        folder (`Path`): Where the files go.
        title (`str`): Drawn above each.

    Returns:
        `list[Path]`: The files.

    Raises:
        ImportError: matplotlib is missing (`pip install relllm[data]`).
    """
    files = [
        _plot_class_counts(summary, folder / "class_counts.png", title),
        _plot_histograms(
            {"duration (s)": {name: split.durations_s for name, split in summary.items()}},
            folder / "durations.png",
            title,
        ),
    ]
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


def check_matplotlib() -> None:
    """Raises `ImportError` before the work rather than after it, if matplotlib is missing."""
    _new_figure(1, 1)


def _plot_class_counts(summary: Mapping[str, SplitSummary], path: Path, title: str) -> Path:
    """Bars for each emotion, one a split, with the counts above."""
    names = order_emotions([name for split in summary.values() for name in split.emotions])
    width = 0.8 / len(summary)
    figure = _new_figure(max(6.4, 0.9 * len(names) * max(1.0, 0.55 * len(summary))), 4.2)
    axes = figure.add_subplot()
    for index, (split, known) in enumerate(summary.items()):
        places = np.arange(len(names)) + (index - (len(summary) - 1) / 2) * width
        bars = axes.bar(places, [known.emotions[name] for name in names], 0.92 * width, color=_colour(index + 3))
        bars.set_label(f"{split} ({len(known.durations_s):,})")
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8, padding=1)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="utterances", title=title)
    axes.margins(y=0.1)
    return _finish(figure, axes, path)


def _plot_histograms(
    values: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    title: str,
    *,
    limits: tuple[float, float] | None = None,
) -> Path:
    """One histogram for each quantity, as shares of the split, so that splits of any size can be compared."""
    figure = _new_figure(max(6.4, 3.9 * len(values)), 3.8)
    splits = list(dict.fromkeys(split for by_split in values.values() for split in by_split))
    for number, (quantity, by_split) in enumerate(values.items(), start=1):
        axes = figure.add_subplot(1, len(values), number)
        if by_split:
            low, high = limits or (0.0, max(max(known) for known in by_split.values()))
            edges = np.linspace(low, high, 31 if limits is None else 26).tolist()
            for split, known in by_split.items():
                weights = np.full(len(known), 1 / len(known))
                colour = _colour(splits.index(split) + 3)
                axes.hist(known, edges, weights=weights, histtype="step", linewidth=1.6, color=colour, label=split)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        axes.set(xlabel=quantity, ylabel="share of the split" if number == 1 else "")
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    return _save(figure, path)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _finish(figure: Figure, axes: Axes, path: Path) -> Path:
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return _save(figure, path)


def _new_figure(width_inches: float, height_inches: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install relllm[data]`.") from error
    return Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=_DPI)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path


def _draw_emotion(axes: Axes, points: np.ndarray, name: str, colour: str) -> None:
    """Points (clips, 2), at most `_MAX_POINTS` of them, and their mean over all clips."""
    generator = np.random.default_rng(0)
    shown = points if len(points) <= _MAX_POINTS else generator.choice(points, _MAX_POINTS, replace=False)
    shown = shown + generator.uniform(-_JITTER, _JITTER, shown.shape)
    axes.scatter(shown[:, 0], shown[:, 1], s=10, color=colour, alpha=0.35, linewidths=0, zorder=2)
    valence, arousal = points.mean(axis=0)
    label = f"{name} ({len(points):,})"
    axes.scatter(valence, arousal, s=130, color=colour, edgecolors="black", linewidths=1.4, zorder=4, label=label)
