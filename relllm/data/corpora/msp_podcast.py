"""MSP-Podcast as rows: turns of podcasts with categories, dimensions, speakers and the corpus's own splits.

What lives here: the layouts of old and new releases, and how their splits are named. What does not: decoding audio,
and writing the data set.

    Audios/MSP-PODCAST_0001_0008.wav      Transcripts/MSP-PODCAST_0001_0008.txt
    Labels/labels_consensus.csv           FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set
    Labels.txt, Partitions.txt, Speaker_ids.txt     in the root or in Labels/; up to 1.8 instead of the CSV file

The split "test" is Test1, which every release has: so `split="test"` is found as for every other corpus. Test2 and
Test3 are "test2" and "test3". The labels of Test3 are hidden: its clips are rows without labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relllm.labels import DIMENSIONS, canonical_emotion

from ..parsing import (
    BAD_LINE,
    NO_AUDIO,
    NO_LABEL,
    OUTSIDE_SCALE,
    OUTSIDE_SET,
    REPEATED,
    UNKNOWN_EMOTION,
    check_label_set,
    find_tree,
    is_outside,
    list_audio,
    list_folder,
    name_some,
    normalise,
    read_lines,
)
from ..rows import LABEL_SOURCE, Corpus, CorpusFacts, Dropped, LabelSet, Row

FACTS = CorpusFacts(
    name="msp-podcast",
    title="MSP-Podcast corpus",
    language="en",
    licence="other",
    terms=(
        "Given on request by the MSP laboratory of the University of Texas at Dallas under an academic licence; it "
        "may not be redistributed."
    ),
    homepage="https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Podcast.html",
    citation="""@article{lotfian2019building,
  title = {Building Naturalistic Emotionally Balanced Speech Corpus by Retrieving Emotional Speech from Existing
           Podcast Recordings},
  author = {Lotfian, Reza and Busso, Carlos},
  journal = {IEEE Transactions on Affective Computing},
  volume = {10},
  number = {4},
  pages = {471--483},
  year = {2019},
  doi = {10.1109/TAFFC.2017.2736999}
}""",
)
SPLITS = {
    "train": "train",
    "development": "validation",
    "validation": "validation",  # as older releases write it
    "test1": "test",
    "test2": "test2",
    "test3": "test3",
}
HIDDEN_SPLIT = "test3"
LOWEST, HIGHEST = 1.0, 7.0

UNKNOWN_SPLIT = "unknown split"

# Old releases misspell the name of the file. Files and folders are found in lower and upper case.
CSV_FILES = ("labels_consensus.csv", "labels_concensus.csv")
TEXT_FILES = ("labels.txt",)
PARTITION_FILES = ("partitions.txt", "partition.txt")
SPEAKER_FILES = ("speaker_ids.txt",)
COLUMNS_NEEDED = ("FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Split_Set")

_TREE = "Audios/ and Labels/labels_consensus.csv, or Labels.txt"
_NUMBER = re.compile(r"-?\d+(\.\d+)?", flags=re.ASCII)
_LETTERS = {"A": "arousal", "V": "valence", "D": "dominance"}
_HIDDEN = ("", "nan", "na")


@dataclass(frozen=True)
class _Label:
    id: str
    emotion: str  # as the file has it
    dimensions: dict[str, str]  # as the file has them, 1 to 7
    speaker: str
    split: str
    where: str

    @property
    def is_hidden(self) -> bool:
        return all(value.lower() in _HIDDEN for value in (self.emotion, *self.dimensions.values()))


def parse_msp_podcast(root: Path, *, label_set: LabelSet) -> Corpus:
    """Reads the labels, the transcripts and the listings of MSP-Podcast.

    Args:
        root (`Path`): The folder with `Audios`.
        label_set (`LabelSet`): Turns of another emotion, of "other" and of "no agreement" are kept out; `"all"` keeps
            the last two with their dimensions.

    Returns:
        `Corpus`: The splits are `"train"`, `"validation"` (Development), `"test"` (Test1), `"test2"` and `"test3"`,
        whose labels are hidden: these rows have none. The speaker of a turn may be unknown, `None`.

    Raises:
        ValueError: If `root` is something else, or the CSV file lacks a column.
    """
    check_label_set(label_set)
    root = find_tree(root, _locate, _TREE)
    corpus = Corpus(facts=FACTS, rows=[], dropped=[], notes=[])
    folder = _find(root, ("audios",), kind="folder")
    assert folder is not None  # or `find_tree` had refused
    audio = list_audio(folder)
    labels = _read_labels(root, corpus)
    partition = _read_pairs(root, PARTITION_FILES)
    for stem in audio:
        if stem not in labels and SPLITS.get(partition.get(stem, "").lower()) == HIDDEN_SPLIT:
            hidden = dict.fromkeys(DIMENSIONS, "")
            labels[stem] = _Label(stem, "", hidden, speaker="", split=partition[stem], where="Partitions")
    for label in labels.values():
        made = _make_row(label, audio.get(label.id), label_set=label_set)
        if isinstance(made, Dropped):
            corpus.dropped.append(made)
        else:
            corpus.rows.append(made)
    known = set(labels) | {entry.id for entry in corpus.dropped}
    corpus.dropped += [Dropped(stem, NO_LABEL, path) for stem, path in audio.items() if stem not in known]
    _add_transcripts(root, corpus)
    _describe(corpus)
    return corpus


def _locate(folder: Path) -> Path | None:
    if not folder.is_dir() or _find(folder, ("audios",), kind="folder") is None:
        return None
    return folder if _find(folder, CSV_FILES + TEXT_FILES) else None


def _find(root: Path, names: tuple[str, ...], kind: str = "file") -> Path | None:
    """The first of the names that is in the root or in `Labels`, whatever its case."""
    folders, files = list_folder(root)
    places = [(root, files if kind == "file" else folders)]
    if kind == "file":
        places += [
            (root / name, list_folder(root / name)[1]) for name in folders if name.lower() in ("labels", "label")
        ]
    for wanted in names:
        for folder, present in places:
            if found := [name for name in present if name.lower() == wanted]:
                return folder / found[0]
    return None


def _read_labels(root: Path, corpus: Corpus) -> dict[str, _Label]:
    path = _find(root, CSV_FILES)
    if path is None:
        path = _find(root, TEXT_FILES)
        assert path is not None  # or `find_tree` had refused
        found = _parse_text(path, root)
        for names, lost in ((PARTITION_FILES, "splits"), (SPEAKER_FILES, "speakers")):
            if _find(root, names) is None:
                corpus.notes.append(
                    f"{path.name} names no {lost}, and {names[0]} is not there: that of every turn is unknown."
                )
    else:
        found = _parse_csv(path, root)
    labels: dict[str, _Label] = {}
    for entry in found:
        if isinstance(entry, Dropped):
            corpus.dropped.append(entry)
        elif entry.id in labels:
            corpus.dropped.append(Dropped(entry.id, REPEATED, f"{entry.where}, first in {labels[entry.id].where}"))
        else:
            labels[entry.id] = entry
    return labels


def _parse_csv(path: Path, root: Path) -> Iterator[_Label | Dropped]:
    """Line by line: with the `csv` module one stray quotation mark would swallow the lines behind it."""
    lines = read_lines(path)[0]
    columns = _split_line(lines[0])
    if missing := [name for name in COLUMNS_NEEDED if name not in columns]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; its first line is {lines[0]:.200}.")
    file, name_column = path.relative_to(root), columns.index("FileName")
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        where = f"{file}:{number}"
        fields = _split_line(line)
        stem = _stem(fields[name_column]) if name_column < len(fields) else ""
        if not stem or len(fields) != len(columns):
            yield Dropped(stem or where, BAD_LINE, f"{where}: {line:.100}")
            continue
        row = dict(zip(columns, fields, strict=True))
        dimensions = {"arousal": row["EmoAct"], "dominance": row["EmoDom"], "valence": row["EmoVal"]}
        yield _Label(stem, row["EmoClass"], dimensions, row["SpkrID"], row["Split_Set"], where)


def _split_line(line: str) -> list[str]:
    return [field.strip(' "') for field in line.split(",")]


def _parse_text(path: Path, root: Path) -> Iterator[_Label | Dropped]:
    """`MSP-PODCAST_0001_0008.wav; N; A:2.200000; V:4.000000; D:2.600000;` and then one line for each worker."""
    splits, speakers = _read_pairs(root, PARTITION_FILES), _read_pairs(root, SPEAKER_FILES)
    file = path.relative_to(root)
    for number, line in enumerate(read_lines(path)[0], start=1):
        if not line or line.upper().startswith("WORKER"):
            continue
        where = f"{file}:{number}"
        fields = [field.strip() for field in line.rstrip("; ").split(";")]
        stem = _stem(fields[0])
        ratings = dict(field.split(":", 1) for field in fields[2:] if field.count(":") == 1)
        if not stem or len(fields) != 5 or set(ratings) != set(_LETTERS):
            yield Dropped(stem or where, BAD_LINE, f"{where}: {line:.100}")
            continue
        dimensions = {_LETTERS[letter]: value.strip() for letter, value in ratings.items()}
        yield _Label(stem, fields[1], dimensions, speakers.get(stem, ""), splits.get(stem, ""), where)


def _stem(file_name: str) -> str:
    """Name without `.wav`; empty for something else."""
    return file_name[:-4] if file_name.lower().endswith(".wav") else ""


def _read_pairs(root: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Stem -> split, from `Train; MSP-PODCAST_0023_0048.wav`, or speaker, from `MSP-PODCAST_0023_0048.wav; 127`."""
    path = _find(root, names)
    pairs = {}
    for line in read_lines(path)[0] if path else ():
        fields = [field.strip() for field in line.rstrip("; ").split(";")]
        if len(fields) == 2:  # else a heading
            first, second = map(_stem, fields)
            if second:
                pairs[second] = fields[0]
            elif first:
                pairs[first] = fields[1]
    return pairs


