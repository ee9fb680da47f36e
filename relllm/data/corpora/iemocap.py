"""IEMOCAP as rows: five sessions of two speakers each, in dialogs, with categories and dimensions.

Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav
Session1/dialog/EmoEvaluation/Ses01F_impro01.txt     (folders of single raters beside the files)
Session1/dialog/transcriptions/Ses01F_impro01.txt
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .. import parsing
from ..data_settings import IemocapSettings
from ..parsing import note
from ..rows import Corpus, CorpusFacts, Dropped

FACTS = CorpusFacts(
    name="iemocap",
    title="IEMOCAP: Interactive Emotional Dyadic Motion Capture database",
    language="en",
    licence="other",
    terms="Given on request by SAIL at the University of Southern California under a release agreement, for academic "
    "use; it may not be redistributed.",
    homepage="https://sail.usc.edu/iemocap/",
    citation="""@article{busso2008iemocap,
  title = {{IEMOCAP}: Interactive emotional dyadic motion capture database},
  author = {Busso, Carlos and Bulut, Murtaza and Lee, Chi-Chun and Kazemzadeh, Abe and Mower, Emily and Kim, Samuel and
            Chang, Jeannette N. and Lee, Sungbok and Narayanan, Shrikanth S.},
  journal = {Language Resources and Evaluation}, volume = {42}, pages = {335--359}, year = {2008}
}""",
)
SESSIONS = (1, 2, 3, 4, 5)
_NUMBER = r"(-?\d+(?:\.\d+)?)"
# [6.2901 - 8.2357]<tab>Ses01F_impro01_F000<tab>neu<tab>[2.5000, 2.5000, 2.5000]: valence, activation, dominance
_LABEL = re.compile(
    rf"\[{_NUMBER} - {_NUMBER}\]\s+(\S+)\s+(\S+)\s+\[{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\]", flags=re.ASCII
)
_RATER = re.compile(r"[A-Z]-\w+:")  # one rater's line: C-E2:<tab>Neutral;<tab>()
_TURN = re.compile(r"(Ses\d\d)[FM]_\w+_([FM])[^\W_]+", flags=re.ASCII)  # who speaks is in the turn, not in the dialog
# Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.
_TRANSCRIPT = re.compile(r"(Ses\w+)\s*(?:\[[^\]]*\])?\s*:\s*(.*)")


def parse_iemocap(settings: IemocapSettings) -> Corpus:
    """Read the labels, the transcripts and the listings of IEMOCAP.

    Speakers are the session and the letter of the turn, `"Ses01F"`. Raises `ValueError` if `root` is something else,
    or a session is not there or named twice.
    """
    wanted = "Session1/ … Session5/, each with dialog/EmoEvaluation/ and sentences/wav/"
    root = parsing.find_tree(settings.root, _locate, wanted)
    present = [number for number in SESSIONS if _evaluations(root, number).is_dir()]
    splits = _name_splits(present, settings.held_out_session, settings.validation_session)
    corpus = Corpus(facts=FACTS, rows=[], dropped=[], notes=[])
    labels = parsing.keep_first(_read_labels(root, present, splits), corpus)
    audio: dict[str, str] = {}
    for dialogs in (root / f"Session{number}" / "sentences" / "wav" for number in present):
        for dialog in parsing.list_folder(dialogs)[0] if dialogs.is_dir() else ():
            audio |= parsing.list_audio(dialogs / dialog)
    transcripts = _read_transcripts(root, present, corpus)
    label_set, merge = settings.label_set, settings.merge_excited
    for label in labels.values():
        path = audio.get(label.id)
        made = parsing.label_to_row(label, path, label_set=label_set, scale=(1.0, 5.0), merge_excited=merge)
        if not isinstance(made, Dropped):
            made["text"] = transcripts.get(label.id) or None
        corpus.add(made)
    parsing.drop_unlabelled(corpus, labels, audio)
    absent = (str(number) for number in SESSIONS if number not in present)
    note(corpus, absent, "Sessions that are not there: {names}.")
    silent = (row["id"] for row in corpus.rows if row["text"] is None)
    note(corpus, silent, "{count} utterances have no transcript: {names}.")
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


def _read_labels(root: Path, sessions: list[int], splits: dict[str, str]) -> Iterator[parsing.Label | Dropped]:
    for path in _text_files(root, sessions, "EmoEvaluation"):
        for number, line in enumerate(parsing.read_lines(path)[0], start=1):
            if line and not line.startswith("%") and not _RATER.match(line):
                yield _parse_label(line, f"{path.relative_to(root)}:{number}", splits)


def _parse_label(line: str, where: str, splits: dict[str, str]) -> parsing.Label | Dropped:
    parsed = _LABEL.fullmatch(line)
    turn = _TURN.fullmatch(parsed[3]) if parsed else _TURN.search(line)
    if parsed is None or turn is None:
        return Dropped(turn[0] if turn else where, parsing.BAD_LINE, f"{where}: {line:.100}")
    dimensions = {"arousal": parsed[6], "dominance": parsed[7], "valence": parsed[5]}
    split = splits.get(turn[1], "train")
    return parsing.Label(
        turn[0], parsed[4], dimensions, where, speaker=turn[1] + turn[2], session=turn[1], split=split
    )


def _read_transcripts(root: Path, sessions: list[int], corpus: Corpus) -> dict[str, str]:
    """Turn -> text; other lines (noises without a turn's name) are no transcript of an utterance."""
    transcripts: dict[str, str] = {}
    guessed = []
    for path in _text_files(root, sessions, "transcriptions"):
        lines, encoding = parsing.read_lines(path)
        if not encoding.startswith("utf"):
            guessed.append(f"{path.relative_to(root)} as {encoding}")
        transcripts |= {parsed[1]: parsed[2] for line in lines if (parsed := _TRANSCRIPT.fullmatch(line))}
    parsing.note(corpus, guessed, "Transcripts that are not UTF-8 were read: {names}.")
    return transcripts


def _text_files(root: Path, sessions: list[int], kind: str) -> Iterator[Path]:
    """List the dialogs' files, and not those in the raters' folders beside them."""
    for folder in (root / f"Session{number}" / "dialog" / kind for number in sessions):
        names = parsing.list_folder(folder)[1] if folder.is_dir() else []
        yield from (folder / name for name in names if name.endswith(".txt"))
