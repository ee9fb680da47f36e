"""Columns as data sets have them, in the types and with the names of [`relllm.data.rows.Row`]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relllm.labels import DIMENSIONS, find_emotion

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset


def normalize_columns(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return a data set with undecoded audio, also in `messages` and lists, and emotions by their names.

    An `emotion` that is a `datasets.ClassLabel` is read by the names of its classes, and a name in the canonical
    spelling where it has one ("hap", "Happiness" and "happy" are "happy"); another name stays as it is. Emotions that
    are numbers without names, and dimensions outside [0, 1], are a `ValueError`.
    """
    features = dataset.features
    if features is None:  # of a stream, known when it is read
        return dataset
    dataset = _leave_encoded(dataset, features)
    _check_scales(dataset)
    if "emotion" not in features:
        return dataset
    of_clip = getattr(features["emotion"], "feature", features["emotion"])  # of a list, one for each clip
    names, kind = getattr(of_clip, "names", None), str(getattr(of_clip, "dtype", ""))
    if names is None and kind.startswith(("int", "uint", "float")):
        raise ValueError(
            "The column `emotion` holds numbers without names. Make it names, or a `datasets.ClassLabel` with the "
            'names in the order of the numbers: dataset.cast_column("emotion", ClassLabel(names=[…])).'
        )
    return _name_emotions(dataset, names)


def _check_scales(dataset: Dataset | IterableDataset) -> None:
    """Raise `ValueError` for a dimension on another scale; a stream is not read for it."""
    from datasets import Dataset

    for name in DIMENSIONS if isinstance(dataset, Dataset) else ():
        if name not in dataset.column_names:
            continue
        numbers = [one for value in dataset[name][:] for one in (value if isinstance(value, list) else [value])]
        numbers = [number for number in numbers if isinstance(number, (int, float))]
        if outside := sum(number < 0 or number > 1 for number in numbers):
            raise ValueError(
                f"{name} goes from {min(numbers):g} to {max(numbers):g}, and {outside:,} of {len(numbers):,} values "
                "are outside [0, 1]: it is on another scale. Prepare the data with its lowest and highest rating: "
                f"`relllm prepare folder TABLE --scale {name}=1,5`."
            )


def _leave_encoded(dataset: Dataset | IterableDataset, features: Features) -> Dataset | IterableDataset:
    """Return the data set with audio as bytes and path; nothing is copied, because Arrow holds it so in any case."""
    from datasets import Audio, Dataset
    from datasets.features.features import _visit
    from datasets.fingerprint import Hasher

    if not isinstance(dataset, Dataset):
        return dataset.decode(False)

    def encode(feature: object) -> object:
        return Audio(sampling_rate=feature.sampling_rate, decode=False) if isinstance(feature, Audio) else feature

    info = dataset.info.copy()
    info.features = _visit(features, encode)
    if info.features == features:
        return dataset
    fingerprint = Hasher.hash([dataset._fingerprint, "encoded"])
    return Dataset(dataset.data, info, dataset.split, indices_table=dataset._indices, fingerprint=fingerprint)


def _name_emotions(dataset: Dataset | IterableDataset, names: list[str] | None) -> Dataset | IterableDataset:
    from datasets import Dataset, List, Value

    in_memory = isinstance(dataset, Dataset) and names is None
    if in_memory and all(_rename(value, names) == value for value in dataset["emotion"][:]):
        return dataset
    features = dataset.features.copy()
    of_several = isinstance(features["emotion"], List)  # clips in a row
    features["emotion"] = List(Value("string")) if of_several else Value("string")

    def rename(values: list) -> dict[str, list]:
        return {"emotion": [_rename(value, names) for value in values]}

    return dataset.map(rename, input_columns="emotion", batched=True, features=features)


def _rename(value: str | int | list | None, names: list[str] | None) -> str | list | None:
    if isinstance(value, list):  # one for each clip
        return [_rename(one, names) for one in value]
    if isinstance(value, int):
        value = names[value] if names is not None and value >= 0 else None  # -1: `datasets` marks a missing label so
    return find_emotion(value, value) if value else value
