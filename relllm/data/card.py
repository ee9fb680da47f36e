"""The data card, `README.md` of a data set: counts, and never a transcript, an utterance's name or a path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from relllm.labels import DIMENSIONS

from .report import UNLABELLED, order_emotions
from .rows import CorpusFacts

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_PUBLIC_SETTINGS = (
    *("label_set", "merge_excited", "improvised_only", "held_out_session", "validation_session", "splits", "language"),
    *("emotions", "unknown_emotions", "scale", "embed_audio", "channel", "min_seconds", "max_seconds"),
)


def write_card(facts: CorpusFacts, report: Mapping, path: Path) -> None:
    """Write the card of a data set from its `report.json`."""
    path.write_text(_front_matter(facts, report) + _body(facts, report), encoding="utf-8")


def _front_matter(facts: CorpusFacts, report: Mapping) -> str:
    """YAML; its strings are JSON's, which are YAML too."""
    num_rows = report["rows"]["kept"]
    size = next((name for limit, name in _SIZES if num_rows < limit), "n>1M")
    lines = ["---", f"pretty_name: {json.dumps(facts.title, ensure_ascii=False)}", f"license: {facts.licence}"]
    if facts.licence == "other":  # the Hub wants a name and a link beside it
        lines += [f"license_name: {facts.licence_name}", f"license_link: {facts.homepage or 'README.md'}"]
    if facts.language:
        lines += ["language:", f"- {facts.language}"]
    lines += ["task_categories:", "- audio-classification", "tags:", "- speech-emotion-recognition", "- relllm"]
    lines += ["size_categories:", f"- {size}", "configs:", "- config_name: default", "  data_files:"]
    for split in report["splits"]:
        lines += [f"  - split: {split}", f"    path: data/{split}-*.parquet"]
    return "\n".join([*lines, "---", ""])


def _body(facts: CorpusFacts, report: Mapping) -> str:
    parts = [
        f"# {facts.title}",
        f"{report['rows']['kept']:,} utterances, {_hours(report['hours'])}; {report['rows']['dropped']:,} were left "
        "out. Prepared with `relllm prepare`.",
        f"## Terms\n\n{facts.terms}",
    ]
    if facts.homepage:
        parts[-1] += f"\n\nWhere it comes from: <{facts.homepage}>"
    parts += ["## Splits", _split_table(report)]
    if shared := len(report["speakers_in_several_splits"]):
        parts.append(f"**{shared} speakers are in more than one split**: results are of voices that training heard.")
    parts += _label_tables(report["splits"])
    parts += ["## Left out", _dropped_table(report), _audio_notes(report), "## Columns", _columns(report)]
    settings = report["settings"]
    made = [f"- {name}: `{json.dumps(settings[name])}`" for name in _PUBLIC_SETTINGS if name in settings]
    parts += ["## How it was made", "\n".join(made)]
    if facts.citation:
        parts += ["## Citation", f"```bibtex\n{facts.citation}\n```"]
    return "\n".join(f"{part}\n" for part in parts if part)


def _split_table(report: Mapping) -> str:
    rows = []
    for name, split in report["splits"].items():
        durations = split["duration_s"]
        span = f"{durations['shortest']:.1f} / {durations['median']:.1f} / {durations['longest']:.1f}"
        speakers = len([speaker for speaker in split["speakers"] if speaker != UNLABELLED])
        unknown = " and unknown ones" if UNLABELLED in split["speakers"] else ""
        rows.append([name, f"{split['rows']:,}", _hours(split["hours"]), span, f"{speakers}{unknown}"])
    return _table(["split", "rows", "audio", "shortest / median / longest (s)", "speakers"], rows)


def _label_tables(splits: Mapping[str, Mapping]) -> list[str]:
    each = splits.values()
    names = order_emotions([name for split in each for name in split["emotions"]])
    rows = [[name, *(f"{split['emotions'].get(name, 0):,}" for split in each)] for name in names]
    found = ["## Emotions", _table(["emotion", *splits], rows), "## Arousal, dominance and valence"]
    rows = [[name, *(f"{split['dimensions'][name]['rows']:,}" for split in each)] for name in DIMENSIONS]
    return [*found, "Rows that have each, in [0, 1]:\n\n" + _table(["", *splits], rows)]


def _dropped_table(report: Mapping) -> str:
    rows = [[name, f"{item['count']:,}"] for name, item in report["dropped"].items()]
    empty = [f"{item['count']:,} ({name})" for name, item in report["left_empty"].items()]
    kept = f"\n\nValues left empty in rows that are kept: {', '.join(empty)}." if empty else ""
    return (_table(["reason", "utterances"], rows) if rows else "Nothing.") + kept


def _audio_notes(report: Mapping) -> str:
    marked, conversion = report["kept_but_marked"], report["conversion"]
    return (
        f"Kept, but silent (peak below -60 dBFS): {len(marked['silent']):,}; with clipped samples: "
        f"{len(marked['clipped']):,}. Converted to 16-bit mono of 16 kHz: {conversion['converted']:,}, of which "
        f"{len(conversion['samples_set_to_full_scale']):,} had samples beyond full scale, which were set to it."
    )


def _columns(report: Mapping) -> str:
    audio = "its bytes, 16-bit mono of 16 kHz" if report["settings"]["embed_audio"] else "the path of its file"
    return (
        f"`id`; `audio` ({audio}); `text`, the transcript; `response`, a reply to learn; `emotion`; `arousal`, "
        "`dominance`, `valence` in [0, 1] and `dimension_source`, where they are from; `speaker`, `session`, `split`, "
        "`language`, `gender`; `style`, for example improvised; `emotion_votes`, one name for each rater's vote; "
        "`events`, what is heard beside words; `duration_s`. What is not known is empty.\n\n"
        '```python\nimport relllm\n\nrows = relllm.load_corpus("…", split="'
        f'{next(iter(report["splits"]))}")\n```'
    )


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
