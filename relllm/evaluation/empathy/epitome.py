"""Pairs of a seeker's post and a response: reading EPITOME's CSV files, removing duplicates, splitting, tokens.

The split is by seeker post: a model that has seen a post in training has an easier time with its other responses.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from relllm.data.parsing import decode_text
from relllm.data.table_files import read_table

from ..evaluation_settings import LEVELS
from .scorer import IGNORED

TEXTS = ("seeker_post", "response_post")
COLUMNS = (*TEXTS, "level", "rationales")
SPLITS = ("train", "validation", "test")
# Tables written by other programs have 1.0.
WRITTEN_LEVELS = {f"{level}{rest}": level for level in range(LEVELS) for rest in ("", ".0")}
NOT_FOUND, NOT_GIVEN = "rationale not in the response", "level without a rationale"
SHOWN = 20  # lines named in a report


@dataclass(frozen=True)
class Pair:
    """A labelled pair."""

    line: int  # of the file, the last one of its row
    seeker_post: str  # without white space around it, as the response
    response_post: str
    level: int  # 0, 1 or 2
    spans: tuple[tuple[int, int], ...] | None  # characters of the response in a rationale; None where not known


def read_pairs(path: Path) -> tuple[list[Pair], dict]:
    """Read labelled pairs, each once, and report what was dropped.

    The CSV file has the columns `seeker_post`, `response_post`, `level` and `rationales`, which are parts of the
    response, separated by `|`. Of duplicates (the same post and the same response) the first is kept. Rows with an
    empty post or response are left out. A pair whose rationale does not occur in its response, or whose level is above
    0 without any, teaches its level only. All of these are counted in the report; whatever else is wrong is a
    `ValueError` with its line.
    """
    pairs: dict[tuple[str, str], Pair] = {}
    lines: dict[str, list[int]] = defaultdict(list)  # by what is told of them
    num_rows = 0
    for line, row in _read_strict_csv(path, COLUMNS):
        num_rows += 1
        texts = (row["seeker_post"].strip(), row["response_post"].strip())
        level = WRITTEN_LEVELS.get(row["level"].strip())
        if level is None:
            raise ValueError(f"{path}:{line}: level is {row['level']!r}, expected 0, 1 or 2.")
        if "" in texts:
            lines[f"empty {TEXTS[texts.index('')]}"].append(line)
        elif texts in pairs:
            lines["duplicate"] += [line]
            lines["contradiction"] += [line] * (pairs[texts].level != level)
        else:
            parts = [part.strip() for part in row["rationales"].split("|") if part.strip()]
            spans = tuple(span for part in parts if (span := find_rationale(part, texts[1])) is not None)
            is_lost, is_missing = len(spans) < len(parts), level > 0 and not parts
            if is_lost or is_missing:
                lines[NOT_FOUND if is_lost else NOT_GIVEN].append(line)
            pairs[texts] = Pair(line, *texts, level, None if is_lost or is_missing else spans)
    counted = {what: {"count": len(of), "lines": of[:SHOWN]} for what, of in lines.items()}
    none = {"count": 0, "lines": []}
    report = {
        "num_rows": num_rows,
        "num_pairs": len(pairs),
        "duplicates_removed": counted.get("duplicate", none),
        "duplicates_with_another_level": counted.get("contradiction", none),
        "dropped": {reason: counted.get(reason, none) for reason in (f"empty {name}" for name in TEXTS)},
        "rationale_not_known": {reason: counted.get(reason, none) for reason in (NOT_FOUND, NOT_GIVEN)},
    }
    return list(pairs.values()), report


def _read_strict_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line and row of a CSV file with these columns and as many fields in each row as in the header."""
    text, encoding = decode_text(path)
    if not encoding.startswith("utf"):
        raise ValueError(f"{path} is not UTF-8. Save it as UTF-8.")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or [])
        if lacking := [name for name in columns if name not in header]:
            raise ValueError(f"{path} lacks the columns {lacking}; it has {header}. Rename them in line 1.")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}:{reader.line_num} has another number of fields than the header's {len(header)}. Put "
                    "quotes around texts with commas."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}: no CSV after line {reader.line_num} ({error}). Mend the quotes.") from error


def find_rationale(rationale: str, response: str) -> tuple[int, int] | None:
    """Return where a rationale stands first in a response, whatever case and white space; `None` if nowhere."""
    pattern = r"\s+".join(map(re.escape, rationale.split()))
    found = re.search(pattern, response) or re.search(pattern, response, re.IGNORECASE)
    return found.span() if found else None


