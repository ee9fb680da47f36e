"""How long a row is, without decoding its audio: for batches of rows that are about equally long.

Audio is measured by its header, text by its characters. The unit is the position in the LLM's sequence.
"""

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
    """About how many positions each row takes in the LLM's sequence.

    Args:
        dataset (`datasets.Dataset`): Rows as [`~relllm.training.collator.ReLLMCollator`] takes them, their audio left
            undecoded.
        extractor ([`ReLLMFeatureExtractor`]): The processor's.

    Raises:
        ValueError: If a clip's header cannot be read; it names the row. A URL is not fetched.
    """
    columns = [name for name in ("id", "audio", "response", "messages") if name in dataset.column_names]
    return [row_length(row, extractor) for row in dataset.select_columns(columns)]


def row_length(row: Mapping, extractor: ReLLMFeatureExtractor) -> int:
    """See [`row_lengths`]."""
    texts, clips = _texts_and_clips(row)
    num_characters = sum(len(text) for text in texts)
    try:
        durations_s = [clip_duration(clip, extractor.sampling_rate) for clip in clips]
    except (OSError, RuntimeError, TypeError) as error:  # soundfile's errors are RuntimeErrors
        raise ValueError(
            f"Row {row.get('id')!r}: the length of its audio cannot be read without decoding it ({error}). Add a "
            "column `length` to the data, or leave train_sampling_strategy at 'random'."
        ) from error
    return round(num_characters / CHARACTERS_PER_TOKEN) + sum(_positions(time, extractor) for time in durations_s)


def clip_duration(source: object, sampling_rate: int) -> float:
    """Seconds of a clip.

    Args:
        source: A path, bytes, a `datasets` dictionary (`path`, `bytes` or `array`), or an array.
        sampling_rate (`int`): Of a bare array, in Hz.

    Raises:
        TypeError: If the source is nothing of these.
        OSError, RuntimeError: As soundfile raises them.
    """
    if isinstance(source, Mapping):
        given = next((source[key] for key in ("bytes", "array", *AUDIO_KEYS) if source.get(key) is not None), None)
        return clip_duration(given, source.get("sampling_rate") or sampling_rate)
    if isinstance(source, (bytes, str)):
        info = soundfile.info(io.BytesIO(source) if isinstance(source, bytes) else source.removeprefix("file://"))
        return info.frames / info.samplerate
    if isinstance(source, (np.ndarray, Tensor, Sequence)):
        return max(np.shape(source)) / sampling_rate  # channels are the other, shorter axis
    raise TypeError(f"no length of {type(source).__name__}")


def _positions(duration_s: float, extractor: ReLLMFeatureExtractor) -> int:
    return max(extractor.count_tokens(round(duration_s * extractor.sampling_rate)), 1)


def _texts_and_clips(row: Mapping) -> tuple[list[str], list[object]]:
    if row.get("messages") is None:
        return [row.get("response") or ""], [row.get("audio")]
    contents = [message["content"] for message in row["messages"]]
    texts = [content for content in contents if isinstance(content, str)]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    texts += [part.get("text") or "" for part in parts if part["type"] == "text"]
    return texts, [part for part in parts if part["type"] == "audio"]


__all__ = ["CHARACTERS_PER_TOKEN", "clip_duration", "row_length", "row_lengths"]
