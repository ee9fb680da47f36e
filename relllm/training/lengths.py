"""How many positions a row takes in the LLM's sequence, by its audio's header and its characters, without decoding."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import soundfile
from datasets import Dataset
from torch import Tensor

from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.processing.processing_relllm import AUDIO_KEYS

CHARACTERS_PER_TOKEN = 4.0  # of English under the tokenizers of current LLMs


def row_lengths(dataset: Dataset, extractor: ReLLMFeatureExtractor) -> list[int]:
    """Return about how many positions each row takes in the LLM's sequence; its audio is left undecoded."""
    columns = [name for name in ("id", "audio", "response", "messages") if name in dataset.column_names]
    return [row_length(row, extractor) for row in dataset.select_columns(columns)]


def row_length(row: Mapping, extractor: ReLLMFeatureExtractor) -> int:
    """Return about how many positions a row takes; a clip whose header cannot be read (or a URL) is a `ValueError`."""
    texts, clips = _texts_and_clips(row)
    try:
        durations_s = [clip_duration(clip, extractor.sampling_rate) for clip in clips]
    except (OSError, RuntimeError, TypeError) as error:  # soundfile's errors are RuntimeErrors
        raise ValueError(
            f"Row {row.get('id')!r}: the length of its audio cannot be read without decoding it ({error}). Add a "
            "column `length` to the data, or leave train_sampling_strategy at 'random'."
        ) from error
    counts = [extractor.count_tokens(round(time * extractor.sampling_rate)) for time in durations_s]
    return round(sum(map(len, texts)) / CHARACTERS_PER_TOKEN) + sum(max(count, 1) for count in counts)


def clip_duration(source: object, sampling_rate: int) -> float:
    """Return the seconds of a clip: a path, bytes, a `datasets` dictionary, or an array at `sampling_rate` Hz."""
    if isinstance(source, Mapping):
        given = next((source[key] for key in ("bytes", "array", *AUDIO_KEYS) if source.get(key) is not None), None)
        return clip_duration(given, source.get("sampling_rate") or sampling_rate)
    if isinstance(source, (bytes, str)):
        info = soundfile.info(io.BytesIO(source) if isinstance(source, bytes) else source.removeprefix("file://"))
        return info.frames / info.samplerate
    if isinstance(source, (np.ndarray, Tensor, Sequence)):
        return max(np.shape(source)) / sampling_rate  # channels are the other, shorter axis
    raise TypeError(f"no length of {type(source).__name__}")


def _texts_and_clips(row: Mapping) -> tuple[list[str], list[object]]:
    if row.get("messages") is None:
        return [row.get("response") or ""], [row.get("audio")]
    contents = [message["content"] for message in row["messages"]]
    texts = [content for content in contents if isinstance(content, str)]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts += [part.get("text") or "" for part in parts if part["type"] == "text"]
    return texts, [part for part in parts if part["type"] == "audio"]
