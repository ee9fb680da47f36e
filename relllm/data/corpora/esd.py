"""ESD as rows: twenty speakers who read the same 350 sentences in each of five emotions, in English and Mandarin.

What lives here: the layouts that circulate, the transcript files, the blocks of numbers, and the splits. What does
not: decoding audio, and writing the data set.

    [Emotion Speech Dataset/]0011/Angry/[train|test|evaluation/]0011_000351.wav
    [Emotion Speech Dataset/]0011/0011.txt               0011_000351<tab>text<tab>Angry

The number says the emotion, and within the 350 of an emotion the split: 20 evaluation, 30 test, 300 train. There are
no dimensions: `relllm annotate` writes pseudo-labels, as the paper used.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from relllm.labels import canonical_emotion

from ..parsing import (
    BAD_LINE,
    NO_AUDIO,
    OUTSIDE_SET,
    REPEATED,
    check_label_set,
    find_tree,
    is_outside,
    list_audio,
    list_folder,
    name_some,
    read_lines,
)
from ..rows import Corpus, CorpusFacts, Dropped, LabelSet, Row

FACTS = CorpusFacts(
    name="esd",
    title="ESD: Emotional Speech Database",
    language="en",
    licence="other",
    terms="Given on request by the HLT laboratory of the National University of Singapore, for research only.",
    homepage="https://hltsingapore.github.io/ESD/",
    citation="""@inproceedings{zhou2021seen,
  title = {Seen and unseen emotional style transfer for voice conversion with a new emotional speech dataset},
  author = {Zhou, Kun and Sisman, Berrak and Liu, Rui and Li, Haizhou},
  booktitle = {ICASSP 2021 - 2021 IEEE International Conference on Acoustics, Speech and Signal Processing (ICASSP)},
  pages = {920--924},
  year = {2021}
}""",
)
BLOCKS = ("neutral", "angry", "happy", "sad", "surprise")  # of 350 numbers each, from 1
BLOCK_SIZE = 350
NUM_EVALUATION, NUM_TEST = 20, 30  # at the beginning of a block; the rest is for training
SPLIT_FOLDERS = {"train": "train", "test": "test", "evaluation": "validation"}  # as this package names the splits

CONTRADICTION = "folder contradicts the number"
NO_SPLIT_FOLDER = "not in a split folder"
NO_CLIP_NAME = "file name is not of the corpus"

_TREE = "speakers' folders 0001/ to 0020/, or one folder that has them"
_SPEAKER = re.compile(r"\d{4}", flags=re.ASCII)
_CLIP = re.compile(r"(\d{4})_(\d{6})", flags=re.ASCII)
# The emotion stands behind a tab. Behind a space only what is certainly one: a text must not lose its last word.
_LINE = re.compile(r"(\d{4}_\d{6})\s+(.*\S)(?:\s*\t\s*(\S+)|\s+(Neutral|Angry|Happy|Sad|Surprise))")
_SPEAKERS_OF = {"zh": range(1, 11), "en": range(11, 21)}
_ENCODINGS = ("gb18030",)  # of Mandarin files that are not Unicode; it holds GB2312


@dataclass(frozen=True)
class _Clip:
    id: str
    speaker: str
    number: int  # 1 to 1750
    path: str
    folder_emotion: str | None
    folder_split: str | None


@dataclass(frozen=True)
class _Line:
    text: str
    emotion: str | None  # `None` where the name is not ours, as in the Mandarin files
    where: str


def parse_esd(
    root: Path,
    *,
    label_set: LabelSet,
    language: Literal["en", "zh", "all"] = "en",
    splits: Literal["auto", "numbers", "folders"] = "auto",
    held_out_speakers: Sequence[str] = (),
) -> Corpus:
    """Reads the listings and the transcripts of ESD.

    The emotion is that of the number's block, and a clip in the folder of another one is dropped. The transcripts
    are not needed for it: a clip without a line is kept without a text, and a line with another emotion is noted.

    Args:
        root (`Path`): The folder with the speakers' folders, or the one above it.
        label_set (`LabelSet`): All of ESD's emotions are in `"5"`.
        language (`"en"`, `"zh"` or `"all"`, *optional*, defaults to `"en"`): English are the speakers 0011 to 0020,
            as in the paper; Mandarin are 0001 to 0010.
        splits (`"auto"`, `"numbers"` or `"folders"`, *optional*, defaults to `"auto"`): Where the split is taken from.
            `"auto"`: the folder of a clip that is in one, else its number. Speakers are the same in all splits.
        held_out_speakers (`Sequence[str]`, *optional*): Their clips are the split `"test"`. Of the other speakers the
            evaluation clips are `"validation"` and all else is `"train"`. The sentences are the same for everybody.

    Returns:
        `Corpus`: Splits are `"train"`, `"validation"` (the folder `evaluation`) and `"test"`.

    Raises:
        ValueError: If `root` is something else, a choice is unknown, nobody there speaks the language or is to be held
            out, or `splits="folders"` where there are none.
    """
    check_label_set(label_set)
    if language not in ("en", "zh", "all") or splits not in ("auto", "numbers", "folders"):
        raise ValueError(
            f"language is {language!r}, expected 'en', 'zh' or 'all'; splits is {splits!r}, expected 'auto', "
            "'numbers' or 'folders'."
        )
    root = find_tree(root, _locate, _TREE)
    speakers, notes = _choose_speakers(root, language, held_out_speakers)
    corpus = Corpus(facts=FACTS if language == "en" else _facts_of(language), rows=[], dropped=[], notes=notes)
    clips = _find_clips(root, speakers, corpus.dropped)
    lines = _read_transcripts(root, speakers, corpus)
    if splits == "folders" and not any(clip.folder_split for clip in clips.values()):
        raise ValueError(f"splits='folders', but {root} has no folders {', '.join(SPLIT_FOLDERS)}. Use 'numbers'.")
    for clip in clips.values():
        made = _make_row(clip, lines.get(clip.id), label_set=label_set)
        split = _choose_split(clip, splits, held_out_speakers)
        if isinstance(made, Dropped):
            corpus.dropped.append(made)
        elif split is None:
            corpus.dropped.append(Dropped(clip.id, NO_SPLIT_FOLDER, clip.path))
        else:
            made["split"] = split
            corpus.rows.append(made)
    corpus.dropped += [Dropped(name, NO_AUDIO, line.where) for name, line in lines.items() if name not in clips]
    corpus.notes += _describe(corpus.rows, clips, lines, splits)
    return corpus


def _locate(folder: Path) -> Path | None:
    """The folder itself, or the only one in it that has speakers' folders."""
    if not folder.is_dir():
        return None
    if _has_speakers(folder):
        return folder
    inner = [name for name in list_folder(folder)[0] if _has_speakers(folder / name)]
    return folder / inner[0] if len(inner) == 1 else None


