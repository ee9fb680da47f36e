"""Replies to learn, written by a chat LLM from transcript and emotion (as in RE-LLM and BLSP-Emo).

The writer reads what was said and the emotion; the model that learns will have to hear both. What lives here: which
rows are written, resuming, the report. What does not: the writers (`target_writers.py`), the rules of cleaning
(`target_cleaning.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, Features, Value
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from relllm.processing.prompts_relllm import SYSTEM_PROMPT, WRITER_PROMPT

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
from .writers import EndpointWriter, LocalWriter, Request, Sampling, Writer

MISSING = {"text": "no_text", "emotion": "no_emotion"}  # an empty column -> the reason in the report


@dataclass(frozen=True)
class TargetSettings:
    """What makes the replies of one file comparable; a resumed run must have the same.

    Args:
        model (`str`): Id or path of the writer; with an endpoint, its name there.
        revision (`str`, *optional*, defaults to `"main"`): Of the writer on the Hub.
        prompt (`str`, *optional*): Before the transcript. Where `{emotion}` stands in it, a row needs an emotion;
            without it, as for the continuations of a first stage on ASR data, it does not.
        system_prompt (`str`, *optional*): The writer's system turn; empty for none.
        sampling ([`Sampling`], *optional*): How replies are drawn; greedy by default.
        extra_body (`str`, *optional*): JSON of further fields of an endpoint's requests.

    Raises:
        ValueError: If the prompt holds another field than `{emotion}`.
    """

    model: str
    revision: str = "main"
    prompt: str = WRITER_PROMPT
    system_prompt: str = SYSTEM_PROMPT
    sampling: Sampling = Sampling()
    extra_body: str | None = None

    def __post_init__(self) -> None:
        try:
            self.prompt.format(emotion="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"The prompt may hold {{emotion}} and no other field, got {self.prompt!r}.") from error

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row needs for its request."""
        return ("text", "emotion") if self.prompt.format(emotion="A") != self.prompt.format(emotion="B") else ("text",)

    def request(self, row: Mapping[str, str]) -> Request:
        """What the writer is asked for a row with `id`, `text` and `emotion`."""
        return Request(row["id"], self.system_prompt, self.prompt.format(emotion=row.get("emotion")) + row["text"])


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
    """Has a reply written for every row with a transcript and an emotion, and saves those that pass the rules.

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
    run = {"task": "write-targets", **asdict(settings), "data": rows_fingerprint(rows, ("id", "text", "emotion"))}
    if (complete := find_complete(out, run)) is not None:
        return complete
    dropped = {row["id"]: (reason, "") for row in labels if (reason := _lacks(row, settings)) is not None}
    requests = [settings.request(row) for row in labels if row["id"] not in dropped]
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


def run_write_targets(
    data: str,
    out: Path,
    text_model: str,
    *,
    split: str | None,
    endpoint: str | None,
    endpoint_options: Mapping,
    extra_body: str | None,
    batch_size: int,
    device: str,
    revision: str,
    sampling: Mapping,
    prompts: Mapping[str, str],
    words: tuple[int, int],
    console: Console,
) -> dict:
    """The command `relllm write-targets`; its options are described there.

    Returns:
        `dict`: The report of [`write_targets`].
    """
    rows = load_corpus(data, split or "all")
    drawn = Sampling(**sampling)
    settings = TargetSettings(text_model, revision=revision, sampling=drawn, extra_body=extra_body, **prompts)
    writer: Writer
    if endpoint is not None:
        body = json.loads(extra_body) if extra_body else None
        writer = EndpointWriter(endpoint, text_model, drawn, extra_body=body, **endpoint_options)
    else:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        writer = LocalWriter.from_pretrained(
            text_model, drawn, revision=revision, batch_size=batch_size, device=device
        )
    report = write_targets(rows, out, writer, settings, min_words=words[0], max_words=words[1])
    console.print(report_table(report))
    console.print(f"Replies: [bold]{out}[/bold]; what was dropped, with ids and texts: {report_path(out)}")
    return report


def report_table(report: Mapping) -> Table:
    """The counts of a report of [`write_targets`], for the terminal."""
    table = Table("", "rows", title=f"Replies by {report['settings']['model']}", title_justify="left")
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


__all__ = ["TargetSettings", "report_table", "run_write_targets", "write_targets"]
