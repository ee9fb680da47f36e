"""ESD as rows: twenty speakers who read the same 350 sentences in each of five emotions, in English and Mandarin.

[Emotion Speech Dataset/]0011/Angry/[train|test|evaluation/]0011_000351.wav
(or, in mirrors, the split first: train/0011/Angry/0011_000351.wav; or no folders at all)
[Emotion Speech Dataset/]0011/0011.txt               0011_000351<tab>text<tab>Angry
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .. import parsing
from ..data_settings import EsdSettings
from ..rows import Corpus, Dropped, Row, make_row
from .patterns import CORPUS_FACTS

FACTS = CORPUS_FACTS["esd"]
BLOCKS = ("neutral", "angry", "happy", "sad", "surprise")  # of 350 numbers each, from 1
BLOCK_SIZE = 350
SPLIT_FOLDERS = {"train": "train", "test": "test"}  # as this package names the splits
SPLIT_FOLDERS |= dict.fromkeys(("evaluation", "eval", "validation", "valid", "val", "dev"), "validation")

CONTRADICTION = "folder contradicts the number"
NO_SPLIT_FOLDER = "not in a split folder"
NO_CLIP_NAME = "file name is not of the corpus"

_SPEAKER = re.compile(r"\d{4}", flags=re.ASCII)
_CLIP = re.compile(r"(\d{4})_(\d{6})", flags=re.ASCII)
# The emotion stands behind a tab. Behind a space only what is certainly one: a text must not lose its last word.
_LINE = re.compile(r"(\d{4}_\d{6})\s+(.*\S)(?:\s*\t\s*(\S+)|\s+(Neutral|Angry|Happy|Sad|Surprise))")
_SPEAKERS_OF = {"zh": range(1, 11), "en": range(11, 21)}


@dataclass(frozen=True)
class _Clip:
    id: str
    path: str
    emotion: str  # this and the split by the number; the folders may say otherwise
    split: str
    folder_emotion: str | None
    folder_split: str | None


@dataclass(frozen=True)
class _Line:
    text: str
    emotion: str | None  # `None` where the name is not ours, as in the Mandarin files
    where: str


def parse_esd(settings: EsdSettings) -> Corpus:
    """Read the listings and the transcripts of ESD, which has no dimensions.

    The emotion is that of the number's block, and a clip in the folder of another one is dropped. A clip without a
    transcript is kept without a text. With `leave_speakers_out` the clips of these are `"test"`; of the other speakers
    the evaluation clips are `"validation"` and all else is `"train"`. A `root` of something else, and settings that it
    has nobody or nothing for, are a `ValueError`.
    """
    root = parsing.find_tree(settings.root, _locate, "speakers' folders 0001/ to 0020/, or one folder that has them")
    language = {"all": "mul"}.get(settings.language, settings.language)
    corpus = Corpus(facts=replace(FACTS, language=language), rows=[], dropped=[], notes=[])
    speakers = _choose_speakers(root, settings, corpus)
    clips = _find_clips(root, speakers, corpus.dropped)
    lines = _read_transcripts(root, speakers, corpus)
    if settings.splits == "folders" and not any(clip.folder_split for clip in clips.values()):
        raise ValueError(f"splits='folders', but {root} has no folders {', '.join(SPLIT_FOLDERS)}. Use 'numbers'.")
    for clip in clips.values():
        corpus.add(_clip_to_row(clip, lines.get(clip.id), settings))
    corpus.dropped += [
        Dropped(name, parsing.NO_AUDIO, line.where) for name, line in lines.items() if name not in clips
    ]
    _describe(corpus, clips, lines, "the number" if settings.splits == "numbers" else "the folder")
    return corpus


def _locate(folder: Path) -> Path | None:
    """Find the folder itself, or the only one in it that has speakers' folders."""
    if not folder.is_dir():
        return None
    if (folder.name.lower() in SPLIT_FOLDERS or not _is_ours(folder.name)) and _has_speakers(folder):
        return folder
    inner = [name for name in parsing.list_folder(folder)[0] if not _is_ours(name) and _has_speakers(folder / name)]
    return folder / inner[0] if len(inner) == 1 else None


