"""MSP-Podcast as rows: turns of podcasts with categories, dimensions, speakers and the corpus's own splits.

Audios/MSP-PODCAST_0001_0008.wav      Transcripts/MSP-PODCAST_0001_0008.txt
Labels/labels_consensus.csv           or, up to 1.8, Labels.txt, Partitions.txt and Speaker_ids.txt
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .. import parsing
from ..data_settings import MspPodcastSettings
from ..parsing import Label, note
from ..rows import Corpus, Dropped, Row
from .patterns import CORPUS_FACTS

FACTS = CORPUS_FACTS["msp-podcast"]
HIDDEN_SPLIT = "test3"
# Every release has Test1: so `split="test"` is found as for every other corpus. Older ones write "Validation".
SPLITS = {"train": "train", "test1": "test"} | dict.fromkeys(("development", "dev", "validation"), "validation")
SPLITS |= {name: name for name in ("test2", HIDDEN_SPLIT)}
UNKNOWN_SPLIT = "unknown split"
EMOTION_LETTERS = {"A": "angry", "S": "sad", "H": "happy", "U": "surprise", "F": "fear", "D": "disgust"}
EMOTION_LETTERS |= {"C": "contempt", "N": "neutral", "O": "other", "X": "no agreement"}

# Old releases misspell the name of the file. Files and folders are found in lower and upper case.
AUDIO_FOLDERS = ("audios", "audio")
CSV_FILES = ("labels_consensus.csv", "labels_concensus.csv")
TEXT_FILES = ("labels.txt",)
PARTITION_FILES = ("partitions.txt", "partition.txt")
SPEAKER_FILES = ("speaker_ids.txt",)
DETAIL_FILES = ("labels_detailed.csv",)  # of single raters
COLUMNS_NEEDED = ("FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Split_Set")
_LETTERS = {"A": "arousal", "V": "valence", "D": "dominance"}


def parse_msp_podcast(settings: MspPodcastSettings) -> Corpus:
    """Read the labels, the transcripts and the listings of MSP-Podcast; the speaker of a turn may be `None`.

    A `root` of something else, and a CSV file that lacks a column, are a `ValueError`.
    """
    root = parsing.find_tree(settings.root, _locate, "Audios/ and Labels/labels_consensus.csv, or Labels.txt")
    corpus = Corpus(facts=FACTS, rows=[], dropped=[], notes=[])
    folder = _find_folder(root, AUDIO_FOLDERS)
    assert folder is not None  # or `find_tree` had refused
    audio = parsing.list_audio(folder)
    labels = parsing.keep_first(_read_labels(root, corpus), corpus)
    partition = _read_pairs(root, PARTITION_FILES)
    for stem in audio:
        if stem not in labels and SPLITS.get(partition.get(stem, "").lower()) == HIDDEN_SPLIT:
            labels[stem] = Label(stem, "", {}, "Partitions", split=partition[stem])
    for label in labels.values():
        corpus.add(_label_to_row(label, audio.get(label.id), corpus, settings))
    parsing.drop_unlabelled(corpus, labels, audio)
    _add_transcripts(root, corpus)
    hidden = (row["id"] for row in corpus.rows if row["dimension_source"] is None)
    note(corpus, hidden, f"The labels of {{count}} turns of {HIDDEN_SPLIT} are hidden; their rows have none.")
    unknown = (row["id"] for row in corpus.rows if row["speaker"] is None)
    note(corpus, unknown, "The speaker of {count} turns is unknown: whether they overlap splits cannot be told.")
    return corpus


def _locate(folder: Path) -> Path | None:
    if not folder.is_dir() or _find_folder(folder, AUDIO_FOLDERS) is None:
        return None
    return folder if _find_file(folder, CSV_FILES + TEXT_FILES) else None


def _find_folder(root: Path, wanted: tuple[str, ...]) -> Path | None:
    return next((root / name for name in parsing.list_folder(root)[0] if name.lower() in wanted), None)


def _find_file(root: Path, names: tuple[str, ...]) -> Path | None:
    """Find the first of the names that is in the root or in `Labels`, whatever its case."""
    folders, files = parsing.list_folder(root)
    paths = [root / name for name in files]
    for folder in (root / name for name in folders if name.lower() in ("labels", "label")):
        paths += [folder / name for name in parsing.list_folder(folder)[1]]
    return next((path for wanted in names for path in paths if path.name.lower() == wanted), None)


def _read_labels(root: Path, corpus: Corpus) -> Iterable[Label | Dropped]:
    if path := _find_file(root, CSV_FILES):
        return _parse_csv(path, root)
    path = _find_file(root, TEXT_FILES)
    assert path is not None  # or `find_tree` had refused
    for names, lost in ((PARTITION_FILES, "splits"), (SPEAKER_FILES, "speakers")):
        if _find_file(root, names) is None:
            missing = f"{path.name} names no {lost}, and {names[0]} is not there"
            corpus.notes.append(f"{missing}: that of every turn is unknown.")
    return _parse_text(path, root)


def _parse_csv(path: Path, root: Path) -> Iterator[Label | Dropped]:
    """Line by line: with the `csv` module one stray quotation mark would swallow the lines behind it."""
    votes = _read_votes(root)
    for where, line, row in _read_rows(path, root, COLUMNS_NEEDED):
        if row is None or not (stem := _stem(row["filename"], bare=True)):
            stem = _stem(line.partition(",")[0].strip(' "'))
            yield Dropped(stem or where, parsing.BAD_LINE, f"{where}: {line:.100}")
            continue
        dimensions = {"arousal": row["emoact"], "dominance": row["emodom"], "valence": row["emoval"]}
        gender = row.get("gender", "").lower().replace("unknown", "") or None
        told = {"speaker": row["spkrid"], "split": row["split_set"], "gender": gender}
        yield Label(stem, row["emoclass"], dimensions, where, **told, votes=votes.get(stem, []))


def _read_rows(path: Path, root: Path, needed: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, str] | None]]:
    """Yield place, line and fields by the lower-case names of columns, `None` where their number is another."""
    lines = parsing.read_lines(path)[0]
    columns = [name.lower() for name in _split_csv(lines[0])]
    if missing := [name for name in needed if name.lower() not in columns]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; its first line is {lines[0]:.200}.")
    for number, line in enumerate(lines[1:], start=2):
        if line:
            fields = _split_csv(line)
            row = dict(zip(columns, fields, strict=True)) if len(fields) == len(columns) else None
            yield f"{path.relative_to(root)}:{number}", line, row


def _read_votes(root: Path) -> dict[str, list[str]]:
    """Read the first choice of each rater from `labels_detailed.csv`, which has it in one of two columns."""
    path = _find_file(root, DETAIL_FILES)
    votes: dict[str, list[str]] = defaultdict(list)
    for _, _, row in _read_rows(path, root, ("FileName",)) if path else ():
        told = row or {}
        chosen = told.get("emoclass_major") or "".join(told.get("emodetail", "").split(";")[1:2]).strip()
        if row and chosen:
            votes[_stem(row["filename"], bare=True)].append(EMOTION_LETTERS.get(chosen, chosen))
    return votes


def _parse_text(path: Path, root: Path) -> Iterator[Label | Dropped]:
    """`MSP-PODCAST_0001_0008.wav; N; A:2.200000; V:4.000000; D:2.600000;` and then one line for each worker."""
    splits, speakers = _read_pairs(root, PARTITION_FILES), _read_pairs(root, SPEAKER_FILES)
    votes: list[str] = []  # of the label that came last, to which they are added behind it
    for number, line in enumerate(parsing.read_lines(path)[0], start=1):
        where, fields = f"{path.relative_to(root)}:{number}", _split_line(line)
        if line.upper().startswith("WORKER"):
            votes += fields[1:2]
        elif line:
            stem, votes = _stem(fields[0]), []
            ratings = dict(field.split(":", 1) for field in fields[2:] if field.count(":") == 1)
            if not stem or len(fields) != 5 or set(ratings) != set(_LETTERS):
                yield Dropped(stem or where, parsing.BAD_LINE, f"{where}: {line:.100}")
                continue
            dimensions = {_LETTERS[letter]: value.strip() for letter, value in ratings.items()}
            told = {"speaker": speakers.get(stem), "split": splits.get(stem)}
            yield Label(stem, fields[1], dimensions, where, **told, votes=votes)


def _split_csv(line: str) -> list[str]:
    """Split at the commas that are not quoted; a stray quotation mark quotes nothing."""
    try:
        fields = next(csv.reader([line], strict=True), [])
    except csv.Error:
        fields = line.split(",")
    return [field.strip(' "') for field in fields]


def _split_line(line: str) -> list[str]:
    return [field.strip(' "') for field in line.rstrip("; ").split(";")]


def _stem(file_name: str, bare: bool = False) -> str:
    """Name without `.wav`, which is missing where it may be `bare`; empty for something else."""
    if file_name.lower().endswith(".wav"):
        return file_name[:-4]
    return file_name if bare and re.fullmatch(r"[\w-]+", file_name) else ""


def _read_pairs(root: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Stem -> split, from `Train; MSP-PODCAST_0023_0048.wav`, or speaker, from `MSP-PODCAST_0023_0048.wav; 127`."""
    path = _find_file(root, names)
    lines = map(_split_line, parsing.read_lines(path)[0]) if path else ()
    pairs = [fields if _stem(fields[0]) else fields[::-1] for fields in lines if len(fields) == 2]
    return {_stem(name): value for name, value in pairs if _stem(name)}  # others are headings


