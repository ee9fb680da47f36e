"""Replies to learn, written by a chat LLM from transcript and emotion (as in RE-LLM and BLSP-Emo).

The writer reads what was said and the emotion; the model that learns will have to hear both. Here are
which rows are written, resuming, and the report.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset, Features, Value
from rich.table import Table
from tqdm import tqdm

from ..data_settings import TargetSettings, WriteTargetsSettings
from ..journal import (
    Journal,
    check_out,
    find_complete,
    journal_path,
    report_path,
    rows_fingerprint,
    write_json,
    write_rows,
)
from ..loading import load_corpus
from .cleaning import CleaningRules, clean_reply
from .writers import EndpointWriter, LocalWriter, Request, Writer

MISSING = {"text": "no_text", "emotion": "no_emotion"}  # an empty column -> the reason in the report


def write_targets(
    rows: Dataset,
    out: Path,
    writer: Writer,
    settings: TargetSettings,
    *,
    min_words: int = 3,
    max_words: int = 150,
    progress: bool = True,
) -> dict:
    """Have a reply written for every row with a transcript and an emotion, and save those that pass the rules.

    Without `{emotion}` in the prompt, the transcript is enough.

    The output has the input's columns and `response`, in the input's order; rows without a good reply are absent from
    it and named, each with the reason, in `<out>.report.json`. Killed, it goes on where it was: finished rows lie in
    `<out>.journal` until the output is complete, which then is the one an uninterrupted run gives. The cleaning runs
    at the end, so its limits may change in between.

    Args:
        rows (`datasets.Dataset`): With `id`, `text` and `emotion`; `audio` undecoded.
        out (`Path`): `.jsonl` or `.parquet`.
        writer ([`Writer`]): A [`LocalWriter`] or an [`EndpointWriter`].
        settings ([`TargetSettings`]): Prompt and sampling.
        min_words, max_words (`int`, *optional*, defaults to 3 and 150): Shorter and longer replies are dropped.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `dict`: The report: `settings`, `rows`, `written`, `replaced` (rows that had a response), `dropped` and
        `mended` (rule or mend -> `count`, `ids`, for rules `texts`).

    Raises:
        ValueError: If the data lacks a column, or `out` belongs to a run with other settings.
        FileExistsError: If `out` is there from another run.
    """
    if lacking := sorted({"id", "audio", *settings.columns} - set(rows.column_names)):
        raise ValueError(f"The data lacks the columns {lacking}; it has {rows.column_names}.")
    check_out(rows, out)
    rules = CleaningRules(min_words, max_words, prompts=(settings.prompt, settings.system_prompt))
    labels = rows.select_columns(["id", *settings.columns]).to_list()
    run = {"task": "write-targets", **settings.identity, "data": rows_fingerprint(rows, ("id", "text", "emotion"))}
    if (complete := find_complete(out, run)) is not None:
        return complete
    dropped = {row["id"]: (reason, "") for row in labels if (reason := _lacks(row, settings)) is not None}
    requests = [make_request(row, settings) for row in labels if row["id"] not in dropped]
    with Journal(journal_path(out), run) as journal:
        rejected = _write_all(requests, writer, journal, progress)
        written = dict(journal.done)
    dropped |= {row_id: ("rejected", why) for row_id, why in rejected.items()}
    replies: dict[str, str] = {}
    mended: dict[str, tuple[str, ...]] = {}
    for row in labels:
        if (entry := written.get(row["id"])) is None:
            continue
        reply = clean_reply(entry["text"], row["text"], finished=entry["finished"], rules=rules)
        if reply.dropped is not None:
            dropped[row["id"]] = (reply.dropped, entry["text"])
        else:
            replies[row["id"]] = reply.text
            mended[row["id"]] = reply.mended
    report = _report(rows, run, replies, dropped, mended)
    write_json(report, report_path(out))
    write_rows(_with_responses(rows, replies), out)
    journal_path(out).unlink()
    return report


def make_request(row: Mapping[str, str], settings: TargetSettings) -> Request:
    """Return what the writer is asked for a row with `id`, `text` and, where the prompt needs it, `emotion`."""
    prompt = settings.prompt.format(emotion=row.get("emotion"))
    return Request(row["id"], settings.system_prompt, prompt + row["text"])


def run_write_targets(settings: WriteTargetsSettings) -> dict:
    """Do what `relllm write-targets` does, and return the report of [`write_targets`]."""
    rows = load_corpus(settings.data, settings.split or "all")
    writer: Writer
    if settings.endpoint is not None:
        writer = EndpointWriter(
            settings.endpoint,
            settings.text_model,
            settings,
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            extra_body=json.loads(settings.extra_body) if settings.extra_body else None,
        )
    else:
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        writer = LocalWriter.from_pretrained(
            settings.text_model, settings, revision=settings.revision, batch_size=settings.batch_size, device=device
        )
    return write_targets(
        rows, settings.out, writer, settings, min_words=settings.min_words, max_words=settings.max_words
    )


def target_table(report: Mapping) -> Table:
    """Return the counts of a report of [`write_targets`], for the terminal."""
    table = Table("", "rows", title=f"Replies by {report['settings']['text_model']}", title_justify="left")
    table.add_row("in the data", str(report["rows"]))
    table.add_row("written", str(report["written"]))
    if report["replaced"]:
        table.add_row("of these, a response replaced", str(report["replaced"]))
    for name, entry in report["mended"].items():
        table.add_row(f"mended: {name}", str(entry["count"]))
    for name, entry in report["dropped"].items():
        ids = ", ".join(entry["ids"][:3]) + (", …" if entry["count"] > 3 else "")
        table.add_row(f"dropped: {name}", f"{entry['count']}  ({ids})")
    return table


def _write_all(requests: Sequence[Request], writer: Writer, journal: Journal, progress: bool) -> dict[str, str]:
    """Fills the journal; returns the rows that the endpoint rejected, with its reasons. Those are asked for again when
    the run is resumed."""
    rejected: dict[str, str] = {}
    done = sum(request.id in journal.done for request in requests)
    with tqdm(total=len(requests), initial=done, desc="Writing replies", unit="row", disable=not progress) as bar:
        for batch in writer.write(requests, journal.done):
            journal.append(
                {"id": reply.id, "text": reply.text, "finished": reply.finished}
                for reply in batch
                if reply.rejected is None
            )
            rejected |= {reply.id: reply.rejected for reply in batch if reply.rejected is not None}
            bar.update(len(batch))
    return rejected


def _lacks(row: Mapping[str, str | None], settings: TargetSettings) -> str | None:
    return next((MISSING[name] for name in settings.columns if not (row[name] or "").strip()), None)


def _report(
    rows: Dataset,
    run: Mapping[str, object],
    replies: Mapping[str, str],
    dropped: Mapping[str, tuple[str, str]],
    mended: Mapping[str, Sequence[str]],
) -> dict:
    reasons: dict[str, dict] = {}
    for row_id in rows["id"]:
        if row_id in dropped:
            reason, text = dropped[row_id]
            entry = reasons.setdefault(reason, {"count": 0, "ids": [], "texts": []})
            entry["count"] += 1
            entry["ids"].append(row_id)
            entry["texts"].append(text)
    for reason in reasons.keys() & set(MISSING.values()):
        del reasons[reason]["texts"]
    mends: dict[str, dict] = {}
    for row_id, names in mended.items():
        for name in names:
            entry = mends.setdefault(name, {"count": 0, "ids": []})
            entry["count"] += 1
            entry["ids"].append(row_id)
    had = rows["response"] if "response" in rows.column_names else [None] * len(rows)
    replaced = sum(old is not None and row_id in replies for row_id, old in zip(rows["id"], had, strict=True))
    return {
        "settings": json.loads(json.dumps(run)),
        "rows": len(rows),
        "written": len(replies),
        "replaced": replaced,
        "dropped": reasons,
        "mended": mends,
    }


def _with_responses(rows: Dataset, replies: Mapping[str, str]) -> Dataset:
    kept = rows.select([index for index, row_id in enumerate(rows["id"]) if row_id in replies])
    features = Features({**kept.features, "response": Value("string")})
    if "response" in kept.column_names:
        kept = kept.remove_columns("response")
    kept = kept.add_column("response", [replies[row_id] for row_id in kept["id"]], feature=features["response"])
    return kept.select_columns(list(features))
