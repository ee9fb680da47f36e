"""Pictures are written, and what cannot be drawn is refused."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from relllm.metrics import calibration_metrics
from relllm.plots import (
    ForestLine,
    plot_confusion_matrix,
    plot_forest,
    plot_levels,
    plot_over_time,
    plot_reliability,
    plot_valence_arousal,
)


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    path = plot_confusion_matrix([[3, 0], [0, 0]], ["sad", "happy"], tmp_path / "new" / "matrix.png", title="UA")
    assert path == tmp_path / "new" / "matrix.png" and is_png(path)
    with pytest.raises(ValueError, match="Expected a 2 x 2 matrix"):
        plot_confusion_matrix([[1]], ["sad", "happy"], path)


def test_the_valence_arousal_plane_is_drawn(tmp_path: Path) -> None:
    path = plot_valence_arousal(
        [0.1, 0.9], [0.2, 0.8], [0.3, 1.4], [-0.2, 0.7], ["sad", "happy"], tmp_path / "plane.png"
    )
    assert is_png(path)
    with pytest.raises(ValueError, match="at least one clip"):
        plot_valence_arousal([], [], [], [], [], path)
    with pytest.raises(ValueError, match="same number of values"):
        plot_valence_arousal([0.1], [0.1, 0.2], [0.1], [0.1], ["sad"], path)


def test_reliability_levels_and_forest_are_drawn(tmp_path: Path) -> None:
    bins = calibration_metrics(["sad"], [{"sad": 0.7, "happy": 0.3}], ["sad", "happy"])["bins"]
    assert is_png(plot_reliability(bins, tmp_path / "reliability.png", title="ECE"))
    levels = {"RE-LLM": {"ER": [1, 2, 3]}, "none": {"ER": [3, 2, 1]}}
    assert is_png(plot_levels(levels, tmp_path / "levels.png"))
    line = ForestLine("RE-LLM", None, None, published=None)
    assert is_png(plot_forest({("ER", "esd"): [line]}, tmp_path / "forest.png"))
    with pytest.raises(ValueError, match="no reliability curve"):
        plot_reliability([{**one, "num_clips": 0} for one in bins], tmp_path / "x.png")  # type: ignore[typeddict-item]
    with pytest.raises(ValueError, match="same mechanisms and levels"):
        plot_levels({**levels, "other": {"EX": [1, 1, 1]}}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="no replies with a level of ER"):
        plot_levels({"RE-LLM": {"ER": [0, 0, 0]}}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="no gain to draw"):
        plot_forest({}, tmp_path / "x.png")


def test_a_long_title_is_written_within_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    line = ForestLine("RE-LLM", 1.0, (0.0, 2.0), None)
    plot_forest({("ER", "esd"): [line]}, tmp_path / "forest.png", title="a gain in points over another system " * 4)
    drawn[0].draw_without_rendering()
    title, picture = drawn[0].texts[0].get_window_extent(), drawn[0].bbox
    assert picture.x0 <= title.x0 and title.x1 <= picture.x1 and title.y1 <= picture.y1


def test_a_clip_over_time_is_drawn_and_takes_an_edge_more_than_windows(tmp_path: Path) -> None:
    probabilities = {"sad": [0.2, 0.9], "happy": [0.8, 0.1]}
    assert is_png(
        plot_over_time(
            [0.0, 2.0, 3.1], probabilities, {"arousal": [0.1, 1.2]}, tmp_path / "time.png", title="$1_{.wav"
        )
    )
    assert is_png(plot_over_time([0.0, 2.0, 3.1], {}, {}, tmp_path / "none.png"))
    with pytest.raises(ValueError, match="same number of values"):
        plot_over_time([0.0, 2.0], probabilities, {}, tmp_path / "x.png")
