"""Scoring pairs of a seeker's post and a response with trained scorers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from relllm.data.table_files import write_table
from relllm.setting import pick_device

from ..evaluation_settings import LEVELS, MECHANISMS, ScoringSettings
from ..summary import summarize_levels
from .epitome import PairCollator, encode_posts, read_posts
from .quality import find_scorers
from .scorer import EmpathyScorer


@dataclass(frozen=True)
class LoadedScorer:
    """A trained scorer in evaluation, with its own tokenizer."""

    model: EmpathyScorer
    tokenizer: PreTrainedTokenizerBase


def load_scorers(path: str | Path) -> dict[str, LoadedScorer]:
    """Load trained scorers by mechanism, in the order ER, IP, EX.

    `path` is a folder with `ER/`, `IP/`, `EX/` or some of them inside, or that of one scorer.
    """
    root = Path(path)
    scorers: dict[str, LoadedScorer] = {}
    for folder in find_scorers(root):
        scorer = _load_scorer(folder)
        mechanism = scorer.model.config.mechanism
        if folder not in (root, root / mechanism):
            raise ValueError(f"{folder} holds a scorer of {mechanism}. Rename it.")
        scorers[mechanism] = scorer
    if not scorers:
        raise FileNotFoundError(
            f"{root} has no empathy scorer: neither a config.json nor a folder {', '.join(MECHANISMS)}. "
            "`relllm empathy train` makes them."
        )
    return scorers


def score_pairs(
    scorers: Mapping[str, LoadedScorer],
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: bool = False,
    windows: bool = False,
) -> list[dict[str, dict]]:
    """Give each pair (seeker post, response) a level and probabilities, by each scorer; the scorers move to `device`.

    Returns `{mechanism: {"level": 0 | 1 | 2, "probabilities": [p0, p1, p2], "tokens": n, "cut": bool}}` for each pair:
    the length of the response, and whether the scorer read its beginning only. With `windows` it reads all of it, in
    parts of the length that it was trained on, of which the one with the highest level counts. An empty response says
    nothing: it has level 0 with probability 1 by definition, no scorer reads it. An empty seeker post is a
    `ValueError`.
    """
    for position, (seeker, _) in enumerate(pairs):
        if not seeker.strip():
            raise ValueError(f"The seeker post at position {position} is empty: there is nothing to respond to.")
    found: list[dict[str, dict]] = [{} for _ in pairs]
    spoken = [index for index, (_, response) in enumerate(pairs) if response.strip()]
    with tqdm(total=len(spoken) * len(scorers), desc="Scoring", unit="pair", disable=not progress) as bar:
        for mechanism, scorer in scorers.items():
            scorer.model.to(device)
            for part in found:
                certain = [1.0, *[0.0] * (LEVELS - 1)]
                part[mechanism] = {"level": 0, "probabilities": certain, "tokens": 0, "cut": False}
            for start in range(0, len(spoken), batch_size):
                batch = spoken[start : start + batch_size]
                parts = [cut_windows(pairs[one][1], scorer) for one in batch]
                read = [texts if windows else [pairs[one][1]] for one, (texts, _) in zip(batch, parts, strict=True)]
                asked = [(pairs[one][0], text) for one, texts in zip(batch, read, strict=True) for text in texts]
                rows = iter(_level_probabilities(scorer, asked))
                for index, texts, (everything, tokens) in zip(batch, read, parts, strict=True):
                    level, _, row = max(_rank(next(rows)) for _ in texts)
                    cut = len(texts) < len(everything)
                    found[index][mechanism] = {"level": level, "probabilities": row, "tokens": tokens, "cut": cut}
                bar.update(len(batch))
    return found


def cut_windows(text: str, scorer: LoadedScorer) -> tuple[list[str], int]:
    """Return the parts of a text that its scorer can read at once, and how many tokens the whole has.

    Joined, the parts are the text. They end with a word where they can: what stands before a word may be a part of its
    first token, and half a word has other tokens than in the whole.
    """
    limit = scorer.model.config.max_length - scorer.tokenizer.num_special_tokens_to_add()
    encoded = scorer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    words, cuts = encoded.word_ids(), [0]
    while cuts[-1] + limit < len(words):
        last = cuts[-1] + limit
        ends = (at for at in range(last, cuts[-1], -1) if words[at] != words[at - 1])
        cuts.append(next(ends, last))
    starts = [0, *(encoded["offset_mapping"][at - 1][1] for at in cuts[1:]), len(text)]
    return [text[start:end] for start, end in pairwise(starts)], len(words)


def score_table(settings: ScoringSettings, *, progress: bool = True) -> dict[str, dict]:
    """Score a `.csv` or `.jsonl` table and write it with new columns; the file is complete or not there.

    The columns are `ER_level`, `ER_p0`, `ER_p1`, `ER_p2`, and so on; the others stay as they are. Returns for each
    mechanism what [`summarize_levels`] does, `num_pairs` and `num_empty` (empty responses, which count as level 0).
    """
    path, out, scorers = settings.pairs, settings.file, load_scorers(settings.scorers)
    if out.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--out {out}: expected a file that ends in .csv or .jsonl.")
    if out.resolve() == path.resolve():
        raise ValueError(f"--out {out} is the table itself. Choose another file: the table stays as it is.")
    rows = read_posts(path)
    pairs = [(row["seeker_post"], row["response_post"]) for row in rows]
    new = [f"{name}_{what}" for name in scorers for what in ("level", *(f"p{level}" for level in range(LEVELS)))]
    if taken := [name for name in new if any(name in row for row in rows)]:
        raise ValueError(f"{path} has the columns {taken} already. Rename them, or score the table without them.")
    device = pick_device(settings.device)
    scored = score_pairs(scorers, pairs, batch_size=settings.batch_size, device=device, progress=progress)
    written = []
    for row, found in zip(rows, scored, strict=True):
        values = [value for part in found.values() for value in (part["level"], *part["probabilities"])]
        written.append({**row, **dict(zip(new, values, strict=True))})
    write_table(written, out)
    counts = {"num_pairs": len(rows), "num_empty": sum(not response.strip() for _, response in pairs)}
    parts = [{"empathy": one} for one in scored]
    return {name: (summarize_levels(parts, name) or {}) | counts for name in scorers}


def _rank(row: list[float]) -> tuple[int, float, list[float]]:
    """Order parts of a response by their level, then by how sure the scorer is of it."""
    level = max(range(LEVELS), key=row.__getitem__)
    return level, row[level], row


def _load_scorer(folder: Path) -> LoadedScorer:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != EmpathyScorer.config_class.model_type:
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model, none of `relllm empathy train`.")
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = EmpathyScorer.from_pretrained(folder, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights of the scorer, such as {missing[0]}. Train it again.")
    return LoadedScorer(model.eval(), AutoTokenizer.from_pretrained(folder))


@torch.no_grad()
def _level_probabilities(scorer: LoadedScorer, pairs: Sequence[tuple[str, str]]) -> list[list[float]]:
    features = encode_posts(pairs, scorer.tokenizer, scorer.model.config.max_length)
    batch = PairCollator(scorer.tokenizer.pad_token_id)(features)
    output = scorer.model(**{name: tensor.to(scorer.model.device) for name, tensor in batch.items()})
    probabilities = output.level_logits.double().softmax(-1)
    if not probabilities.isfinite().all():
        raise ValueError(f"The scorer of {scorer.model.config.mechanism} gives NaN. Train it again.")
    return probabilities.tolist()
