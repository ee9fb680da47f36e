"""Pictures of a run: the confusion matrix and the valence-arousal plane, as PNG files.

What lives here: drawing. What does not: metrics. matplotlib is imported on use, without pyplot: no display, no global
state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