def _has_speakers(folder: Path) -> bool:
    try:
        return any(_SPEAKER.fullmatch(name) for name in list_folder(folder)[0])
    except PermissionError:  # a disk's `lost+found` beside the corpus
        return False


def _facts_of(language: str) -> CorpusFacts:
    return replace(FACTS, language="mul" if language == "all" else language)


def _language_of(speaker: str) -> str | None:
    return next((language for language, numbers in _SPEAKERS_OF.items() if int(speaker) in numbers), None)


def _choose_speakers(root: Path, language: str, held_out: Sequence[str]) -> tuple[list[str], list[str]]:
    wanted = _SPEAKERS_OF if language == "all" else (language,)
    present = [name for name in list_folder(root)[0] if _SPEAKER.fullmatch(name)]
    chosen = [name for name in present if _language_of(name) in wanted]
    if not chosen:
        raise ValueError(f"{root} has the speakers {name_some(present)}, none of the language {language!r}.")
    if strangers := [name for name in held_out if name not in chosen]:
        raise ValueError(f"held_out_speakers has {name_some(strangers)}; the speakers are {name_some(chosen)}.")
    others = [name for name in present if name not in chosen]
    return chosen, [f"Speakers left out, for language={language!r}: {name_some(others)}."] if others else []


def _find_clips(root: Path, speakers: list[str], dropped: list[Dropped]) -> dict[str, _Clip]:
    """Clips by id. Deeper folders come first: of a clip that lies there twice, the one in a split folder is taken."""
    clips: dict[str, _Clip] = {}
    for speaker in speakers:
        for folder in _walk(root / speaker):
            parts = [part.lower() for part in folder.relative_to(root / speaker).parts]
            emotion = next((part for part in parts if part in BLOCKS), None)
            split = next((SPLIT_FOLDERS[part] for part in parts if part in SPLIT_FOLDERS), None)
            for name, path in list_audio(folder).items():
                parsed = _CLIP.fullmatch(name)
                if parsed is None or parsed[1] != speaker or not 1 <= int(parsed[2]) <= BLOCK_SIZE * len(BLOCKS):
                    dropped.append(Dropped(name, NO_CLIP_NAME, path))
                elif name in clips:
                    dropped.append(Dropped(name, REPEATED, f"{path}, taken from {clips[name].path}"))
                else:
                    clips[name] = _Clip(name, speaker, int(parsed[2]), path, emotion, split)
    return clips


def _walk(folder: Path) -> Iterator[Path]:
    for name in list_folder(folder)[0]:
        yield from _walk(folder / name)
    yield folder