def _make_row(label: _Label, audio: str | None, *, label_set: LabelSet) -> Row | Dropped:
    split = SPLITS.get(label.split.lower())
    if split is None and label.split:
        return Dropped(label.id, UNKNOWN_SPLIT, f"{label.where}: {label.split!r}, expected one of {', '.join(SPLITS)}")
    labelled = _read_emotion(label, split, label_set)
    if isinstance(labelled, Dropped):
        return labelled
    emotion, dimensions = labelled
    if audio is None:
        return Dropped(label.id, NO_AUDIO, label.where)
    return Row(
        id=label.id,
        audio=audio,
        text=None,
        response=None,
        emotion=emotion,
        arousal=dimensions.get("arousal"),
        dominance=dimensions.get("dominance"),
        valence=dimensions.get("valence"),
        dimension_source=LABEL_SOURCE if dimensions else None,
        speaker=None if label.speaker.lower() in ("", "unknown") else label.speaker,
        session=None,
        split=split,
        language=FACTS.language,
    )


def _read_emotion(
    label: _Label, split: str | None, label_set: LabelSet
) -> tuple[str | None, dict[str, float]] | Dropped:
    """Emotion and dimensions in [0, 1]; nothing of either where the labels are hidden."""
    if label.is_hidden:
        return (None, {}) if split == HIDDEN_SPLIT else Dropped(label.id, NO_LABEL, label.where)
    try:
        emotion = canonical_emotion(label.emotion)
    except ValueError as error:
        return Dropped(label.id, UNKNOWN_EMOTION, f"{label.where}: {error}")
    if is_outside(emotion, label_set):
        return Dropped(label.id, OUTSIDE_SET, label.emotion)
    if odd := {name: value for name, value in label.dimensions.items() if not _NUMBER.fullmatch(value)}:
        return Dropped(label.id, BAD_LINE, f"{label.where}: {odd} is no number")
    try:
        return emotion, normalise({name: float(value) for name, value in label.dimensions.items()}, LOWEST, HIGHEST)
    except ValueError as error:
        return Dropped(label.id, OUTSIDE_SCALE, f"{label.where}: {error} (emotion {label.emotion})")


