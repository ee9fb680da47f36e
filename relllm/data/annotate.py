"""Arousal, dominance and valence where a corpus has none, read by an emotion tower (the paper's ESD).

A model's reading is no label: every row says in `dimension_source` where its three numbers come from.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, Value
from rich.table import Table
from tqdm import tqdm
from transformers import Wav2Vec2FeatureExtractor

from relllm.labels import DIMENSIONS
from relllm.modeling.audio_tower_relllm import count_frames
from relllm.modeling.emotion_tower_relllm import ReLLMEmotionModel
from relllm.processing.audio_relllm import AudioSource
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor, shortest_clip
from relllm.setting import pick_device

from .data_settings import AnnotateSettings, AnnotationSettings
from .journal import Journal, check_columns, check_out, make_file, replace_columns, rows_fingerprint, write_rows
from .loading import load_corpus
from .rows import LABEL_SOURCE

DIGITS = 6  # of a reading; more would differ between machines
MARGIN = 0.5  # beyond [0, 1] by more than this is no reading of the scale
TYPES = {**{name: Value("float64") for name in DIMENSIONS}, "dimension_source": Value("string")}


def annotate_rows(
    rows: Dataset,
    out: Path,
    load_tower: Callable[[], ReLLMEmotionModel],
    settings: AnnotationSettings,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> dict:
    """Fill in arousal, dominance and valence of the rows that have none of the three; go on where it was killed.

    The output has every row of the input, in its order, and says in `dimension_source` `"label"` where the corpus had
    numbers, `"pseudo:<model>"` where the tower read them, `None` where there are none. A row with one or two of the
    three keeps what it has, because it names one source. A reading beyond [0, 1] by up to 0.5 is clipped; a row with
    one further off, as a tower of another scale would give, and one whose audio cannot be read are left without.

    `rows` have `id` and undecoded `audio`; `load_tower` is called once, if it is needed, after everything else is
    checked. Errors are those of [`make_file`]. The report has `settings`, `rows`, `read`, `kept` (source -> count),
    `partly_labelled`, `clipped` and `not_read` (with ids and values or reasons).
    """
    check_columns(rows, {"id", "audio"})
    check_out(rows, out)
    blank = dict.fromkeys(TYPES)
    labels = [blank | row for row in rows.remove_columns("audio").to_list()]
    todo = [index for index, row in enumerate(labels) if settings.overwrite or not _values(row)]

    def fill(journal: Journal) -> None:
        ids = rows["id"]
        if not all(ids[index] in journal.done for index in todo):
            _read(load_tower(), rows, todo, journal, batch_size, progress)

    def finish(found: Mapping[str, dict]) -> tuple[dict, Callable[[Path], None]]:
        annotated = [_annotate(row, found.get(row["id"], {}), settings) for row in labels]
        columns = {name: [row[name] for row in annotated] for name in TYPES}
        report = {"rows": len(rows), **_report(labels, annotated, found)}
        return report, partial(write_rows, replace_columns(rows, columns, TYPES))

    run = {"task": "annotate", **settings.identity, "data": rows_fingerprint(rows, ("id", *DIMENSIONS))}
    return make_file(out, run, fill, finish)


def read_dimensions(model: ReLLMEmotionModel, clips: Sequence[AudioSource]) -> list[list[float | None] | str]:
    """Return arousal, dominance and valence of each clip, or why it cannot be read.

    A dimension that the tower was not trained to is `None`; a tower that was taught by categories is a `ValueError`. A
    clip is normalised as in RE-LLM; one longer than 30 s is cut into windows, averaged by their frames.
    """
    if emotions := model.config.emotion_labels:
        raise ValueError(f"The emotion tower was taught by categories ({', '.join(emotions)}): it reads no dimension.")
    cutter = ReLLMFeatureExtractor(min_duration_s=shortest_clip(model.config.encoder_config))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    results: list[list[float | None] | str] = []
    windows, owners = [], []
    for clip in clips:
        try:
            cut = cutter.cut_windows(cutter.read_clip(clip))
        except (OSError, ValueError, TypeError) as error:
            results.append(f"{error}")
            continue
        windows += cut
        owners += [len(results)] * len(cut)
        results.append([])
    if not windows:
        return results
    batch = extractor(windows, sampling_rate=cutter.sampling_rate, padding=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        dimensions = model(batch["input_values"].to(model.dtype), batch["attention_mask"]).dimensions
    frames = count_frames(model.config.encoder_config, batch["attention_mask"].sum(-1)).double()
    trained = model.config.trained_dimensions or DIMENSIONS
    owner = torch.tensor(owners, device=model.device)
    for index in sorted(set(owners)):
        share = torch.where(owner == index, frames, 0)
        values = (share / share.sum()) @ dimensions.double()
        pairs = zip(DIMENSIONS, values.tolist(), strict=True)
        results[index] = [round(value, DIGITS) if name in trained else None for name, value in pairs]
    return results


def run_annotate(settings: AnnotateSettings) -> dict:
    """Do what `relllm annotate` does, and return the report of [`annotate_rows`]."""
    rows = load_corpus(settings.data, settings.split or "all")

    def load() -> ReLLMEmotionModel:
        model = ReLLMEmotionModel.from_pretrained(settings.emotion_model, revision=settings.revision)
        assert isinstance(model, ReLLMEmotionModel)  # with `output_loading_info` it would be a pair
        return model.to(pick_device(settings.device)).eval()

    return annotate_rows(rows, settings.out, load, settings, batch_size=settings.batch_size)


def annotation_table(report: Mapping) -> Table:
    """Return the counts of a report of [`annotate_rows`], for the terminal."""
    table = Table("", "rows", title=f"Dimensions read by {report['settings']['emotion_model']}", title_justify="left")
    partly, clipped, unread = report["partly_labelled"], report["clipped"], report["not_read"]
    kept = {f"kept: {source}": count for source, count in report["kept"].items()}
    counts = {"in the data": report["rows"], "read": report["read"], **kept}
    counts |= {"left with one or two of the three": partly["count"], "clipped to [0, 1]": clipped["count"]}
    for name, count in (counts | {"not read": unread["count"]}).items():
        table.add_row(name, str(count))
    for row_id, reason in list(unread["reasons"].items())[:3]:
        table.add_row(f"  {row_id}", f"{reason:.100}")
    return table


def _read(
    model: ReLLMEmotionModel, rows: Dataset, todo: Sequence[int], journal: Journal, batch_size: int, progress: bool
) -> None:
    """Fill the journal. Batches are planned over all rows, so that a resumed run reads the same ones."""
    with tqdm(total=len(todo), desc="Reading emotion", unit="clip", disable=not progress) as bar:
        for start in range(0, len(todo), batch_size):
            batch = rows.select(todo[start : start + batch_size])
            bar.update(len(batch))
            if all(row_id in journal.done for row_id in batch["id"]):
                continue
            entries = []
            for row_id, result in zip(batch["id"], read_dimensions(model, list(batch["audio"])), strict=True):
                reason = result if isinstance(result, str) else _off_scale(result)
                entries.append({"id": row_id, **({"reason": reason} if reason else {"values": result})})
            journal.append(entries)


def _off_scale(values: Sequence[float | None]) -> str | None:
    given = [value for value in values if value is not None]
    if all(math.isfinite(value) and -MARGIN <= value <= 1 + MARGIN for value in given):
        return None
    return f"The tower gives {[float(f'{value:.3g}') for value in given]}, which is not on the scale [0, 1]."


def _annotate(row: Mapping, entry: Mapping, settings: AnnotationSettings) -> dict:
    """Return the three numbers of one row and their source."""
    if "values" in entry:
        clipped = (None if value is None else min(max(value, 0.0), 1.0) for value in entry["values"])
        return {**dict(zip(DIMENSIONS, clipped, strict=True)), "dimension_source": settings.source}
    source = (row["dimension_source"] or LABEL_SOURCE) if _values(row) else None
    return {**{name: row[name] for name in DIMENSIONS}, "dimension_source": source}


def _values(row: Mapping) -> list[float]:
    return [row[name] for name in DIMENSIONS if row[name] is not None]


def _report(labels: Sequence[Mapping], annotated: Sequence[Mapping], found: Mapping[str, dict]) -> dict:
    entries = {row["id"]: found[row["id"]] for row in labels if row["id"] in found}
    readings = {row_id: entry["values"] for row_id, entry in entries.items() if "values" in entry}
    off = (
        row_id for row_id, values in readings.items() if any(not 0 <= one <= 1 for one in values if one is not None)
    )
    clipped = {row_id: readings[row_id] for row_id in off}
    reasons = {row_id: entry["reason"] for row_id, entry in entries.items() if "reason" in entry}
    pairs = zip(labels, annotated, strict=True)
    kept = [(row, one) for row, one in pairs if _values(row) and row["id"] not in readings]
    partly = [row["id"] for row, _ in kept if len(_values(row)) < len(DIMENSIONS)]
    return {
        "read": len(readings),
        "kept": dict(Counter(one["dimension_source"] for _, one in kept)),
        "partly_labelled": {"count": len(partly), "ids": partly},
        "clipped": {"count": len(clipped), "raw_values": clipped},
        "not_read": {"count": len(reasons), "reasons": reasons},
    }