def _label_to_row(label: Label, audio: str | None, corpus: Corpus, settings: MspPodcastSettings) -> Row | Dropped:
    written = label.split or ""
    split = SPLITS.get(written.lower())
    if split is None and written:
        return Dropped(label.id, UNKNOWN_SPLIT, f"{label.where}: {written!r}, expected one of {', '.join(SPLITS)}")
    speaker = None if (label.speaker or "").lower() in ("", "unknown", "-1") else label.speaker
    emotion = EMOTION_LETTERS.get((label.emotion or "").upper(), label.emotion)
    label = replace(label, emotion=emotion, split=split, speaker=speaker)
    if all((value or "").lower() in ("", "nan", "na") for value in (label.emotion, *label.dimensions.values())):
        if split != HIDDEN_SPLIT:
            return Dropped(label.id, parsing.NO_LABEL, label.where)
        label = replace(label, emotion=None)
    return parsing.label_to_row(label, audio, corpus, label_set=settings.label_set, scale=(1.0, 7.0))


def _add_transcripts(root: Path, corpus: Corpus) -> None:
    folder = _find_folder(root, ("transcripts",))
    if folder is None:
        corpus.notes.append("There is no folder Transcripts: no turn has a transcript.")
        return
    names, guessed = set(parsing.list_folder(folder)[1]), Counter[str]()
    for row in corpus.rows:
        if f"{row['id']}.txt" in names:
            lines, encoding = parsing.read_lines(folder / f"{row['id']}.txt")
            row["text"] = " ".join(" ".join(lines).split()) or None
            guessed[encoding] += not encoding.startswith("utf")
    silent = (row["id"] for row in corpus.rows if row["text"] is None and row["split"] != HIDDEN_SPLIT)
    note(corpus, silent, "{count} turns have no transcript: {names}.")
    odd = (f"{count:,} as {encoding}" for encoding, count in guessed.items() if count)
    note(corpus, odd, "Transcripts that are not UTF-8 were read: {names}.")
