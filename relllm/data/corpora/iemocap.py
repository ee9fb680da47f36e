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
from ..rows import Corpus, Dropped
from .patterns import CORPUS_FACTS

FACTS = CORPUS_FACTS["iemocap"]
SESSIONS = (1, 2, 3, 4, 5)
NOT_IMPROVISED = "not improvised"
_NUMBER = r"(-?\d+(?:\.\d+)?)"
# [6.2901 - 8.2357]<tab>Ses01F_impro01_F000<tab>neu<tab>[2.5000, 2.5000, 2.5000]: valence, activation, dominance
_LABEL = re.compile(rf"\[{_NUMBER} - {_NUMBER}\]\s+(\S+)\s+(\S+)\s+\[{_NUMBER},\s*{_NUMBER},\s*{_NUMBER}\]", re.ASCII)
_RATER = re.compile(r"[A-Z]-\w+:")  # one rater's line
# C-E2:<tab>Neutral state; Anger;<tab>(): what an evaluator chose; C-F1 and C-M1 are the actors, of themselves
_VOTE = re.compile(r"C-E\w*:\s*([^(]*)")
_EVENT = re.compile(r"\[([A-Z][A-Z _-]*)\]", flags=re.IGNORECASE)  # [LAUGHTER] in a transcript
_TURN = re.compile(r"(Ses\d\d)[FM]_\w+_([FM])[^\W_]+", flags=re.ASCII)  # who speaks is in the turn, not in the dialog
# Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.
_TRANSCRIPT = re.compile(r"(Ses\w+)\s*(?:\[[^\]]*\])?\s*:\s*(.*)")


def parse_iemocap(settings: IemocapSettings) -> Corpus:
    """Read the labels, the transcripts and the listings of IEMOCAP; speakers are `"Ses01F"`, as the turns say.

    A `root` of something else, and a session that is not there or named twice, are a `ValueError`.
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
        if settings.improvised_only and label.style != "improvised":
            corpus.add(Dropped(label.id, NOT_IMPROVISED, label.where))
            continue
        path = audio.get(label.id)
        made = parsing.label_to_row(label, path, corpus, label_set=label_set, scale=(1.0, 5.0), merge_excited=merge)
        if not isinstance(made, Dropped):
            text = transcripts.get(label.id) or ""
            made["text"] = " ".join(_EVENT.sub(" ", text).split()) or None
            made["events"] = [event.lower() for event in _EVENT.findall(text)] or None
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
        wanted = f"a session that is there ({there}) and not held out ({held_out}), or None"
        raise ValueError(f"validation_session is {validation}, expected {wanted}.")
    return {f"Ses{number:02d}": split for number, split in ((held_out, "test"), (validation, "validation")) if number}


def _read_labels(root: Path, sessions: list[int], splits: dict[str, str]) -> Iterator[parsing.Label | Dropped]:
    for path in _text_files(root, sessions, "EmoEvaluation"):
        votes: list[str] = []  # of the label that came last, to which they are added behind it
        for number, line in enumerate(parsing.read_lines(path)[0], start=1):
            if vote := _VOTE.match(line):
                votes += filter(None, map(str.strip, vote[1].split(";")))
            elif line and not line.startswith("%") and not _RATER.match(line):
                votes = []
                yield _parse_label(line, f"{path.relative_to(root)}:{number}", splits, votes)


def _parse_label(line: str, where: str, splits: dict[str, str], votes: list[str]) -> parsing.Label | Dropped:
    parsed = _LABEL.fullmatch(line)
    turn = _TURN.fullmatch(parsed[3]) if parsed else _TURN.search(line)
    if parsed is None or turn is None:
        return Dropped(turn[0] if turn else where, parsing.BAD_LINE, f"{where}: {line:.100}")
    dimensions = {"arousal": parsed[6], "dominance": parsed[7], "valence": parsed[5]}
    told = {"speaker": turn[1] + turn[2], "session": turn[1], "split": splits.get(turn[1], "train")}
    told["gender"] = {"F": "female", "M": "male"}[turn[2]]
    told["style"] = "improvised" if "_impro" in turn[0] else "scripted"
    return parsing.Label(turn[0], parsed[4], dimensions, where, **told, votes=votes)


def _read_transcripts(root: Path, sessions: list[int], corpus: Corpus) -> dict[str, str]:
    """Turn -> text; other lines (noises without a turn's name) are no transcript of an utterance."""
    transcripts: dict[str, str] = {}
    guessed, broken = [], []
    for path in _text_files(root, sessions, "transcriptions"):
        lines, encoding = parsing.read_lines(path)
        if not encoding.startswith("utf"):
            guessed.append(f"{path.relative_to(root)} as {encoding}")
        for number, line in enumerate(lines, start=1):
            if parsed := _TRANSCRIPT.fullmatch(line):
                transcripts[parsed[1]] = parsed[2]
            elif _TURN.match(line):
                broken.append(f"{path.relative_to(root)}:{number}")
    parsing.note(corpus, broken, "{count} lines of transcripts name a turn and do not parse (no colon?): {names}.")
    parsing.note(corpus, guessed, "Transcripts that are not UTF-8 were read: {names}.")
    return transcripts


def _text_files(root: Path, sessions: list[int], kind: str) -> Iterator[Path]:
    """List the dialogs' files, and not those in the raters' folders beside them."""
    for folder in (root / f"Session{number}" / "dialog" / kind for number in sessions):
        names = parsing.list_folder(folder)[1] if folder.is_dir() else []
        yield from (folder / name for name in names if name.lower().endswith(".txt"))
