"""Pictures of a run (confusion matrix, valence-arousal plane, reliability curve, levels of empathy) and of several
runs (forest plot), as PNG files.

What lives here: drawing. What does not: metrics. matplotlib is imported on use, without pyplot: no display, no global
state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relllm.metrics import CalibrationBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DPI = 150
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#666666", "#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")


def plot_confusion_matrix(
    confusion_matrix: Sequence[Sequence[int]], class_names: Sequence[str], path: str | Path, *, title: str = ""
) -> Path:
    """Draws a confusion matrix: colour and per cent by row (so the diagonal is the recall), with the counts.

    Args:
        confusion_matrix (`Sequence[Sequence[int]]` of shape `(classes, classes)`): Clips, true class by row.
        class_names (`Sequence[str]`): Names of the classes, in that order.
        path (`str` or `Path`): The PNG file to write; its folder is made.
        title (`str`, *optional*): Drawn above.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: The matrix is not square, or has another number of classes than names.
        ImportError: matplotlib is missing (`pip install relllm[eval]`).
    """
    counts = np.asarray(confusion_matrix)
    num_classes = len(class_names)
    if counts.shape != (num_classes, num_classes):
        raise ValueError(
            f"Expected a {num_classes} x {num_classes} matrix for {list(class_names)}, got {counts.shape}."
        )
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (true, predicted)
    size_inches = 2.2 + 0.85 * num_classes
    figure = _new_figure(size_inches + 0.6, size_inches)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true, predicted in np.ndindex(counts.shape):
        share = shares[true, predicted]
        colour = "white" if share > 0.55 else "#222222"
        axes.text(
            predicted, true - 0.02, f"{counts[true, predicted]}", ha="center", va="bottom", fontsize=12, color=colour
        )
        axes.text(predicted, true + 0.06, f"{share:.0%}", ha="center", va="top", fontsize=8.5, color=colour)
    axes.set_xticks(range(num_classes), class_names)
    axes.set_yticks(range(num_classes), class_names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in np.arange(0.5, num_classes - 1):  # white lines between the cells
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, format=lambda share, _: f"{share:.0%}")
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
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
    """Draws the valence-arousal plane: true and predicted points of each clip, coloured by true emotion.

    Args:
        true_valence (`Sequence[float]`): One value a clip, in [0, 1].
        true_arousal (`Sequence[float]`): One value a clip, in [0, 1].
        predicted_valence (`Sequence[float]`): One value a clip.
        predicted_arousal (`Sequence[float]`): One value a clip.
        emotions (`Sequence[str]`): The true emotion of each clip.
        path (`str` or `Path`): The PNG file to write; its folder is made.
        title (`str`, *optional*): Drawn above.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: Different lengths, or no clips.
        ImportError: matplotlib is missing (`pip install relllm[eval]`).
    """
    lengths = {len(values) for values in (true_valence, true_arousal, predicted_valence, predicted_arousal, emotions)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"Expected the same number of values for every clip, and at least one clip; got {sorted(lengths)}."
        )
    true = np.stack([true_valence, true_arousal], axis=1)  # (clips, 2)
    predicted = np.stack([predicted_valence, predicted_arousal], axis=1)
    names = list(dict.fromkeys(emotions))
    figure = _new_figure(9.6, 6.0)
    axes_of = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, shown, heading in zip(axes_of, (true, predicted), ("true", "predicted"), strict=True):
        _draw_plane(axes, shown, true, predicted, np.array(emotions), names, marker="o" if shown is true else "^")
        axes.set(xlabel="valence", title=heading)
    everything = np.concatenate([true, predicted])
    lowest, highest = np.minimum(0, everything.min(axis=0)) - 0.02, np.maximum(1, everything.max(axis=0)) + 0.02
    axes_of[0].set(xlim=(lowest[0], highest[0]), ylim=(lowest[1], highest[1]), ylabel="arousal")
    _add_legend(figure, names)
    if title:
        figure.suptitle(title)
    return _save(figure, path)


def plot_reliability(bins: Sequence[CalibrationBin], path: str | Path, *, title: str = "") -> Path:
    """Draws a reliability curve: the accuracy of each bin of confidence, and below how many clips it has.

    Args:
        bins (`Sequence[CalibrationBin]`): `CalibrationMetrics["bins"]`.
        path (`str` or `Path`): The PNG file to write; its folder is made.
        title (`str`, *optional*): Drawn above.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No bin has a clip.
        ImportError: matplotlib is missing (`pip install relllm[eval]`).
    """
    filled = [one for one in bins if one["num_clips"]]
    if not filled:
        raise ValueError("No bin has a clip: there is no reliability curve to draw.")
    centres = [(one["lower"] + one["upper"]) / 2 for one in filled]
    widths = [(one["upper"] - one["lower"]) * 0.92 for one in filled]
    confidences, accuracies = [one["confidence"] for one in filled], [one["accuracy"] for one in filled]
    figure = _new_figure(5.4, 6.2)
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1, label="perfectly calibrated")
    curve.bar(centres, accuracies, widths, color="#0072B2", alpha=0.35, linewidth=0, label="accuracy of the bin")
    curve.plot(confidences, accuracies, "o-", color="#0072B2", markersize=5, label="at its mean confidence")
    curve.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", title=title)
    curve.legend(loc="upper left", frameon=False)
    counts.bar(centres, [one["num_clips"] for one in filled], widths, color="#666666", linewidth=0)
    counts.set(xlabel="confidence (highest probability)", ylabel="clips")
    for axes in (curve, counts):
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def plot_levels(levels: Mapping[str, Mapping[str, Sequence[int]]], path: str | Path, *, title: str = "") -> Path:
    """Draws how many replies have each level of empathy: a panel for each mechanism, a bar for each system.

    Args:
        levels (`Mapping[str, Mapping[str, Sequence[int]]]`): For each system, for each mechanism (`"ER"`, `"IP"`,
            `"EX"`), how many replies have level 0, 1, 2, …; the same mechanisms for all.
        path (`str` or `Path`): The PNG file to write; its folder is made.
        title (`str`, *optional*): Drawn above.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No system, other mechanisms or levels in one than in another, or no replies.
        ImportError: matplotlib is missing (`pip install relllm[eval]`).
    """
    shapes = {tuple((name, len(counts)) for name, counts in of_system.items()) for of_system in levels.values()}
    if len(shapes) != 1 or shapes == {()}:
        raise ValueError(f"Expected the same mechanisms and levels for every system, got {dict(levels)}.")
    for system, of_system in levels.items():
        for mechanism, counts in of_system.items():
            if not sum(counts):
                raise ValueError(f"{system} has no replies with a level of {mechanism}.")
    mechanisms = list(next(iter(levels.values())))
    figure = _new_figure(1.2 + (1.7 + 0.45 * len(levels)) * len(mechanisms), 4.0)
    panels = figure.subplots(1, len(mechanisms), sharey=True, squeeze=False)[0]
    width = 0.84 / len(levels)
    for axes, mechanism in zip(panels, mechanisms, strict=True):
        for index, (system, of_system) in enumerate(levels.items()):
            counts = of_system[mechanism]
            shares, offset = np.array(counts) / sum(counts), (index - (len(levels) - 1) / 2) * width
            bars = axes.bar(
                np.arange(len(counts)) + offset,
                shares,
                width * 0.94,
                color=_COLOURS[(index + 3) % len(_COLOURS)],
                label=system,
            )
            axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=2, fontsize=7.5)
        axes.set_xticks(range(len(counts)))
        mean = "" if len(levels) > 1 else f", mean {np.average(range(len(counts)), weights=counts):.2f}"
        axes.set(xlabel="level", title=mechanism + mean)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylim=(0, 1.08), ylabel="share of the replies")
    panels[0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    if len(levels) > 1:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(levels), 4), frameon=False)
    if title:
        figure.suptitle(title)
    return _save(figure, path)


@dataclass(frozen=True)
class ForestLine:
    """One line of a forest plot.

    Attributes:
        label (`str`): What is compared. value (`float` or `None`): The gain; `None` where it is not defined.
        interval (`tuple[float, float]` or `None`): Its interval. published (`float` or `None`): A published gain.
    """

    label: str
    value: float | None
    interval: tuple[float, float] | None
    published: float | None


def plot_forest(panels: Mapping[tuple[str, str], Sequence[ForestLine]], path: str | Path, *, title: str = "") -> Path:
    """Draws gains with their intervals: a row of panels for each metric, a column for each data set.

    Args:
        panels (`Mapping[tuple[str, str], Sequence[ForestLine]]`): By metric and data set.
        path (`str` or `Path`): The PNG file to write; its folder is made.
        title (`str`, *optional*): Drawn above; says what the axes are.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: No panels.
        ImportError: matplotlib is missing (`pip install relllm[eval]`).
    """
    if not panels:
        raise ValueError("There is no gain to draw.")
    metrics, corpora = (list(dict.fromkeys(key[index] for key in panels)) for index in (0, 1))
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    figure = _new_figure(3.0 + 2.9 * len(corpora), 1.3 + len(metrics) * (0.55 + 0.48 * len(labels)))
    grid = figure.subplots(len(metrics), len(corpora), sharex="row", sharey=True, squeeze=False)
    for row, metric in enumerate(metrics):
        for column, corpus in enumerate(corpora):
            axes = grid[row, column]
            _draw_forest(axes, panels.get((metric, corpus), ()), labels)
            axes.set_title(f"{metric}, {corpus}", fontsize=10, loc="left")
    grid[0, 0].set_yticks(range(len(labels)), labels)
    grid[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    if any(line.published is not None for lines in panels.values() for line in lines):
        _add_forest_legend(figure)
    if title:
        figure.suptitle(title)
    return _save(figure, path)


def _draw_forest(axes: Axes, lines: Sequence[ForestLine], labels: Sequence[str]) -> None:
    axes.axvline(0, color="#999999", linewidth=1, zorder=0)
    for line in lines:
        at = labels.index(line.label)
        if line.interval is not None:
            axes.plot(line.interval, [at, at], color="#0072B2", linewidth=2.2, solid_capstyle="butt")
        if line.value is not None:
            axes.plot(line.value, at, "s", color="#0072B2", markersize=6)
        else:
            axes.text(0, at, " not defined", va="center", fontsize=8, color="#666666")
        if line.published is not None:
            axes.plot(line.published, at, "D", markerfacecolor="white", markeredgecolor="#D55E00", markersize=6)
    if not lines:
        axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center", va="center", color="#666666")
    axes.grid(axis="x", color="#EEEEEE", zorder=-1)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.locator_params(axis="x", nbins=4)  # more would touch each other where values have three decimals
    axes.spines[["top", "right", "left"]].set_visible(False)


def _add_forest_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="#0072B2", marker="s", linewidth=2.2, label="measured, with its 95 % interval"),
        Line2D([], [], linestyle="", marker="D", color="white", markeredgecolor="#D55E00", label="published, RE-LLM"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)


def _draw_plane(
    axes: Axes,
    shown: np.ndarray,
    true: np.ndarray,
    predicted: np.ndarray,
    emotions: np.ndarray,
    names: Sequence[str],
    *,
    marker: str,
) -> None:
    """The points `shown` (clips, 2), and for each emotion an arrow from the true mean to the predicted one."""
    axes.axhline(0.5, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.axvline(0.5, color="#BBBBBB", linewidth=0.8, zorder=0)
    for index, name in enumerate(names):
        colour, members = _COLOURS[index % len(_COLOURS)], emotions == name
        axes.scatter(shown[members, 0], shown[members, 1], s=22, marker=marker, color=colour, alpha=0.55, linewidths=0)
        start, end = true[members].mean(axis=0), predicted[members].mean(axis=0)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#222222", "lw": 1.1}, zorder=3)
        for mean, mean_marker in ((start, "o"), (end, "^")):
            axes.scatter(
                mean[0],
                mean[1],
                s=110,
                marker=mean_marker,
                color=colour,
                edgecolors="#222222",
                linewidths=1.2,
                zorder=4,
            )
    axes.set_box_aspect(1)
    axes.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="s", markersize=8, color=_COLOURS[index % len(_COLOURS)], label=name)
        for index, name in enumerate(names)
    ]
    for marker, label in (("o", "mean, true"), ("^", "mean, predicted")):
        outline = Line2D([], [], linestyle="", marker=marker, markersize=9, color="white", markeredgecolor="#222222")
        outline.set_label(label)
        handles.append(outline)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, columnspacing=1.2)


def _new_figure(width_inches: float, height_inches: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install relllm[eval]`.") from error
    return Figure(figsize=(width_inches, height_inches), layout="constrained", dpi=_DPI)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", facecolor="white")
    return path