def split_pairs(
    pairs: Sequence[Pair], *, seed: int, validation_share: float = 0.1, test_share: float = 0.2
) -> dict[str, list[Pair]]:
    """Split by seeker post into `train`, `validation` and `test`, so that no post is in two of them.

    The posts are taken by their highest level, shuffled, and cut, so that each level is in all splits where there are
    enough. The order of the pairs does not matter, and is kept.
    """
    if validation_share <= 0 or test_share <= 0 or validation_share + test_share >= 1:
        raise ValueError(f"{validation_share=} and {test_share=}: each must be above 0, the sum below 1.")
    highest: dict[str, int] = {}
    for pair in pairs:
        key = _post_key(pair)
        highest[key] = max(highest.get(key, 0), pair.level)
    split_of: dict[str, str] = {}
    shuffler = random.Random(seed)
    for level in range(LEVELS):
        keys = sorted(key for key, value in highest.items() if value == level)
        shuffler.shuffle(keys)
        first = round(test_share * len(keys))
        second = first + round(validation_share * len(keys))
        split_of |= dict.fromkeys(keys[:first], "test") | dict.fromkeys(keys[first:second], "validation")
        split_of |= dict.fromkeys(keys[second:], "train")
    splits = {name: [pair for pair in pairs if split_of[_post_key(pair)] == name] for name in SPLITS}
    for name, members in splits.items():
        if not members:
            raise ValueError(f"{len(highest)} seeker posts are too few: the {name} split gets none. Use more data.")
    return splits


def describe_split(pairs: Sequence[Pair]) -> dict:
    """Count pairs, posts, pairs of each level, and pairs whose rationale is known."""
    levels = Counter(pair.level for pair in pairs)
    return {
        "num_pairs": len(pairs),
        "num_seeker_posts": len({_post_key(pair) for pair in pairs}),
        "levels": [levels[level] for level in range(LEVELS)],
        "num_with_known_rationale": sum(pair.spans is not None for pair in pairs),
    }


def encode_pairs(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Return tokens and labels of each pair, for [`PairCollator`]; texts are cut to `max_length` tokens.

    A token is in a rationale if it shares a character with one; which it has only a fast tokenizer knows.
    """
    if not tokenizer.is_fast:
        what = f"{type(tokenizer).__name__} does not say which characters a token is of"
        raise ValueError(f"{what}. Use an encoder with a fast tokenizer (tokenizer.json).")
    features = encode_posts([(pair.seeker_post, pair.response_post) for pair in pairs], tokenizer, max_length)
    cut = {"truncation": True, "max_length": max_length}
    told = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    responses = tokenizer([pair.response_post for pair in pairs], **cut, **told)
    tokens = zip(responses["offset_mapping"], responses["special_tokens_mask"], strict=True)
    for feature, pair, (offsets, special) in zip(features, pairs, tokens, strict=True):
        feature["level_labels"] = pair.level
        feature["rationale_labels"] = [
            IGNORED
            if is_special or pair.spans is None
            else int(any(start < last and first < end for first, last in pair.spans))
            for (start, end), is_special in zip(offsets, special, strict=True)
        ]
    return features


def encode_posts(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict]:
    """Return the tokens of each `(seeker post, response)`, cut to `max_length`."""
    cut = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
    seekers, responses = (tokenizer([pair[side] for pair in pairs], **cut)["input_ids"] for side in (0, 1))
    both = zip(seekers, responses, strict=True)
    return [{"seeker_input_ids": seeker, "response_input_ids": response} for seeker, response in both]


@dataclass(frozen=True)
class PairCollator:
    """Pads a batch of [`encode_pairs`] or [`encode_posts`] on the right."""

    pad_token_id: int

    def __call__(self, features: Sequence[Mapping]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for side in ("seeker", "response"):
            rows = [feature[f"{side}_input_ids"] for feature in features]
            batch[f"{side}_input_ids"] = _pad_right(rows, self.pad_token_id)
            batch[f"{side}_attention_mask"] = _pad_right([[1] * len(row) for row in rows], 0)
        if "level_labels" in features[0]:
            batch["level_labels"] = torch.tensor([feature["level_labels"] for feature in features])
            batch["rationale_labels"] = _pad_right([feature["rationale_labels"] for feature in features], IGNORED)
        return batch


def read_posts(path: Path) -> list[dict]:
    """Read rows with `seeker_post` and `response_post` to be scored from a `.csv` or `.jsonl` file, all columns kept.

    Whatever is wrong (a missing column or value, an empty seeker post) is a `ValueError` with its line.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: expected a file that ends in .csv or .jsonl.")
    rows = dict(_read_strict_csv(path, TEXTS) if path.suffix == ".csv" else read_table(path))
    for line, row in rows.items():
        for name in TEXTS:
            if not isinstance(row.get(name), str):
                raise ValueError(f"{path}:{line}: {name} is {row.get(name)!r}, expected a text.")
        if not row["seeker_post"].strip():
            raise ValueError(f"{path}:{line}: seeker_post is empty: there is nothing to respond to. Take the row out.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return list(rows.values())


def _post_key(pair: Pair) -> str:
    """Return the same key for posts that differ in case and white space only."""
    return " ".join(pair.seeker_post.casefold().split())


def _pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
