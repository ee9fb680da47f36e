"""How long a row is, by its audio's header and its characters, without decoding; batches of like length."""

from collections.abc import Iterable, Mapping

from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from relllm.data.clips import clip_duration
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor

from .collator import place_clips

CHARACTERS_PER_TOKEN = 4.0  # of English under the tokenizers of current LLMs


class GroupByLengthMixin(Trainer):
    """For `group_by_length` without a column of lengths; evaluations, which Transformers groups, keep their order."""

    def measure_rows(self, rows: Dataset) -> list[int]:
        """Return the length of each row, in any unit; its audio is left undecoded."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length" and isinstance(rows, Dataset)
        if not grouped or self.args.length_column_name in rows.column_names:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, dataset=rows, lengths=self.measure_rows(rows))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def row_lengths(dataset: Dataset, extractor: ReLLMFeatureExtractor) -> list[int]:
    """Return about how many positions each row takes in the LLM's sequence; its audio is left undecoded."""
    columns = [name for name in ("id", "audio", "audios", "response", "messages") if name in dataset.column_names]
    return [row_length(row, extractor) for row in dataset.select_columns(columns)]


def row_length(row: Mapping, extractor: ReLLMFeatureExtractor) -> int:
    """Return about how many positions a row takes; a clip whose header cannot be read (or a URL) is a `ValueError`."""
    texts, clips = [row.get("response") or ""], [row.get("audio")]
    if row.get("messages") is not None:
        contents = [message["content"] for message in place_clips(row)]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        texts = [content for content in contents if isinstance(content, str)]
        texts += [part.get("text") or "" for part in parts if part["type"] == "text"]
        clips = [part for part in parts if part["type"] == "audio"]
    try:
        durations_s = [clip_duration(clip, extractor.sampling_rate) for clip in clips]
    except (OSError, RuntimeError, TypeError) as error:  # soundfile's errors are RuntimeErrors
        raise ValueError(
            f"Row {row.get('id')!r}: the length of its audio cannot be read without decoding it ({error}). Add a "
            "column `length` to the data, or leave train_sampling_strategy at 'random'."
        ) from error
    counts = [extractor.count_tokens(round(time * extractor.sampling_rate)) for time in durations_s]
    return round(sum(map(len, texts)) / CHARACTERS_PER_TOKEN) + sum(max(count, 1) for count in counts)


def check_clip_limits(splits: Iterable[object], shortest_s: float, longest_s: float) -> None:
    """Raise a `ValueError` for clips that a model does not take, by the column `duration_s` where it is known."""
    for rows in splits:
        if not isinstance(rows, Dataset) or "duration_s" not in rows.column_names:
            continue
        times = [time if isinstance(time, float | int) else shortest_s for time in rows["duration_s"]]
        if beyond := [place for place, time in enumerate(times) if time < shortest_s or time > longest_s]:
            first = ", ".join(str(rows[place].get("id", place)) for place in beyond[:3])
            raise ValueError(
                f"{len(beyond)} clips do not last {shortest_s:g} to {longest_s:g} s, which the model takes (rows "
                f"{first}, …). Leave them out or cut them; max_duration_s sets the longest."
            )