def _has_speakers(folder: Path, *, deeper: bool = True) -> bool:
    """Return whether folders of speakers are here, clips, or folders of splits or emotions that have them."""
    try:
        folders, files = parsing.list_folder(folder)
    except PermissionError:  # a disk's `lost+found` beside the corpus
        return False
    if any(_SPEAKER.fullmatch(name) for name in folders) or any(_CLIP.match(name) for name in files):
        return True
    return deeper and any(_has_speakers(folder / name, deeper=False) for name in folders if _is_ours(name))


def _is_ours(name: str) -> bool:
    """Return whether a folder's name is that of a speaker, a split or an emotion."""
    return bool(_SPEAKER.fullmatch(name)) or name.lower() in (*SPLIT_FOLDERS, *BLOCKS)


def _walk(root: Path) -> Iterator[Path]:
    """Yield the folders of the corpus, deeper ones first and the root last, and nothing that lies beside them."""
    for name in parsing.list_folder(root)[0]:
        if _is_ours(name):
            yield from parsing.walk_folders(root / name)
    yield root


def _language_of(speaker: str) -> str | None:
    return next((language for language, numbers in _SPEAKERS_OF.items() if int(speaker) in numbers), None)


def _choose_speakers(root: Path, settings: EsdSettings, corpus: Corpus) -> list[str]:
    wanted = _SPEAKERS_OF if settings.language == "all" else (settings.language,)
    found = {part for folder in _walk(root) for part in folder.relative_to(root).parts if _SPEAKER.fullmatch(part)}
    names = (name for folder in _walk(root) for name in parsing.list_audio(folder))
    found |= {parsed[1] for name in names if (parsed := _CLIP.match(name))}
    chosen = [name for name in sorted(found) if _language_of(name) in wanted]
    show = parsing.name_some
    if not chosen:
        raise ValueError(f"{root} has the speakers {show(sorted(found))}, none of the language {settings.language!r}.")
    if strangers := [name for name in settings.leave_speakers_out if name not in chosen]:
        raise ValueError(f"leave_speakers_out has {show(strangers)}; the speakers are {show(chosen)}.")
    others = sorted(found.difference(chosen))
    parsing.note(corpus, others, f"Speakers left out, for language={settings.language!r}: {{names}}.")
    return chosen


def _find_clips(root: Path, speakers: list[str], dropped: list[Dropped]) -> dict[str, _Clip]:
    """Clips by id. Deeper folders come first: of a clip that lies there twice, the one in a split folder is taken."""
    clips: dict[str, _Clip] = {}
    for folder in _walk(root):
        parts = [part.lower() for part in folder.relative_to(root).parts]
        emotion = next((part for part in parts if part in BLOCKS), None)
        split = next((SPLIT_FOLDERS[part] for part in parts if part in SPLIT_FOLDERS), None)
        owner = next((part for part in parts if _SPEAKER.fullmatch(part)), None)
        for name, path in parsing.list_audio(folder).items():
            parsed = _CLIP.fullmatch(name)
            if (owner or (parsed and parsed[1])) not in (*speakers, None):
                continue
            is_number = parsed is not None and 1 <= int(parsed[2]) <= BLOCK_SIZE * len(BLOCKS)
            if parsed is None or not is_number or owner not in (None, parsed[1]):
                dropped.append(Dropped(name, NO_CLIP_NAME, path))
            elif name in clips:
                dropped.append(Dropped(name, parsing.REPEATED, f"{path}, taken from {clips[name].path}"))
            else:
                clips[name] = _Clip(name, path, *_read_number(int(parsed[2])), emotion, split)
    return clips


def _read_number(number: int) -> tuple[str, str]:
    """Emotion and split of 1 to 1750: within an emotion 20 are for evaluation, 30 for the test, 300 for training."""
    block, position = divmod(number - 1, BLOCK_SIZE)
    return BLOCKS[block], "validation" if position < 20 else "test" if position < 50 else "train"


