"""Replies to learn, written by a chat LLM from transcript and emotion (as in RE-LLM and BLSP-Emo).

The writer reads what was said and the emotion; the model that learns will have to hear both.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from rich.table import Table
from tqdm import tqdm

from relllm.modeling.places_relllm import check_place
from relllm.setting import pick_device, read_object

from ..data_settings import TargetSettings, WriteTargetsSettings
from ..journal import Journal, check_columns, check_out, make_file, replace_columns, rows_fingerprint, write_rows
from ..loading import load_corpus
from .cleaning import CleanedReply, CleaningRules, clean_reply
from .writers import EndpointWriter, LocalWriter, Request, Writer

MISSING = {"text": "no_text", "emotion": "no_emotion"}  # an empty column -> the reason in the report


def write_targets(
    rows: Dataset,
    out: Path,
    load_writer: Callable[[], Writer],
    settings: TargetSettings,
    *,
    min_words: int = 3,
    max_words: int = 150,
    progress: bool = True,
) -> dict:
    """Have a reply written for every row with a transcript and an emotion, and save those that pass the rules.

    Without `{emotion}` in the prompt, the transcript is enough. The output has the input's columns and `response`, in
    the input's order; rows without a good reply are absent from it. Killed, it goes on where it was, and gives what an
    uninterrupted run gives. The cleaning runs at the end, so its limits, in words, may change in between.

    `rows` have undecoded `audio`; `load_writer` is called once, if it is needed, after everything else is checked.
    Errors are those of [`make_file`], and a `ValueError` if no reply is any good. The report has `settings`, `rows`,
    `written`, `replaced` (rows that had a response), `dropped` and `mended` (by rule `count`, `ids` and `texts`).
    """
    check_columns(rows, {"id", "audio", *settings.columns})
    check_out(rows, out)
    rules = CleaningRules(min_words, max_words, prompts=(settings.prompt, settings.system_prompt))
    labels = rows.select_columns(["id", *settings.columns]).to_list()
    dropped = {row["id"]: (reason, "") for row in labels if (reason := _lacks(row, settings))}
    requests = [make_request(row, settings) for row in labels if row["id"] not in dropped]

    def fill(journal: Journal) -> None:
        """Have replies written; a resumed run asks again for a row without one."""
        left = sum(request.id not in journal.done for request in requests)
        if not left:
            return
        with tqdm(total=left, desc="Writing replies", unit="row", disable=not progress) as bar:
            for batch in load_writer().write(requests, journal.done):
                given = [reply for reply in batch if reply.rejected is None and reply.text.strip()]
                journal.append({"id": reply.id, "text": reply.text, "finished": reply.finished} for reply in given)
                for reply in (reply for reply in batch if reply not in given):
                    dropped[reply.id] = ("rejected" if reply.rejected else "empty", reply.rejected or "")
                bar.update(len(batch))

    def finish(written: Mapping[str, dict]) -> tuple[dict, Callable[[Path], None]]:
        replies: dict[str, CleanedReply] = {}
        for row in labels:
            if (entry := written.get(row["id"])) is None:
                continue
            reply = clean_reply(entry["text"], row["text"], finished=entry["finished"], rules=rules)
            if reply.dropped is not None:
                dropped[row["id"]] = (reply.dropped, entry["text"])
            else:
                replies[row["id"]] = reply
        if not replies:
            raise ValueError(f"No row has a reply to learn, and {out} is not written: {_name_reasons(dropped)}.")
        kept = rows.select([index for index, row in enumerate(labels) if row["id"] in replies])
        responses = {"response": [reply.text for reply in replies.values()]}
        report = {"rows": len(rows), **_report(rows, replies, dropped)}
        return report, partial(write_rows, replace_columns(kept, responses, {"response": Value("string")}))

    run = {"task": "write-targets", **settings.identity, "data": rows_fingerprint(rows, ("id", "text", "emotion"))}
    return make_file(out, run, fill, finish)


def make_request(row: Mapping[str, str], settings: TargetSettings) -> Request:
    """Return what the writer is asked for a row with `id`, `text` and, where the prompt needs it, `emotion`."""
    prompt = settings.prompt.format(emotion=row.get("emotion"))
    return Request(row["id"], settings.system_prompt, prompt + row["text"])


def run_write_targets(settings: WriteTargetsSettings, load_vllm: Callable[..., Writer] | None = None) -> dict:
    """Do what `relllm write-targets` does, and return the report of [`write_targets`].

    `load_vllm` makes the writer of `engine="vllm"`, which is not of this room.
    """
    rows = load_corpus(settings.data, settings.split or "all")
    load: Callable[..., Writer]
    if settings.endpoint is not None:
        asked: dict[str, Any] = {"api_key_env": settings.api_key_env, "concurrency": settings.concurrency}
        asked["extra_body"] = read_object(settings.extra_body, "extra_body", "")
        load = partial(EndpointWriter, settings.endpoint, settings.text_model, settings, **asked)
    else:
        check_place(settings.text_model, holds="config.json")
        load = partial(LocalWriter.from_pretrained, device=pick_device(settings.device))
        if settings.engine == "vllm":
            assert load_vllm is not None  # the command brings it
            load = partial(load_vllm, arguments=settings.engine_args)
        of_llm = {"revision": settings.revision, "batch_size": settings.batch_size}
        load = partial(load, settings.text_model, settings, **of_llm)
    few, many = settings.min_words, settings.max_words
    return write_targets(rows, settings.out, load, settings, min_words=few, max_words=many)


def target_table(report: Mapping) -> Table:
    """Return the counts of a report of [`write_targets`], for the terminal."""
    table = Table("", "rows", title=f"Replies by {report['settings']['text_model']}", title_justify="left")
    counts = {"in the data": report["rows"], "written": report["written"]}
    counts |= {"of these, a response replaced": report["replaced"]} if report["replaced"] else {}
    for name, count in (counts | {f"mended: {name}": one["count"] for name, one in report["mended"].items()}).items():
        table.add_row(name, str(count))
    for name, entry in report["dropped"].items():
        ids = ", ".join(entry["ids"][:3]) + (", …" if entry["count"] > 3 else "")
        table.add_row(f"dropped: {name}", f"{entry['count']}  ({ids})")
    return table


def _name_reasons(dropped: Mapping[str, tuple[str, str]]) -> str:
    """Count the reasons, each with the first text that it was about."""
    counts = Counter(reason for reason, _ in dropped.values())
    such = {reason: f" (such as {text!r:.160})" if text else "" for reason, text in reversed(list(dropped.values()))}
    return "; ".join(f"{name} {count}{such[name]}" for name, count in counts.items())


def _lacks(row: Mapping[str, str | None], settings: TargetSettings) -> str | None:
    return next((MISSING[name] for name in settings.columns if not (row[name] or "").strip()), None)


def _report(rows: Dataset, replies: Mapping[str, CleanedReply], dropped: Mapping[str, tuple[str, str]]) -> dict:
    ids = rows["id"][:]
    reasons = _group((dropped[row_id][0], row_id) for row_id in ids if row_id in dropped)
    for reason, group in reasons.items():
        if reason not in MISSING.values():
            group["texts"] = [dropped[row_id][1] for row_id in group["ids"]]
    mends = _group((name, row_id) for row_id, reply in replies.items() for name in reply.mended)
    had = rows["response"] if "response" in rows.column_names else [None] * len(rows)
    replaced = sum(old is not None and row_id in replies for row_id, old in zip(ids, had, strict=True))
    return {"written": len(replies), "replaced": replaced, "dropped": reasons, "mended": mends}


def _group(named: Iterable[tuple[str, str]]) -> dict[str, dict]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, row_id in named:
        groups[name].append(row_id)
    return {name: {"count": len(ids), "ids": ids} for name, ids in groups.items()}
