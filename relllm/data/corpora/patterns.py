"""Corpora whose paths or tables say what is in a clip: one mechanism, and six of them as patterns of it.

A corpus of your own is a pattern in a YAML file, or a regular expression on the command line: docs/data.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from .. import parsing
from ..rows import Corpus, CorpusFacts, Dropped
from ..table_files import read_table

NO_MATCH = "path is not of the pattern"
OWN = CorpusFacts("folder", "Recordings", "", "other", "Your own recordings: publish what is agreed to.")


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """How a corpus says what is in a clip. Groups of the regular expressions are columns of a row, or parts of `id`.

    All three regular expressions are read without regard to case; those of paths match the end of one, from the
    beginning of a folder's or file's name.
    """

    path: str  # of audio files
    table: str | None = None  # of the paths of tables; what its groups say holds for all of its lines
    line: str | None = None  # of the lines of a table that is no CSV file; others are no labels
    id: str = "{name}"  # of a clip and of its line, made of groups and columns; `name` is the file's without suffix
    columns: Mapping[str, str] = field(default_factory=dict)  # ours -> the table's
    maps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # column -> code -> word
    scale: str | None = None  # of the dimensions, as `--scale`
    facts: CorpusFacts = OWN


def load_pattern(given: str) -> Pattern:
    """Return the pattern of a `.yaml` file, which has the fields of [`Pattern`] and `language`, or of an expression.

    Raises `ValueError` for other fields, a file without a path, and what is no regular expression.
    """
    if Path(given).suffix.lower() not in (".yaml", ".yml"):
        return _checked(Pattern(path=given, id="{stem}"), given)
    import yaml

    # Texts only: YAML has 01 as a number, and no as false.
    content = yaml.load(Path(given).expanduser().read_text(encoding="utf-8"), yaml.BaseLoader)
    known = [one.name for one in fields(Pattern) if one.name != "facts"]
    if not isinstance(content, dict) or "path" not in content or set(content) - {*known, "language"}:
        raise ValueError(f"{given} holds {content!r:.200}; expected `path`, and of {known[1:]} and `language`.")
    facts = CorpusFacts("folder", Path(given).stem, content.pop("language", ""), "other", OWN.terms)
    told: dict[str, Any] = {"id": "{stem}"} | content
    return _checked(Pattern(**told, facts=facts), given)


def _checked(pattern: Pattern, given: str) -> Pattern:
    for name in ("path", "table", "line"):
        try:
            re.compile(f"(?:{getattr(pattern, name) or ''})")
        except re.error as error:
            raise ValueError(f"{given}: {name} is no regular expression ({error}).") from error
    pairs = [pattern.columns, pattern.maps, *(pattern.maps.values() if isinstance(pattern.maps, Mapping) else ())]
    if not all(isinstance(words, Mapping) for words in pairs):
        raise ValueError(f"{given}: columns are pairs of names, and maps has pairs for each column.")
    return pattern


def find_fields(
    pattern: Pattern, root: Path, audio: Sequence[str], tables: Sequence[str], corpus: Corpus
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield place and fields of each clip; what is no clip, and a line or a clip without the other, is dropped.

    `audio` and `tables` are the paths of files beneath `root`. Raises `ValueError` where nothing matches.
    """
    clips: dict[str, dict[str, object]] = {}
    for path, groups in _match_paths(pattern.path, audio):
        if groups is None:
            corpus.dropped.append(Dropped(path, NO_MATCH, path))
            continue
        row_id = _name(pattern, groups, path)
        if row_id in clips:
            corpus.dropped.append(Dropped(row_id, parsing.REPEATED, f"{path}, first {clips[row_id]['audio']}"))
        else:
            clips[row_id] = groups | {"id": row_id, "audio": path}
    if not clips:
        shown = parsing.name_some(audio[:3]) or "no audio files"
        raise ValueError(f"{root}: expected audio files like {pattern.path}; found {shown}. Check ROOT.")
    if pattern.table is None:
        yield from ((str(clip["audio"]), clip) for clip in clips.values())
        return
    labelled = set()
    for place, labels in _read_labels(pattern, root, tables, corpus):
        row_id = _name(pattern, labels, place)
        if row_id in clips:
            labelled.add(row_id)
            yield place, clips[row_id] | {name: value for name, value in labels.items() if value is not None}
        else:
            corpus.dropped.append(Dropped(row_id, parsing.NO_AUDIO, place))
    parsing.drop_unlabelled(corpus, labelled, {name: str(clip["audio"]) for name, clip in clips.items()})


