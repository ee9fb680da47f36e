"""Rows in, a batch out: conversations with audio, labels on the replies, emotion and dimension targets.

With a KL loss also what the teacher reads: the student's sequence with each run of audio positions replaced by the
transcript's tokens, so both hold the same reply, token by token, whatever the tokenizer would merge across the seam.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import BatchFeature

from relllm.data.survey import only_one
from relllm.labels import DIMENSIONS
from relllm.processing.processing_relllm import AUDIO_KEYS, ReLLMProcessor, audio_parts
from relllm.processing.prompts_relllm import TRANSCRIPTION_PROMPT, ask_about, recognition_prompt
from relllm.tower_outputs import TowerCache

from .augmentation import Augmentation
from .losses import IGNORE_INDEX
from .tasks import GIVEN_TASK, TaskMix

NO_LABELS = dict.fromkeys(("emotion", "emotion_votes", *DIMENSIONS))
AUDIO_PLACE = "<audio>"  # where a clip stands in the text of LLaMA-Factory's and ms-swift's messages


@dataclass
class ReLLMCollator:
    """Makes training batches.

    A row is one of a corpus (`audio`, `response`, and where known `emotion`, `arousal`, `dominance`, `valence`), or a
    TRL conversation (`messages`; see [`place_clips`]) with the same labels beside it. Token labels are on the
    assistant's words and the end of its turn, and nowhere else.

    With a `mix` a row may be taught as another task than its reply: the question that `relllm evaluate` asks of the
    emotion, answered by the label, or the transcript.
    """

    processor: ReLLMProcessor
    emotion_labels: Sequence[str]  # those of `model.config`
    teacher: bool = False  # make the teacher's input from the column `text`: transcripts, one of each clip
    replies: bool = True  # whether rows need one: the heads learn without
    augmentation: Augmentation | None = None  # of every clip, once it is read and before anything is counted
    mix: TaskMix | None = None  # of the tasks; without one each row is a reply
    votes: bool = False  # whether raters' votes, where a row has them, are the emotion's targets
    tower_cache: TowerCache | None = None  # clips that it has come as tower outputs, and have no features

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        """Return a batch.

        Returns:
            `dict`: The model's inputs, padded on the right, with `audio_positions`; `labels` `(batch, sequence)`;
            `emotion_labels` `(clips,)`, -100 where unlabelled; with `votes` `emotion_votes` `(clips, classes)`;
            `dimension_labels` `(clips, 3)`, NaN where unlabelled; `clips_per_row` `(batch,)`. With a `mix` `row_tasks`
            `(batch,)`, with `teacher` those of `TEACHER_INPUTS`, with a `tower_cache` those of [`TowerCache.look_up`].
        """
        given = [self._task(row) for row in rows]
        tasks = [task for task, _ in given]
        conversations = [self.build(row, task) for row, task in zip(rows, tasks, strict=True)]
        clips = [len(audio_parts(conversation)) for conversation in conversations]
        known: list[bool] | None = None
        of_towers: dict[str, Tensor] = {}
        if self.augmentation is not None or self.tower_cache is not None:
            conversations = cast("list[list[dict]]", self.processor.read_audio(conversations))
        if self.augmentation is not None:
            self._augment(rows, conversations, self.augmentation)
        if self.tower_cache is not None and any(clips):
            waveforms = [part["waveform"] for part in audio_parts(conversations)]
            known, of_towers = self.tower_cache.look_up(waveforms)
        batch = self.tokenize(rows, conversations, known) | of_towers
        is_reply = torch.as_tensor(batch.pop("assistant_masks")).bool()
        if not is_reply.any():
            raise ValueError(
                "No token of the batch is a reply's. Does the processor's chat template put replies and their ends "
                "between {% generation %} and {% endgeneration %}? `from_config` without `chat_template` makes one."
            )
        batch["audio_positions"] = (batch["input_ids"] == self.processor.audio_token_id).flatten().nonzero().squeeze(1)
        batch["labels"] = batch["input_ids"].masked_fill(~is_reply, IGNORE_INDEX)
        # a clip that comes again, as another task, has been counted in the losses of the heads
        labelled = [{**row, **NO_LABELS} if again else row for row, (_, again) in zip(rows, given, strict=True)]
        batch |= self.label_clips(labelled, clips)
        if self.mix is not None:
            batch["row_tasks"] = torch.tensor([self.mix.names.index(task) for task in tasks])
        if self.teacher:
            heard = [row if task == "reply" else {"id": row.get("id")} for row, task in zip(rows, tasks, strict=True)]
            batch.update(self._teacher_inputs(heard, conversations, batch))
        return batch

    def label_clips(self, rows: Sequence[Mapping], clips: Sequence[int]) -> dict[str, Tensor]:
        """Return what the heads are to learn of rows with so many clips each, as of a batch."""
        emotions = [self._emotions(row, count) for row, count in zip(rows, clips, strict=True)]
        labels = {"emotion_labels": torch.tensor([label for own in emotions for label in own], dtype=torch.long)}
        if self.votes:
            shares = [share for row, own in zip(rows, emotions, strict=True) for share in self._votes(row, own)]
            labels["emotion_votes"] = torch.tensor(shares, dtype=torch.float32).reshape(-1, len(self.emotion_labels))
        targets = [clip for row, count in zip(rows, clips, strict=True) for clip in _dimension_targets(row, count)]
        labels["dimension_labels"] = torch.tensor(targets, dtype=torch.float32).reshape(-1, len(DIMENSIONS))
        return labels | {"clips_per_row": torch.tensor(clips)}

    def tokenize(
        self, rows: Sequence[Mapping], conversations: list[list[dict]], only_counted: list[bool] | None
    ) -> dict[str, Tensor]:
        """Return the model's inputs of conversations with their replies, and `assistant_masks`; clips that are
        `only_counted` get no features.
        """
        features = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "text_kwargs": {"padding_side": "right"},
                "audio_kwargs": {} if only_counted is None else {"only_counted": only_counted},
            },
        )
        return dict(cast(BatchFeature, features))

    def _augment(self, rows: Sequence[Mapping], conversations: list[list[dict]], augmentation: Augmentation) -> None:
        """Augment in place: `read_audio` has made copies. The teacher's transcripts stay as they are."""
        for row, conversation in zip(rows, conversations, strict=True):
            for index, part in enumerate(audio_parts(conversation)):
                part["waveform"] = augmentation(part["waveform"], row_id=row.get("id"), clip=index)

    def _teacher_inputs(
        self, rows: Sequence[Mapping], conversations: list[list[dict]], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return `TEACHER_INPUTS`, all `(batch, T)`; a row without each clip's transcript, or reply, has no labels."""
        lengths = batch["attention_mask"].sum(1).tolist()
        tokens, labels = [], []
        for index, (row, conversation) in enumerate(zip(rows, conversations, strict=True)):
            texts = _per_clip(row, "text", len(audio_parts(conversation)))
            spoken = [self.processor.tokenizer(text or "", add_special_tokens=False)["input_ids"] for text in texts]
            clips = iter(spoken)
            runs = [[token for _ in range(size) for token in next(clips)] for size in _group_clips(conversation)]
            heard = (batch[name][index, : lengths[index]].tolist() for name in ("input_ids", "labels"))
            known = bool(spoken) and all(spoken)
            read = list(self._read_instead(list(zip(*heard, strict=True)), runs if known else None, _name(row)))
            tokens.append(torch.tensor([token for token, _ in read]))
            labels.append(torch.tensor([label if known else IGNORE_INDEX for _, label in read]))
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "teacher_input_ids": pad(tokens, padding_value=self.processor.tokenizer.pad_token_id),
            "teacher_attention_mask": pad([torch.ones_like(row) for row in tokens]),
            "teacher_labels": pad(labels, padding_value=IGNORE_INDEX),
        }

    def _read_instead(
        self, heard: list[tuple[int, int]], runs: list[list[int]] | None, name: str
    ) -> Iterator[tuple[int, int]]:
        """Yield tokens and labels of a row, with each run of audio positions replaced by transcripts, or left out."""
        audio_token_id = self.processor.audio_token_id
        segments = [
            (is_audio, list(items)) for is_audio, items in itertools.groupby(heard, lambda p: p[0] == audio_token_id)
        ]
        num_runs = sum(is_audio for is_audio, _ in segments)
        if runs is not None and len(runs) != num_runs:
            raise ValueError(
                f"{name} has {num_runs} runs of audio positions and {len(runs)} groups of clips. Does the chat "
                "template write something between the clips of a message, or leave one out?"
            )
        spoken = iter(runs or [[]] * num_runs)
        for is_audio, items in segments:
            yield from ((token, IGNORE_INDEX) for token in next(spoken)) if is_audio else items

    def _task(self, row: Mapping) -> tuple[str, bool]:
        """Return what a row is taught as, and whether its clip has come before."""
        if self.mix is None:
            return "reply", False
        return row[GIVEN_TASK] if GIVEN_TASK in row else (self.mix.draw(row), False)

    def build(self, row: Mapping, task: str) -> list[dict]:
        """Return the conversation that a row is taught as, with its last reply."""
        if self.mix is not None and task != "reply":
            clip = _clip_of(row)
            if task == "recognition":
                options = self.mix.order(row, self.emotion_labels)
                prompt = recognition_prompt(options, in_order=not self.mix.draws_options)
                answer = only_one(row["emotion"])
            else:
                prompt, answer = TRANSCRIPTION_PROMPT, only_one(row["text"])
            return [*ask_about(prompt, clip), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        if row.get("messages") is not None:
            if self.replies and not any(message["role"] == "assistant" for message in row["messages"]):
                raise ValueError(f"{_name(row)} has `messages` without an assistant turn: there is nothing to learn.")
            return place_clips(row)
        response = row.get("response")
        if row.get("audio") is None or (response is None and self.replies):
            raise ValueError(
                f"{_name(row)} needs `audio` and `response` (the reply to learn), or `messages`; it has "
                f"{sorted(name for name, value in row.items() if value is not None)}."
            )
        return self.processor.build_conversation(row["audio"], response=response or "")

    def _emotions(self, row: Mapping, num_clips: int) -> list[int]:
        names = _per_clip(row, "emotion", num_clips)
        unknown = sorted({name for name in names if name is not None} - set(self.emotion_labels))
        if unknown:
            raise ValueError(
                f"{_name(row)} has the emotion {unknown}, which is not of the model's {list(self.emotion_labels)}. "
                "Map it to one of them, or set it to None."
            )
        return [IGNORE_INDEX if name is None else list(self.emotion_labels).index(name) for name in names]

    def _votes(self, row: Mapping, labels: list[int]) -> list[list[float]]:
        """Return the share of each class among a clip's votes for classes; without any, all on its label, or zeros."""
        is_one = len(labels) == 1
        given = [row.get("emotion_votes")] if is_one else _per_clip(row, "emotion_votes", len(labels))
        shares = []
        for label, votes in zip(labels, given, strict=True):
            counts = [list(votes or ()).count(name) for name in self.emotion_labels]
            if not any(counts) and label != IGNORE_INDEX:
                counts[label] = 1
            shares.append([count / max(sum(counts), 1) for count in counts])
        return shares


def place_clips(row: Mapping) -> list[dict]:
    """Return the `messages` of a row, with the clips of its columns `audio` (one) or `audios` (a list) in them.

    They fill, in order, the audio parts that name no clip and each `<audio>` in text; where there is neither, nor any
    clip in the messages, they begin the first user's message, as images do in TRL. Messages whose parts name their
    clips are returned as they are. Other clips there than in the columns, or another number, are a `ValueError`.
    """
    messages = [dict(message) for message in row["messages"]]
    clips = list(row.get("audios") or [row[name] for name in ("audio",) if row.get(name) is not None])
    named = [part[key] for part in audio_parts(messages) for key in AUDIO_KEYS if part.get(key) is not None]
    if named and clips and ({type(clip) for clip in (*clips, *named)} != {str} or clips != named):
        raise ValueError(f"{_name(row)} has clips in its columns and others in its messages. Leave one of them out.")
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    if named and any(AUDIO_PLACE in text for text in texts):
        raise ValueError(f"{_name(row)} has `{AUDIO_PLACE}` in text beside parts that name their clips. Name its too.")
    if named or not clips:
        return messages
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = _split_at_places(message["content"])
    places = audio_parts(messages)
    if not places:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError(f"{_name(row)} has {len(clips)} clips and no user's message to put them in.")
        places = [{"type": "audio"} for _ in clips]
        first["content"] = [*places, *first["content"]]
    if len(places) != len(clips):
        raise ValueError(
            f"{_name(row)} has {len(clips)} clips in its columns and {len(places)} places for them in its messages. "
            "Write one `<audio>`, or a part of type 'audio', for each."
        )
    filled = iter(clips)
    for message in messages:
        message["content"] = [
            {"type": "audio", "audio": next(filled)} if part["type"] == "audio" else part
            for part in message["content"]
        ]
    return messages


def _clip_of(row: Mapping) -> dict:
    """Return the only clip of a row, as a part of a message."""
    if row.get("messages") is None:
        return {"type": "audio", "audio": row["audio"]}
    parts = audio_parts(place_clips(row))
    if len(parts) != 1:
        raise ValueError(f"{_name(row)} has one `emotion` or `text` and {len(parts)} clips. Give a list, one a clip.")
    return dict(parts[0])


def _split_at_places(text: str) -> list[dict]:
    """Return a text as parts, with an audio part at each `<audio>`."""
    parts: list[dict] = []
    for index, piece in enumerate(text.split(AUDIO_PLACE)):
        parts += [{"type": "audio"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _group_clips(conversation: Sequence[dict]) -> list[int]:
    """Return how many clips stand side by side in each place that has audio: one run of positions each."""
    groups: list[int] = []
    for message in conversation:
        parts = message["content"] if not isinstance(message["content"], str) else []
        are_audio = [part["type"] == "audio" for part in parts if part["type"] == "audio" or part.get("text")]
        groups += [len(list(run)) for is_audio, run in itertools.groupby(are_audio) if is_audio]
    return groups


def _dimension_targets(row: Mapping, num_clips: int) -> list[list[float]]:
    columns = [_per_clip(row, name, num_clips) for name in DIMENSIONS]
    targets = [[float("nan") if one is None else float(one) for one in clip] for clip in zip(*columns, strict=True)]
    for clip in targets:
        if outside := [value for value in clip if value < 0 or value > 1]:
            raise ValueError(f"{_name(row)} has dimension targets {outside} outside [0, 1]. Normalise them first.")
    return targets


def _per_clip(row: Mapping, name: str, num_clips: int) -> list:
    """Return a label for each clip: a list with one each, or a single value where the row has one clip."""
    value = row.get(name)
    if value is None:
        return [None] * num_clips
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) != num_clips:
        raise ValueError(f"{_name(row)} has {len(values)} values of {name!r} for {num_clips} clips. Give one each.")
    return values


def _name(row: Mapping) -> str:
    return f"Row {row['id']!r}" if row.get("id") is not None else f"A row with the columns {sorted(row)}"
