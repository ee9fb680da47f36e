"""IEMOCAP as rows: five sessions of two speakers each, in dialogs, with categories and dimensions.

What lives here: the layout of the release, its label and transcript lines, and its splits. What does not: decoding
audio, and writing the data set.

    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav
    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt     (folders of single raters beside the files)
    Session1/dialog/transcriptions/Ses01F_impro01.txt
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relllm.labels import canonical_emotion

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
    name="iemocap",
    title="IEMOCAP: Interactive Emotional Dyadic Motion Capture database",
    language="en",
    licence="other",
    terms=(
        "Given on request by SAIL at the University of Southern California under a release agreement, for academic "
        "use; it may not be redistributed."
    ),
    homepage="https://sail.usc.edu/iemocap/",
    citation="""@article{busso2008iemocap,
  title = {{IEMOCAP}: Interactive emotional dyadic motion capture database},
  author = {Busso, Carlos and Bulut, Murtaza and Lee, Chi-Chun and Kazemzadeh, Abe and Mower, Emily and Kim, Samuel and
            Chang, Jeannette N. and Lee, Sungbok and Narayanan, Shrikanth S.},
  journal = {Language Resources and Evaluation},
  volume = {42},
  pages = {335--359},
  year = {2008}
}""",
)
SESSIONS = (1, 2, 3, 4, 5)
LOWEST, HIGHEST = 1.0, 5.0

_TREE = "Session1/ … Session5/, each with dialog/EmoEvaluation/ and sentences/wav/"
_NUMBER = r"(-?\d+(?:\.\d+)?)"
# [6.2901 - 8.2357]<tab>Ses01F_impro01_F000<tab>neu<tab>[2.5000, 2.5000, 2.5000]: valence, activation, dominance
_LABEL = re.compile(
    rf"\[{_NUMBER} - {_NUMBER}\]\s+(\S+)\s+(\S+)\s+\[{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\]", flags=re.ASCII
)
_RATER = re.compile(r"[A-Z]-\w+:")  # one rater's line: C-E2:<tab>Neutral;<tab>()
_TURN = re.compile(r"(Ses\d\d)[FM]_\w+_([FM])[^\W_]+", flags=re.ASCII)  # who speaks is in the turn, not in the dialog
# Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.
_TRANSCRIPT = re.compile(r"(Ses\w+)\s*(?:\[[^\]]*\])?\s*:\s*(.*)")


@dataclass(frozen=True)
class _Label:
    turn: str
    session: str
    speaker: str
    emotion: str  # as the file has it
    dimensions: dict[str, float]  # 1 to 5
    where: str


def parse_iemocap(
    root: Path,
    *,
    label_set: LabelSet,
    merge_excited: bool = True,
    held_out_session: int = 5,
    validation_session: int | None = None,
) -> Corpus:
    """Reads the labels, the transcripts and the listings of IEMOCAP.

    Args:
        root (`Path`): The folder with `Session1` to `Session5`.
        label_set (`LabelSet`): `"4"` with `merge_excited` is the usual task of 5,531 utterances.
        merge_excited (`bool`, *optional*, defaults to `True`): Whether "excited" counts as happy, as in that task.
        held_out_session (`int`, *optional*, defaults to 5): The session whose rows are the split `"test"`; 0 for none.
            The paper's files hold out session 5.
        validation_session (`int`, *optional*): The session whose rows are the split `"validation"`.

    Returns:
        `Corpus`: Speakers are the session and the letter of the turn, `"Ses01F"`; sessions are `"Ses01"` and so on.

    Raises:
        ValueError: If `root` is something else, or a session is not there or named twice.
    """
    check_label_set(label_set)
    root = find_tree(root, _locate, _TREE)
    present = [number for number in SESSIONS if _evaluations(root, number).is_dir()]
    splits = _name_splits(present, held_out_session, validation_session)
    labels, dropped = _read_labels(root, present)
    audio = _find_audio(root, present)
    transcripts, notes = _read_transcripts(root, present)
    corpus = Corpus(facts=FACTS, rows=[], dropped=dropped, notes=notes)
    for label in labels.values():
        made = _make_row(label, audio.get(label.turn), label_set=label_set, merge_excited=merge_excited)
        if isinstance(made, Dropped):
            corpus.dropped.append(made)
        else:
            made["text"] = transcripts.get(label.turn) or None
            made["split"] = splits.get(label.session, "train")
            corpus.rows.append(made)
    known = set(labels) | {entry.id for entry in dropped}
    corpus.dropped += [Dropped(turn, NO_LABEL, path) for turn, path in audio.items() if turn not in known]
    if missing := [number for number in SESSIONS if number not in present]:
        notes.append(f"Sessions that are not there: {', '.join(map(str, missing))}.")
    if silent := [row["id"] for row in corpus.rows if row["text"] is None]:
        notes.append(f"{len(silent):,} utterances have no transcript: {name_some(silent)}.")
    return corpus


def _locate(folder: Path) -> Path | None:
    return folder if any(_evaluations(folder, number).is_dir() for number in SESSIONS) else None


def _evaluations(root: Path, session: int) -> Path:
    return root / f"Session{session}" / "dialog" / "EmoEvaluation"


def _name_splits(present: list[int], held_out: int, validation: int | None) -> dict[str, str]:
    """Session -> split, where that is not "train"."""
    there = ", ".join(map(str, present))
    if held_out != 0 and held_out not in present:
        raise ValueError(f"held_out_session is {held_out}, expected a session that is there ({there}), or 0 for none.")
    if validation is not None and (validation not in present or validation == held_out):
        raise ValueError(
            f"validation_session is {validation}, expected a session that is there ({there}) and not held out "
            f"({held_out}), or None."
        )
    return {f"Ses{number:02d}": split for number, split in ((held_out, "test"), (validation, "validation")) if number}


def _read_labels(root: Path, sessions: list[int]) -> tuple[dict[str, _Label], list[Dropped]]:
    labels: dict[str, _Label] = {}
    dropped: list[Dropped] = []
    for path in _text_files(root, sessions, "EmoEvaluation"):
        for number, line in enumerate(read_lines(path)[0], start=1):
            if not line or line.startswith("%") or _RATER.match(line):
                continue
            label = _parse_label(line, f"{path.relative_to(root)}:{number}")
            if isinstance(label, Dropped):
                dropped.append(label)
            elif label.turn in labels:
                dropped.append(Dropped(label.turn, REPEATED, f"{label.where}, first in {labels[label.turn].where}"))
            else:
                labels[label.turn] = label
    return labels, dropped


def _parse_label(line: str, where: str) -> _Label | Dropped:
    parsed = _LABEL.fullmatch(line)
    turn = _TURN.fullmatch(parsed[3]) if parsed else _TURN.search(line)
    if parsed is None or turn is None:
        return Dropped(turn[0] if turn else where, BAD_LINE, f"{where}: {line:.100}")
    valence, arousal, dominance = (float(parsed[group]) for group in (5, 6, 7))
    return _Label(
        turn=turn[0],
        session=turn[1],
        speaker=turn[1] + turn[2],
        emotion=parsed[4],
        dimensions={"arousal": arousal, "dominance": dominance, "valence": valence},
        where=where,
    )


def _find_audio(root: Path, sessions: list[int]) -> dict[str, str]:
    audio: dict[str, str] = {}
    for number in sessions:
        folder = root / f"Session{number}" / "sentences" / "wav"
        dialogs = list_folder(folder)[0] if folder.is_dir() else []
        for dialog in dialogs:
            audio |= list_audio(folder / dialog)
    return audio


def _read_transcripts(root: Path, sessions: list[int]) -> tuple[dict[str, str], list[str]]:
    """Turn -> text; other lines (noises without a turn's name) are no transcript of an utterance."""
    transcripts: dict[str, str] = {}
    guessed = []
    for path in _text_files(root, sessions, "transcriptions"):
        lines, encoding = read_lines(path)
        if not encoding.startswith("utf"):
            guessed.append(f"{path.relative_to(root)} as {encoding}")
        for line in lines:
            if parsed := _TRANSCRIPT.fullmatch(line):
                transcripts[parsed[1]] = parsed[2]
    return transcripts, [f"Transcripts that are not UTF-8 were read: {name_some(guessed)}."] if guessed else []


def _text_files(root: Path, sessions: list[int], kind: str) -> Iterator[Path]:
    """The dialogs' files, and not those in the raters' folders beside them."""
    for number in sessions:
        folder = root / f"Session{number}" / "dialog" / kind
        names = list_folder(folder)[1] if folder.is_dir() else []
        yield from (folder / name for name in names if name.endswith(".txt"))


def _make_row(label: _Label, audio: str | None, *, label_set: LabelSet, merge_excited: bool) -> Row | Dropped:
    try:
        emotion = canonical_emotion(label.emotion)
    except ValueError as error:
        return Dropped(label.turn, UNKNOWN_EMOTION, f"{label.where}: {error}")
    if merge_excited and emotion == "excited":
        emotion = "happy"
    if is_outside(emotion, label_set):
        return Dropped(label.turn, OUTSIDE_SET, label.emotion)
    try:
        dimensions = normalise(label.dimensions, LOWEST, HIGHEST)
    except ValueError as error:
        return Dropped(label.turn, OUTSIDE_SCALE, f"{label.where}: {error} (emotion {label.emotion})")
    if audio is None:
        return Dropped(label.turn, NO_AUDIO, label.where)
    return Row(
        id=label.turn,
        audio=audio,
        text=None,
        response=None,
        emotion=emotion,
        arousal=dimensions["arousal"],
        dominance=dimensions["dominance"],
        valence=dimensions["valence"],
        dimension_source=LABEL_SOURCE,
        speaker=label.speaker,
        session=label.session,
        split=None,
        language=FACTS.language,
    )