def _add_transcripts(root: Path, corpus: Corpus) -> None:
    folder = _find(root, ("transcripts",), kind="folder")
    if folder is None:
        corpus.notes.append("There is no folder Transcripts: no turn has a transcript.")
        return
    names = set(list_folder(folder)[1])
    guessed = Counter[str]()
    for row in corpus.rows:
        if f"{row['id']}.txt" in names:
            lines, encoding = read_lines(folder / f"{row['id']}.txt")
            row["text"] = " ".join(" ".join(lines).split()) or None
            guessed[encoding] += not encoding.startswith("utf")
    if silent := [row["id"] for row in corpus.rows if row["text"] is None and row["split"] != HIDDEN_SPLIT]:
        corpus.notes.append(f"{len(silent):,} turns have no transcript: {name_some(silent)}.")
    if odd := [f"{count:,} as {encoding}" for encoding, count in guessed.items() if count]:
        corpus.notes.append(f"Transcripts that are not UTF-8 were read: {name_some(odd)}.")


def _describe(corpus: Corpus) -> None:
    if hidden := [row["id"] for row in corpus.rows if row["dimension_source"] is None]:
        corpus.notes.append(f"The labels of {len(hidden):,} turns of {HIDDEN_SPLIT} are hidden; their rows have none.")
    if unknown := sum(row["speaker"] is None for row in corpus.rows):
        corpus.notes.append(
            f"The speaker of {unknown:,} turns is unknown: whether they overlap splits cannot be told."
        )
