"""Rows in, a batch out: conversations with audio, labels on the replies, emotion and dimension targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relllm.labels import DIMENSIONS
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT

IGNORE_INDEX = -100


@dataclass
class ReLLMCollator:
    """Makes training batches.

    A row is one of a corpus (`audio`, `response`, and where known `emotion`, `arousal`, `dominance`, `valence`), or a
    TRL conversation (`messages` with audio parts) with the same labels beside it. Token labels are on the assistant's
    words and the end of its turn, and nowhere else.

    Args:
        processor ([`ReLLMProcessor`]): The model's.
        emotion_labels (`list[str]`): `model.config.emotion_labels`.
        instruction, system_prompt (`str`): Of rows without `messages`.
    """

    processor: ReLLMProcessor
    emotion_labels: Sequence[str]
    instruction: str = SPEECH_PROMPT
    system_prompt: str = SYSTEM_PROMPT

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """
        Returns:
            `dict`: The model's inputs, padded on the right; `labels` `(batch, sequence)`; `emotion_labels` `(clips,)`,
            -100 where unlabelled; `dimension_labels` `(clips, 3)`, NaN where unlabelled.

        Raises:
            ValueError: On a row without a reply, an unknown emotion or a target outside [0, 1]; it names the row.
        """
        conversations = [self._conversation(row) for row in rows]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"text_kwargs": {"padding_side": "right"}},
        )
        is_reply = torch.as_tensor(batch.pop("assistant_masks")).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_reply, IGNORE_INDEX)
        clips = [_count_clips(conversation) for conversation in conversations]
        emotions = [self._emotions(row, count) for row, count in zip(rows, clips, strict=True)]
        dimensions = [_dimensions(row, count) for row, count in zip(rows, clips, strict=True)]
        batch["emotion_labels"] = torch.tensor([label for labels in emotions for label in labels], dtype=torch.long)
        targets = [target for row_targets in dimensions for target in row_targets]
        batch["dimension_labels"] = torch.tensor(targets, dtype=torch.float32).reshape(-1, len(DIMENSIONS))
        return dict(batch)

    def _conversation(self, row: Mapping) -> list[dict]:
        if row.get("messages") is not None:
            if not any(message["role"] == "assistant" for message in row["messages"]):
                raise ValueError(f"{_name(row)} has `messages` without an assistant turn: there is nothing to learn.")
            return list(row["messages"])
        if row.get("audio") is None or row.get("response") is None:
            raise ValueError(
                f"{_name(row)} needs `audio` and `response` (the reply to learn), or `messages`; it has "
                f"{sorted(name for name, value in row.items() if value is not None)}."
            )
        return self.processor.build_conversation(
            row["audio"],
            instruction=self.instruction,
            system_prompt=self.system_prompt,
            response=row["response"],
        )

    def _emotions(self, row: Mapping, num_clips: int) -> list[int]:
        names = _per_clip(row, "emotion", num_clips)
        unknown = sorted({name for name in names if name is not None} - set(self.emotion_labels))
        if unknown:
            raise ValueError(
                f"{_name(row)} has the emotion {unknown}, which is not of the model's {list(self.emotion_labels)}. "
                "Map it to one of them, or set it to None."
            )
        return [IGNORE_INDEX if name is None else list(self.emotion_labels).index(name) for name in names]


def _dimensions(row: Mapping, num_clips: int) -> list[list[float]]:
    columns = [_per_clip(row, name, num_clips) for name in DIMENSIONS]
    targets = [
        [float("nan") if value is None else float(value) for value in clip] for clip in zip(*columns, strict=True)
    ]
    for clip in targets:
        outside = [value for value in clip if value < 0 or value > 1]
        if outside:
            raise ValueError(f"{_name(row)} has dimension targets {outside} outside [0, 1]. Normalise them first.")
    return targets


def _per_clip(row: Mapping, name: str, num_clips: int) -> list:
    """A label for each clip: a list with one each, or a single value where the row has one clip."""
    value = row.get(name)
    if value is None:
        return [None] * num_clips
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) != num_clips:
        raise ValueError(f"{_name(row)} has {len(values)} values of {name!r} for {num_clips} clips. Give one each.")
    return values


def _count_clips(conversation: list[dict]) -> int:
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return sum(part["type"] == "audio" for content in contents for part in content)


def _name(row: Mapping) -> str:
    return f"Row {row['id']!r}" if row.get("id") is not None else f"A row with the columns {sorted(row)}"


__all__ = ["ReLLMCollator"]
