"""One run as a card shows it: a heading, what was asked, and tables in Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from .evidence import METRIC_NAMES, READINGS, describe_data, is_msp, round_number
from .licences import MSP_TOWER, Tower


def describe_run(run: Mapping, towers: Sequence[Tower]) -> dict[str, object]:
    """What the template needs of a run.

    Args:
        run (`Mapping`): From [`relllm.hub.evidence.read_run`].
        towers (`Sequence[Tower]`): Of the model.

    Returns:
        `dict`: `title`, `num_clips`, `num_speakers`, `num_failed`, `limit`, `dimension_sources`, `setting`,
        `not_clean`, `perhaps_not_clean` and `tables`.
    """
    emotion = next((tower for tower in towers if tower.part == "emotion_tower"), None)
    seen = emotion is not None and emotion.hub_id == MSP_TOWER
    recorded = emotion is None or emotion.hub_id is not None
    data, versions = run["data"], run.get("versions", {})
    used = ", ".join(f"{name} {versions[name]}" for name in ("relllm", "transformers", "torch") if name in versions)
    return {
        "title": describe_data(run),
        "num_clips": data["num_clips"],
        "num_speakers": data["num_speakers"] or "unknown",
        "num_failed": data["num_failed"],
        "limit": data.get("limit"),
        "dimension_sources": "; ".join(f"{source} ({count})" for source, count in data["dimension_sources"].items()),
        "setting": f"Seed {run.get('seed')}; {used}." if used else f"Seed {run.get('seed')}.",
        "not_clean": is_msp(run) and seen,
        "perhaps_not_clean": is_msp(run) and not recorded,
        "tables": [table for table in (_recognition(run), _dimensions(run), _empathy(run)) if table],
    }


def _recognition(run: Mapping) -> str:
    readings = run.get("recognition", {})
    rows = [
        [READINGS.get(reading, reading), *(scores.get(key) for key in METRIC_NAMES), scores.get("num_clips")]
        for reading, scores in readings.items()
    ]
    return _table(["emotion", *METRIC_NAMES.values(), "clips"], rows)


def _dimensions(run: Mapping) -> str:
    rows = [
        [name, scores.get("ccc"), scores.get("pearson"), scores.get("rmse"), scores.get("num_clips")]
        for name, scores in run.get("dimensions", {}).items()
        if isinstance(scores, Mapping)
    ]
    return _table(["dimension", "CCC", "Pearson", "RMSE", "clips"], rows)


def _empathy(run: Mapping) -> str:
    rows = [
        [name, scores.get("mean_level"), " / ".join(map(str, scores.get("levels", []))), scores.get("num_replies")]
        for name, scores in run.get("empathy", {}).items()
        if name in ("ER", "IP", "EX")
    ]
    return _table(["empathy", "mean level", "replies at 0 / 1 / 2", "replies"], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; empty where there are no rows."""
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines]) if lines else ""


def _cell(value: object) -> str:
    if isinstance(value, float):
        value = round_number(value)
        return "–" if value is None else f"{value:.3f}"
    return "–" if value is None else str(value)


__all__ = ["describe_run"]