def _match_paths(expression: str, paths: Sequence[str]) -> Iterator[tuple[str, dict[str, object] | None]]:
    """Yield paths with their groups, `None` where they do not match."""
    compiled = re.compile(f"(?:.*/)?(?:{expression})", flags=re.IGNORECASE)
    for path in paths:
        matched, pure = compiled.fullmatch(path), PurePosixPath(path)
        named = {"name": pure.stem, "stem": str(pure.with_suffix(""))}
        yield path, None if matched is None else {**named, **matched.groupdict()}


def _name(pattern: Pattern, groups: Mapping[str, object], place: str) -> str:
    try:
        return pattern.id.format_map(groups)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{place}: the id {pattern.id!r} needs {error}; there is {list(groups)}.") from error


def _read_labels(
    pattern: Pattern, root: Path, tables: Sequence[str], corpus: Corpus
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield place and fields of each line of the tables."""
    matched = {path: groups for path, groups in _match_paths(pattern.table or "", tables) if groups is not None}
    if not matched:
        raise ValueError(f"{root}: expected tables like {pattern.table}; found {parsing.name_some(tables[:3])}.")
    for path, groups in matched.items():
        groups = {name: value for name, value in groups.items() if name not in ("name", "stem")}
        if pattern.line is None:
            yield from ((f"{path}:{number}", groups | row) for number, row in read_table(root / path))
            continue
        for number, line in enumerate(parsing.read_lines(root / path)[0], start=1):
            if found := re.fullmatch(pattern.line, line, flags=re.IGNORECASE):
                yield f"{path}:{number}", groups | found.groupdict()


def _facts(name: str, title: str, language: str, licence: str, terms: str, homepage: str) -> CorpusFacts:
    return CorpusFacts(name, title, language, licence, terms, homepage)


_SPOKEN = r"\.(?:wav|flac|mp3|ogg)"
PATTERNS: dict[str, Pattern] = {
    # Actor_01/03-01-06-01-02-01-12.wav: sound alone, speech (songs: 03-02), emotion, strength, sentence, take, actor
    "ravdess": Pattern(
        path=rf"03-01-(?P<emotion>0\d)-\d\d-(?P<text>0\d)-\d\d-(?P<speaker>\d(?P<gender>\d)){_SPOKEN}",
        maps={
            "emotion": {
                "01": "neutral",
                "02": "calm",
                "03": "happy",
                "04": "sad",
                "05": "angry",
                "06": "fear",
                "07": "disgust",
                "08": "surprise",
            },
            "text": {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."},
            "gender": {digit: "male" if int(digit) % 2 else "female" for digit in "0123456789"},
        },
        facts=_facts(
            "ravdess",
            "RAVDESS: Ryerson Audio-Visual Database of Emotional Speech and Song",
            "en",
            "cc-by-nc-sa-4.0",
            "Published under CC BY-NC-SA 4.0: not for commercial use, and what is made of it under the same licence.",
            "https://zenodo.org/records/1188976",
        ),
    ),
    # AudioWAV/1001_DFA_ANG_XX.wav: actor, sentence, emotion, level
    "crema-d": Pattern(
        path=rf"(?P<speaker>\d{{4}})_(?P<text>[A-Z]{{3}})_(?P<emotion>[A-Z]{{3}})_[A-Z]{{1,2}}{_SPOKEN}",
        maps={
            "text": {
                "IEO": "It's eleven o'clock.",
                "TIE": "That is exactly what happened.",
                "IOM": "I'm on my way to the meeting.",
                "IWW": "I wonder what this is about.",
                "TAI": "The airplane is almost full.",
                "MTI": "Maybe tomorrow it will be cold.",
                "IWL": "I would like a new alarm clock.",
                "ITH": "I think I have a doctor's appointment.",
                "DFA": "Don't forget a jacket.",
                "ITS": "I think I've seen this before.",
                "TSI": "The surface is slick.",
                "WSI": "We'll stop in a couple of minutes.",
            }
        },
        facts=_facts(
            "crema-d",
            "CREMA-D: Crowd-sourced Emotional Multimodal Actors Dataset",
            "en",
            "odbl",
            "Published under the Open Database License.",
            "https://github.com/CheyneyComputerScience/CREMA-D",
        ),
    ),
    # wav/03a01Fa.wav: speaker, sentence, emotion, take; A is Angst
    "emodb": Pattern(
        path=rf"(?=(?P<gender>\d\d))(?P<speaker>\d\d)(?P<text>[ab]\d\d)(?P<emotion>[WLEAFTN])[a-z]?{_SPOKEN}",
        maps={
            "emotion": {
                "W": "angry",
                "L": "boredom",
                "E": "disgust",
                "A": "fear",
                "F": "happy",
                "T": "sad",
                "N": "neutral",
            },
            "gender": {
                **dict.fromkeys(("03", "10", "11", "12", "15"), "male"),
                **dict.fromkeys(("08", "09", "13", "14", "16"), "female"),
            },
            "text": {
                "a01": "Der Lappen liegt auf dem Eisschrank.",
                "a02": "Das will sie am Mittwoch abgeben.",
                "a04": "Heute abend könnte ich es ihm sagen.",
                "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
                "a07": "In sieben Stunden wird es soweit sein.",
                "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
                "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
                "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
                "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
                "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
            },
        },
        facts=_facts(
            "emodb",
            "EmoDB: Berlin Database of Emotional Speech",
            "de",
            "other",
            "Free to download from the Technical University of Berlin; ask it before you publish the recordings.",
            "http://emodb.bilderbar.info/",
        ),
    ),
    # AudioData/DC/sa01.wav, or DC_sa01.wav in one folder
    "savee": Pattern(
        path=rf"(?P<speaker>DC|JE|JK|KL)[/_](?P<emotion>sa|su|[adfhn])(?P<number>\d\d){_SPOKEN}",
        id="{speaker}_{emotion}{number}",
        maps={
            "emotion": {
                "a": "angry",
                "d": "disgust",
                "f": "fear",
                "h": "happy",
                "n": "neutral",
                "sa": "sad",
                "su": "surprise",
            }
        },
        facts=_facts(
            "savee",
            "SAVEE: Surrey Audio-Visual Expressed Emotion",
            "en",
            "other",
            "Given on registration by the University of Surrey, for research.",
            "http://kahlan.eps.surrey.ac.uk/savee/",
        ),
    ),
    # train_splits/dia0_utt0.mp4, dev_splits_complete/…, output_repeated_splits_test/…; train_sent_emo.csv, …
    "meld": Pattern(
        path=r"(?:output_repeated_splits_)?(?P<split>train|dev|test)(?:_[a-z_]*)?/(?:.*/)?"
        r"dia(?P<Dialogue_ID>\d+)_utt(?P<Utterance_ID>\d+)\.(?:mp4|wav|flac|mp3|ogg)",
        table=r"(?P<split>train|dev|test)_sent_emo\.csv",
        id="{split}_dia{Dialogue_ID}_utt{Utterance_ID}",
        columns={"text": "Utterance", "emotion": "Emotion", "speaker": "Speaker"},
        facts=_facts(
            "meld",
            "MELD: Multimodal EmotionLines Dataset",
            "en",
            "gpl-3.0",
            "The annotations are under GPL-3.0; the clips are of a television series, and not licensed.",
            "https://affective-meld.github.io/",
        ),
    ),
    # Audio/session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav; Evalution.txt (so spelt), whose lines name the videos
    "msp-improv": Pattern(
        path=r"MSP-IMPROV-(?P<key>S\d\d[AHSN]-(?P<speaker>(?P<gender>[FM])0(?P<session>\d))-(?P<style>[PRST])-\w+)"
        + _SPOKEN,
        table=r"Evalu?a?tion\.txt",
        line=r"UTD-IMPROV-(?P<key>[A-Z\d-]+)\.avi\s*;\s*(?P<emotion>[A-Z])\s*;\s*A:\s*(?P<arousal>[\d.]+|NaN)\s*;"
        r"\s*V:\s*(?P<valence>[\d.]+|NaN)\s*;\s*D:\s*(?P<dominance>[\d.]+|NaN)\s*;.*",
        id="MSP-IMPROV-{key}",
        scale="1,5",
        maps={
            "emotion": {"A": "angry", "H": "happy", "S": "sad", "N": "neutral", "O": "other", "X": "no agreement"},
            "gender": {"F": "female", "M": "male"},
        },
        facts=_facts(
            "msp-improv",
            "MSP-IMPROV",
            "en",
            "other",
            "Given on request by the MSP laboratory of the University of Texas at Dallas under an academic licence; "
            "it may not be redistributed.",
            "https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Improv.html",
        ),
    ),
}
