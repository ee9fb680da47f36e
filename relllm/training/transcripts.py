"""Transcripts as tokens: what the teacher reads in the place of the audio.

The teacher's sequence is the student's with each run of audio positions replaced by the transcript's tokens, so both
hold the same reply, token by token, whatever the tokenizer would merge across the seam.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import IGNORE_INDEX


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


__all__ = ["group_clips", "teacher_inputs"]
