"""Several data sets in one run: which they are, what to call them, and their rows in the shares of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from relllm.labels import DIMENSIONS

from .loading import corpus_name
from .survey import READ

if TYPE_CHECKING:
    from .loading import Rows


@dataclass(frozen=True)
class DataSource:
    """One of the data sets of a run; a split that is `None` is the run's."""

    name: str  # a place, as `load_corpus` takes it
    weight: float = 1.0
    train_split: str | None = None
    eval_split: str | None = None
    held_out: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)) or not self.weight > 0:
            raise ValueError(f"The data set {self.name} has the weight {self.weight!r}, expected a number > 0.")


def parse_sources(data: str | Sequence[str | Mapping]) -> list[DataSource]:
    """Return the data sets that the setting `data` names: a place; `"a.jsonl=1,b.jsonl=0.5"`; or a list, also as text,
    of places and of mappings with the fields of [`DataSource`] (`"[{name: a.jsonl, weight: 2}, b.jsonl]"`).
    """
    if isinstance(data, str) and data.startswith("["):
        data = yaml.safe_load(data)
    if isinstance(data, str):
        data = [data] if "," not in data or os.path.exists(data) else [*map(_split_weight, data.split(","))]
    sources = []
    for one in data:
        one = {"name": one} if isinstance(one, str) else one
        if not isinstance(one, Mapping) or not isinstance(one.get("name"), str):
            raise ValueError(f"data has {one!r}, expected a place, or a mapping such as {{name: a.jsonl, weight: 1}}.")
        if unknown := sorted(set(one) - set(DataSource.__annotations__)):
            raise ValueError(f"{one['name']} in data has {unknown}; it takes {', '.join(DataSource.__annotations__)}.")
        sources.append(DataSource(**one))
    if not sources:
        raise ValueError("data is an empty list. Name a data set.")
    return sources


def name_sources(sources: Sequence[DataSource]) -> list[str]:
    """Return a short name for each: its corpus (`iemocap` of `data/iemocap/targets.jsonl`), else its file's too."""
    corpora = [corpus_name(source.name) for source in sources]
    files = [f"{corpus}-{Path(source.name).stem}" for corpus, source in zip(corpora, sources, strict=True)]
    for names in (corpora, files):
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"data names {[source.name for source in sources]}: two cannot be told apart. Name each once.")


def mix_rows(parts: Mapping[str, Rows], weights: Sequence[float], *, seed: int) -> Rows:
    """Interleave data sets by their weights, drawn by the seed, until every row was there; the others begin again.

    Columns that nothing reads are left out; where a data set lacks one of the others, it is missing in its rows. One
    of different kinds in two data sets is a `ValueError`.
    """
    from datasets import Audio, Value, interleave_datasets

    fitted = []
    for part in parts.values():
        part = part.select_columns([name for name in part.features or {} if name in READ])
        for name in DIMENSIONS:  # whole numbers in one, fractions in the next
            part = part.cast_column(name, Value("float64")) if name in part.features else part
        if part.features.get("audio") == Value("string"):  # paths in one, bytes in the next
            part = part.cast_column("audio", Audio(decode=False))
        fitted.append(part)
    for name in sorted(READ - {"audio"}):
        found = {label: one.features[name] for label, one in zip(parts, fitted, strict=True) if name in one.features}
        kinds = [kind for kind in found.values() if getattr(kind, "dtype", None) != "null"]  # a column without values
        if any(kind != kinds[0] for kind in kinds):
            listed = "; ".join(f"{kind} in {label}" for label, kind in found.items())
            raise ValueError(f"The column {name!r} is of different kinds: {listed}. Write it alike in all data sets.")
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(fitted, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def _split_weight(part: str) -> dict[str, object]:
    name, _, weight = part.strip().rpartition("=")
    try:
        return {"name": name, "weight": float(weight)} if name else {"name": weight}
    except ValueError:  # the = is a part of the place
        return {"name": part.strip()}