def _read_transcripts(root: Path, speakers: list[str], corpus: Corpus) -> dict[str, _Line]:
    lines: dict[str, _Line] = {}
    guessed, strange = [], Counter[str]()
    for speaker in speakers:
        path = root / speaker / f"{speaker}.txt"
        if not path.is_file():
            corpus.notes.append(f"No transcripts of speaker {speaker}: there is no {speaker}{os.sep}{speaker}.txt.")
            continue
        content, encoding = read_lines(path, _ENCODINGS if _language_of(speaker) == "zh" else ())
        if not encoding.startswith("utf"):
            guessed.append(f"{path.name} as {encoding}")
        for number, line in enumerate(content, start=1):
            where = f"{path.relative_to(root)}:{number}"
            parsed = _LINE.fullmatch(line)
            if line and parsed is None:
                corpus.dropped.append(Dropped(where, BAD_LINE, f"{line:.100}"))
            elif parsed and parsed[1] in lines:
                corpus.dropped.append(Dropped(where, REPEATED, f"{parsed[1]}, first in {lines[parsed[1]].where}"))
            elif parsed:
                name = parsed[3] or parsed[4]
                emotion = _name_emotion(name)
                strange[name] += emotion is None
                lines[parsed[1]] = _Line(parsed[2], emotion, where)
    if guessed:
        corpus.notes.append(f"Transcripts that are not UTF-8 were read: {name_some(guessed)}.")
    if unknown := [f"{name!r} ({count:,} lines)" for name, count in strange.items() if count]:
        corpus.notes.append(
            f"Emotions in the transcripts that are not compared with the number: {name_some(unknown)}."
        )
    return lines


def _name_emotion(name: str) -> str | None:
    try:
        emotion = canonical_emotion(name)
    except ValueError:
        return None
    return emotion if emotion in BLOCKS else None


def _make_row(clip: _Clip, line: _Line | None, *, label_set: LabelSet) -> Row | Dropped:
    emotion = _emotion_of(clip.number)
    if clip.folder_emotion not in (None, emotion):
        return Dropped(clip.id, CONTRADICTION, f"number: {emotion}, folder: {clip.folder_emotion} ({clip.path})")
    if is_outside(emotion, label_set):
        return Dropped(clip.id, OUTSIDE_SET, emotion)
    return Row(
        id=clip.id,
        audio=clip.path,
        text=line.text if line else None,
        response=None,
        emotion=emotion,
        arousal=None,
        dominance=None,
        valence=None,
        dimension_source=None,
        speaker=clip.speaker,
        session=None,
        split=None,
        language=_language_of(clip.speaker),
    )


def _emotion_of(number: int) -> str:
    return BLOCKS[(number - 1) // BLOCK_SIZE]


def _split_of_number(number: int) -> str:
    position = (number - 1) % BLOCK_SIZE  # 0 to 349, within the emotion
    if position < NUM_EVALUATION:
        return "validation"
    return "test" if position < NUM_EVALUATION + NUM_TEST else "train"


def _choose_split(clip: _Clip, splits: str, held_out_speakers: Sequence[str]) -> str | None:
    """`None` where the split is to come from the folders and the clip is in none."""
    by_number = _split_of_number(clip.number)
    split = {"numbers": by_number, "folders": clip.folder_split, "auto": clip.folder_split or by_number}[splits]
    if split is None or not held_out_speakers:
        return split
    if clip.speaker in held_out_speakers:
        return "test"
    return "validation" if split == "validation" else "train"


def _describe(rows: Sequence[Row], clips: Mapping[str, _Clip], lines: Mapping[str, _Line], splits: str) -> list[str]:
    notes = []
    kept = [clips[row["id"]] for row in rows]
    moved = [
        f"{clip.id} (folder {clip.folder_split}, number {_split_of_number(clip.number)})"
        for clip in kept
        if clip.folder_split not in (None, _split_of_number(clip.number))
    ]
    if moved:
        winner = "the number" if splits == "numbers" else "the folder"
        notes.append(
            f"The split folder contradicts the number block of {len(moved):,} clips, and {winner} was taken: "
            f"{name_some(moved)}."
        )
    renamed = [
        f"{clip.id} ({line.where}: {line.emotion})"
        for clip in kept
        if (line := lines.get(clip.id)) and line.emotion not in (None, _emotion_of(clip.number))
    ]
    if renamed:
        notes.append(
            f"The transcripts name another emotion than number and folder for {len(renamed):,} clips, and the number "
            f"was taken: {name_some(renamed)}."
        )
    if silent := [row["id"] for row in rows if row["text"] is None]:
        notes.append(f"{len(silent):,} clips have no transcript: {name_some(silent)}.")
    return notes