def _read_transcripts(root: Path, speakers: list[str], corpus: Corpus) -> dict[str, _Line]:
    lines: dict[str, _Line] = {}
    guessed, strange = [], []
    texts = {name: folder / name for folder in _walk(root) for name in parsing.list_folder(folder)[1]}
    for speaker in speakers:
        path = texts.get(f"{speaker}.txt")
        if path is None:
            corpus.notes.append(f"No transcripts of speaker {speaker}: there is no {speaker}.txt.")
            continue
        # Mandarin that is not Unicode is in GB2312, which GB18030 holds.
        content, encoding = parsing.read_lines(path, ["gb18030"] if _language_of(speaker) == "zh" else ())
        if not encoding.startswith("utf"):
            guessed.append(f"{path.name} as {encoding}")
        for number, line in enumerate(content, start=1):
            where = f"{path.relative_to(root)}:{number}"
            parsed = _LINE.fullmatch(line)
            if line and parsed is None:
                corpus.dropped.append(Dropped(where, parsing.BAD_LINE, f"{line:.100}"))
            elif parsed and (first := lines.get(parsed[1])):
                corpus.dropped.append(Dropped(where, parsing.REPEATED, f"{parsed[1]}, first in {first.where}"))
            elif parsed:
                name = parsed[3] or parsed[4]
                emotion = name.lower() if name.lower() in BLOCKS else None
                strange += [] if emotion else [name]
                lines[parsed[1]] = _Line(parsed[2], emotion, where)
    parsing.note(corpus, guessed, "Transcripts that are not UTF-8 were read: {names}.")
    unknown = (f"{name!r} ({count:,} lines)" for name, count in Counter(strange).items())
    parsing.note(corpus, unknown, "Emotions in the transcripts that are not compared with the number: {names}.")
    return lines


def _clip_to_row(clip: _Clip, line: _Line | None, settings: EsdSettings) -> Row | Dropped:
    if clip.folder_emotion not in (None, clip.emotion):
        return Dropped(clip.id, CONTRADICTION, f"number: {clip.emotion}, folder: {clip.folder_emotion} ({clip.path})")
    if parsing.is_outside(clip.emotion, settings.label_set):
        return Dropped(clip.id, parsing.OUTSIDE_SET, clip.emotion)
    splits = {"numbers": clip.split, "folders": clip.folder_split, "auto": clip.folder_split or clip.split}
    split, speaker = splits[settings.splits], clip.id[:4]
    if split is None:
        return Dropped(clip.id, NO_SPLIT_FOLDER, clip.path)
    if speaker in settings.leave_speakers_out:
        split = "test"
    elif settings.leave_speakers_out and split != "validation":
        split = "train"
    known = {"emotion": clip.emotion, "speaker": speaker, "split": split, "language": _language_of(speaker)}
    return make_row(id=clip.id, audio=clip.path, text=line.text if line else None, **known)


def _describe(corpus: Corpus, clips: Mapping[str, _Clip], lines: Mapping[str, _Line], winner: str) -> None:
    kept = [(clips[row["id"]], lines.get(row["id"])) for row in corpus.rows]
    moved = [clip for clip, _ in kept if clip.folder_split not in (None, clip.split)]
    named = [f"{clip.id} (folder {clip.folder_split}, number {clip.split})" for clip in moved]
    contradicts = "The split folder contradicts the number block of {count} clips, and"
    parsing.note(corpus, named, f"{contradicts} {winner} was taken: {{names}}.")
    told = [(clip, line) for clip, line in kept if line and line.emotion not in (None, clip.emotion)]
    renamed = [f"{clip.id} ({line.where}: {line.emotion})" for clip, line in told]
    other = "The transcripts name another emotion than number and folder for {count} clips, and the number was taken"
    parsing.note(corpus, renamed, f"{other}: {{names}}.")
    parsing.note(corpus, (clip.id for clip, line in kept if not line), "{count} clips have no transcript: {names}.")
