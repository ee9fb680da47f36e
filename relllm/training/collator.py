"""Rows in, a batch out: conversations with audio, labels on the replies, emotion and dimension targets.

With a KL loss also what the teacher reads: the student's sequence with each run of audio positions replaced by the
transcript's tokens, so both hold the same reply, token by token, whatever the tokenizer would merge across the seam.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import BatchFeature

from relllm.labels import DIMENSIONS
from relllm.processing.processing_relllm import ReLLMProcessor, audio_parts
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT

from .augmentation import Augmentation
from .losses import IGNORE_INDEX
from .tower_cache import TowerCache


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
        teacher (`bool`, *optional*, defaults to `False`): Make the teacher's input from the column `text` (for the KL
            losses): the transcript, one of each clip; a row that lacks one has no teacher labels.
        augmentation ([`Augmentation`], *optional*): Of every clip, once it is read and before anything is counted;
            for training rows only.
        tower_cache ([`TowerCache`], *optional*): Clips that it has come as tower outputs, and have no features.
    """

    processor: ReLLMProcessor
    emotion_labels: Sequence[str]
    instruction: str = SPEECH_PROMPT
    system_prompt: str = SYSTEM_PROMPT
    teacher: bool = False
    augmentation: Augmentation | None = None
    tower_cache: TowerCache | None = None

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """Return a batch.

        Returns:
            `dict`: The model's inputs, padded on the right; `labels` `(batch, sequence)`; `emotion_labels` `(clips,)`,
            -100 where unlabelled; `dimension_labels` `(clips, 3)`, NaN where unlabelled; `clips_per_row` `(batch,)`.
            With `teacher` those of [`teacher_inputs`], with a `tower_cache` those of
            [`~relllm.training.tower_cache.TowerCache.look_up`].

        Raises:
            ValueError: On a row without a reply, an unknown emotion or a target outside [0, 1]; it names the row.
        """
        conversations = [self._conversation(row) for row in rows]
        clips = [len(audio_parts(conversation)) for conversation in conversations]
        audio_kwargs: dict[str, list[bool]] = {}
        of_towers: dict[str, Tensor] = {}
        if self.augmentation is not None or self.tower_cache is not None:
            conversations = cast("list[list[dict]]", self.processor.read_audio(conversations))
        if self.augmentation is not None:
            self._augment(rows, conversations, self.augmentation)
        if self.tower_cache is not None and any(clips):
            waveforms = [part["waveform"] for part in audio_parts(conversations)]
            audio_kwargs["only_counted"], of_towers = self.tower_cache.look_up(waveforms)
        features = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"text_kwargs": {"padding_side": "right"}, "audio_kwargs": audio_kwargs},
        )
        batch = dict(cast(BatchFeature, features)) | of_towers
        is_reply = torch.as_tensor(batch.pop("assistant_masks")).bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_reply, IGNORE_INDEX)
        emotions = [self._emotions(row, count) for row, count in zip(rows, clips, strict=True)]
        dimensions = [_dimensions(row, count) for row, count in zip(rows, clips, strict=True)]
        batch["emotion_labels"] = torch.tensor([label for labels in emotions for label in labels], dtype=torch.long)
        targets = [target for row_targets in dimensions for target in row_targets]
        batch["dimension_labels"] = torch.tensor(targets, dtype=torch.float32).reshape(-1, len(DIMENSIONS))
        batch["clips_per_row"] = torch.tensor(clips)
        if self.teacher:
            batch.update(self._teacher_inputs(rows, conversations, batch))
        return batch

    def _augment(self, rows: Sequence[Mapping], conversations: list[list[dict]], augmentation: Augmentation) -> None:
        """In place: `read_audio` has made copies. The teacher's transcripts stay as they are."""
        for row, turns in zip(rows, conversations, strict=True):
            for index, part in enumerate(audio_parts(turns)):
                part["waveform"] = augmentation(part["waveform"], row_id=row.get("id"), clip=index)

    def _teacher_inputs(
        self, rows: Sequence[Mapping], conversations: list[list[dict]], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Replace the audio by the transcripts where a row has one of each clip."""
        runs: list[list[list[int]] | None] = []
        for row, conversation in zip(rows, conversations, strict=True):
            texts = _per_clip(row, "text", len(audio_parts(conversation)))
            spoken = [self.processor.tokenizer(text or "", add_special_tokens=False)["input_ids"] for text in texts]
            clips = iter(spoken)
            groups = [[t for _ in range(size) for t in next(clips)] for size in group_clips(conversation)]
            runs.append(groups if spoken and all(spoken) else None)
        return teacher_inputs(
            batch["input_ids"],
            batch["labels"],
            batch["attention_mask"],
            runs=runs,
            audio_token_id=self.processor.audio_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )

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


def teacher_inputs(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor,
    *,
    runs: Sequence[Sequence[Sequence[int]] | None],
    audio_token_id: int,
    pad_token_id: int,
) -> dict[str, Tensor]:
    """The conversations with their transcripts in the place of the audio.

    Args:
        input_ids, labels, attention_mask (`torch.Tensor` of shape `(batch, sequence)`): Of the student, padded on the
            right.
        runs (`list`): For each row the transcript's tokens of each run of audio positions; `None` for a row without a
            transcript, which keeps its place in the batch and has no labels.
        audio_token_id, pad_token_id (`int`): Of the tokenizer.

    Returns:
        `dict`: `teacher_input_ids`, `teacher_attention_mask` and `teacher_labels`, all `(batch, T)`.

    Raises:
        ValueError: If a row has another number of runs than `runs` says.
    """
    columns: dict[str, list[Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row, transcript in enumerate(runs):
        length = int(attention_mask[row].sum())
        pairs = zip(input_ids[row, :length].tolist(), labels[row, :length].tolist(), strict=True)
        segments = [
            (is_audio, list(items)) for is_audio, items in itertools.groupby(pairs, lambda p: p[0] == audio_token_id)
        ]
        num_runs = sum(is_audio for is_audio, _ in segments)
        if transcript is not None and len(transcript) != num_runs:
            raise ValueError(
                f"Row {row} of the batch has {num_runs} runs of audio positions and {len(transcript)} groups of "
                "clips. Does the chat template write something between the clips of a message, or leave one out?"
            )
        spoken = iter(transcript or [[]] * num_runs)
        tokens: list[tuple[int, int]] = []  # id, label
        for is_audio, items in segments:
            if is_audio:
                tokens += [(token, IGNORE_INDEX) for token in next(spoken)]
            else:
                tokens += [(token, IGNORE_INDEX if transcript is None else label) for token, label in items]
        columns["input_ids"].append(torch.tensor([token for token, _ in tokens]))
        columns["attention_mask"].append(torch.ones(len(tokens), dtype=torch.long))
        columns["labels"].append(torch.tensor([label for _, label in tokens]))
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        f"teacher_{name}": pad(rows, batch_first=True, padding_value=padding[name]) for name, rows in columns.items()
    }


def group_clips(conversation: Sequence[dict]) -> list[int]:
    """How many clips stand side by side in each place of a conversation that has audio: one run of positions each."""
    groups: list[int] = []
    for message in conversation:
        beside = False
        for part in message["content"] if not isinstance(message["content"], str) else []:
            if part["type"] == "audio":
                if beside:
                    groups[-1] += 1
                else:
                    groups.append(1)
                beside = True
            elif part.get("text"):
                beside = False
    return groups


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


def _name(row: Mapping) -> str:
    return f"Row {row['id']!r}" if row.get("id") is not None else f"A row with the columns {sorted(row)}"
