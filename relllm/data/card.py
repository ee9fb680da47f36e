"""The data card, `README.md` of a data set: counts, and never a transcript, an utterance's name or a path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from relllm.labels import DIMENSIONS

from .report import UNLABELLED, order_emotions
from .rows import CorpusFacts

TEMPLATE = Path(__file__).with_suffix(".md")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_PUBLIC_SETTINGS = (
    *("label_set", "merge_excited", "improvised_only", "held_out_session", "validation_session", "splits", "language"),
    *("emotions", "unknown_emotions", "scale", "embed_audio", "channel", "min_seconds", "max_seconds"),
)


def write_card(facts: CorpusFacts, report: Mapping, path: Path) -> None:
    """Write the card of a data set from its `report.json`."""
    from huggingface_hub import DatasetCard, DatasetCardData

    splits = report["splits"]
    is_other = facts.licence == "other"  # the Hub wants a name and a link beside it
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    data = DatasetCardData(
        pretty_name=facts.title,
        license=facts.licence,
        license_name=facts.licence_name if is_other else None,
        license_link=(facts.homepage or "README.md") if is_other else None,
        language=[facts.language] if facts.language else None,
        task_categories=["audio-classification"],
        tags=["speech-emotion-recognition", "relllm"],
        size_categories=[next((name for limit, name in _SIZES if report["rows"]["kept"] < limit), "n>1M")],
        configs=[{"config_name": "default", "data_files": files}],
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(TEMPLATE),
        facts=facts,
        report=report,
        emotions=order_emotions([name for split in splits.values() for name in split["emotions"]]),
        dimensions=DIMENSIONS,
        unlabelled=UNLABELLED,
        made={
            name: json.dumps(report["settings"][name], ensure_ascii=False)
            for name in _PUBLIC_SETTINGS
            if name in report["settings"]
        },
        hours=_hours,
    )
    path.write_text(str(card), encoding="utf-8")


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
