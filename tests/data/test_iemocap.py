"""IEMOCAP: the release's layout with all that lies beside the labels, its splits, and lines that are wrong."""

import os
import re
import string
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from corpus_trees import IEMOCAP_TURNS, Turn, write_iemocap, write_text, write_wav
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relllm.data.corpora.iemocap import NOT_IMPROVISED, parse_iemocap
from relllm.data.data_settings import IemocapSettings
from relllm.data.parsing import BAD_LINE, NO_AUDIO, NO_LABEL, OUTSIDE_SCALE, OUTSIDE_SET, REPEATED, UNKNOWN_EMOTION
from relllm.data.rows import COLUMNS, Corpus, validate_row

TURN = IEMOCAP_TURNS[0]
LABELS = Path("Session1/dialog/EmoEvaluation/Ses01F_impro01.txt")
CASES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def emotions(corpus: Corpus) -> dict[str, str | None]:
    return {row["id"]: row["emotion"] for row in corpus.rows}


def reasons(corpus: Corpus) -> dict[str, str]:
    return {entry.id: entry.reason for entry in corpus.dropped}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_iemocap(tmp_path / "IEMOCAP_full_release")


def test_a_turn_becomes_a_row_with_its_dimensions_by_name(tree: Path) -> None:
    corpus = parse_iemocap(IemocapSettings(tree, label_set="4"))
    row = next(row for row in corpus.rows if row["id"] == "Ses01F_impro01_M000")
    assert row == {
        "id": "Ses01F_impro01_M000",
        "audio": str(tree / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M000.wav"),
        "text": "No!",
        "response": None,
        "emotion": "angry",
        "arousal": 0.75,  # the second of the triple, 4.0
        "dominance": 0.875,  # the third, 4.5
        "valence": 0.125,  # the first, 1.5
        "dimension_source": "label",
        "speaker": "Ses01M",
        "session": "Ses01",
        "split": "train",
        "language": "en",
        "gender": "male",
        "style": "improvised",
        "events": None,
        "emotion_votes": ["neutral", "angry", "other"],
    }
    for row in corpus.rows:
        validate_row(row)
        assert tuple(row) == COLUMNS
        assert Path(row["audio"]).is_file()


def test_the_usual_task_has_excited_as_happy_and_nothing_beyond_four_emotions(tree: Path) -> None:
    corpus = parse_iemocap(IemocapSettings(tree, label_set="4"))
    assert emotions(corpus) == {
        "Ses01F_impro01_F000": "neutral",
        "Ses01F_impro01_M000": "angry",
        "Ses02M_script01_1_F003": "happy",
        "Ses03F_impro02_M010": "sad",
        "Ses04M_impro05_M001": "happy",
        "Ses05M_impro01_F002": "happy",
    }
    kept_out = ("Ses05F_impro03_F007", "Ses05F_script02_2_MXX0", "Ses05M_impro01_M002")
    assert reasons(corpus) == dict.fromkeys(kept_out, OUTSIDE_SET)


def test_the_other_label_sets_keep_more(tree: Path) -> None:
    assert emotions(parse_iemocap(IemocapSettings(tree, label_set="5")))["Ses05F_impro03_F007"] == "surprise"
    everything = emotions(parse_iemocap(IemocapSettings(tree, label_set="all", merge_excited=False)))
    assert len(everything) == len(IEMOCAP_TURNS)
    assert everything["Ses02M_script01_1_F003"] == "excited"
    assert everything["Ses05F_script02_2_MXX0"] == "frustrated"
    assert everything["Ses05M_impro01_M002"] is None  # no agreement of the raters
    unmerged = parse_iemocap(IemocapSettings(tree, label_set="4", merge_excited=False))
    assert reasons(unmerged)["Ses02M_script01_1_F003"] == OUTSIDE_SET


def test_the_speaker_is_in_the_turn_and_not_in_the_dialog(tree: Path) -> None:
    speakers = {row["id"]: row["speaker"] for row in parse_iemocap(IemocapSettings(tree, label_set="all")).rows}
    assert speakers["Ses02M_script01_1_F003"] == "Ses02F"
    assert speakers["Ses03F_impro02_M010"] == "Ses03M"
    assert speakers["Ses05F_script02_2_MXX0"] == "Ses05M"


def test_one_session_is_held_out_and_another_may_be_for_validation(tree: Path) -> None:
    def sessions(**kwargs: int | None) -> dict[str | None, set[str | None]]:
        found: dict[str | None, set[str | None]] = {}
        for row in parse_iemocap(IemocapSettings(tree, label_set="all", **kwargs)).rows:
            found.setdefault(row["split"], set()).add(row["session"])
        return found

    assert sessions() == {"train": {"Ses01", "Ses02", "Ses03", "Ses04"}, "test": {"Ses05"}}
    assert sessions(held_out_session=2, validation_session=4) == {
        "train": {"Ses01", "Ses03", "Ses05"},
        "test": {"Ses02"},
        "validation": {"Ses04"},
    }
    assert set(sessions(held_out_session=0)) == {"train"}


@pytest.mark.parametrize("kwargs", [{"held_out_session": 6}, {"validation_session": 5}, {"validation_session": 9}])
def test_a_session_that_is_not_there_is_refused(tree: Path, kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected a session that is there \(1, 2, 3, 4, 5\)"):
        parse_iemocap(IemocapSettings(tree, label_set="4", **kwargs))


def test_an_unknown_label_set_is_refused(tree: Path) -> None:
    with pytest.raises(ValueError, match="label_set must be one of 4, 5, all, got '6'"):
        parse_iemocap(IemocapSettings(tree, label_set="6"))  # type: ignore[arg-type]


def test_labels_with_a_byte_order_mark_and_latin_1_transcripts_are_read(tmp_path: Path) -> None:
    tree = write_iemocap(tmp_path, [replace(TURN, text="Un café, señor.")], encoding="latin-1")
    write_text(tree / LABELS, (tree / LABELS).read_text().replace("%", TURN.line + "\n%"), "utf-8-sig")
    corpus = parse_iemocap(IemocapSettings(tree, label_set="4", held_out_session=0))
    assert [row["text"] for row in corpus.rows] == ["Un café, señor."]
    assert corpus.notes == [
        "Transcripts that are not UTF-8 were read: Session1/dialog/transcriptions/Ses01F_impro01.txt as cp1252."
    ]


def test_audio_is_not_opened(tmp_path: Path) -> None:
    tree = write_iemocap(tmp_path, [TURN])
    next(tree.glob("Session1/sentences/wav/*/Ses*.wav")).write_bytes(b"")
    assert len(parse_iemocap(IemocapSettings(tree, label_set="4")).rows) == 1


def test_a_rating_outside_the_scale_is_left_empty_and_its_turn_stays(tmp_path: Path) -> None:
    turns = [replace(TURN, valence=5.5), Turn("Ses01F_impro01_F001", dominance=0.5), Turn("Ses01F_impro01_F002")]
    corpus = parse_iemocap(IemocapSettings(write_iemocap(tmp_path, turns), label_set="4"))
    assert [(row["arousal"], row["dominance"], row["valence"]) for row in corpus.rows] == [
        (0.5, 0.625, None),
        (0.5, None, 0.375),
        (0.5, 0.625, 0.375),
    ]
    assert [row["emotion"] for row in corpus.rows] == ["neutral"] * 3 and corpus.dropped == []
    assert [(entry.id, entry.reason, entry.detail) for entry in corpus.blanked] == [
        ("Ses01F_impro01_F000", OUTSIDE_SCALE, f"{LABELS}:3: valence is 5.5, expected 1 to 5"),
        ("Ses01F_impro01_F001", OUTSIDE_SCALE, f"{LABELS}:8: dominance is 0.5, expected 1 to 5"),
    ]


@pytest.mark.parametrize(
    ("line", "turn", "reason"),
    [
        ("[6.2901 - 8.2357]\tSes01F_impro01_F009\tneu\t[2.5000, 2.5000]", "Ses01F_impro01_F009", BAD_LINE),
        ("[6.2901 - 8.2357]\tSes01F_impro01_F009\tneu", "Ses01F_impro01_F009", BAD_LINE),
        ("[6.2901 - 8.2357]\tSes01F_impro01_F009\tneu\t[nan, 2.5, 2.5]", "Ses01F_impro01_F009", BAD_LINE),
        ("[6.2901 - 8.2357]\tSes01F_impro01_F009\tbored\t[2.5, 2.5, 2.5]", "Ses01F_impro01_F009", UNKNOWN_EMOTION),
        ("[6.2901 - 8.2357]\tSes01F_impro01\tneu\t[2.5, 2.5, 2.5]", f"{LABELS}:9", BAD_LINE),
        ("Somebody wrote here.", f"{LABELS}:9", BAD_LINE),
        (TURN.line, TURN.name, REPEATED),
    ],
)
def test_a_line_that_is_wrong_is_dropped_with_file_and_number(
    tmp_path: Path, line: str, turn: str, reason: str
) -> None:
    tree = write_iemocap(tmp_path, [TURN, Turn("Ses01F_impro01_F009")])
    content = (tree / LABELS).read_text().splitlines()
    content[content.index(Turn("Ses01F_impro01_F009").line)] = ""
    (tree / LABELS).write_text("\n".join([*content[:8], line, *content[8:]]))
    corpus = parse_iemocap(IemocapSettings(tree, label_set="4"))
    assert [row["id"] for row in corpus.rows] == [TURN.name]
    found = next(entry for entry in corpus.dropped if entry.id == turn)
    assert found.reason == reason
    assert f"{LABELS}:9" in found.detail
    # The turn's audio is there without a label, unless the line said whose it is.
    assert (reasons(corpus).get("Ses01F_impro01_F009") == NO_LABEL) == (turn != "Ses01F_impro01_F009")


def test_labels_without_audio_audio_without_labels_and_turns_without_text_are_told(tmp_path: Path) -> None:
    turns = [TURN, Turn("Ses01F_impro01_F001", audio=False), Turn("Ses01F_impro01_F002", text=None)]
    tree = write_iemocap(tmp_path, turns)
    write_wav(tree / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M005.wav")
    corpus = parse_iemocap(IemocapSettings(tree, label_set="4"))
    assert {row["id"]: row["text"] for row in corpus.rows} == {TURN.name: "Excuse me.", "Ses01F_impro01_F002": None}
    assert reasons(corpus) == {"Ses01F_impro01_F001": NO_AUDIO, "Ses01F_impro01_M005": NO_LABEL}
    assert corpus.notes == ["1 utterances have no transcript: Ses01F_impro01_F002."]


def test_noises_are_a_column_the_scripted_half_can_stay_out_and_odd_lines_are_told(tmp_path: Path) -> None:
    turns = [
        replace(TURN, text="[LAUGHTER] Excuse  me. [GARBAGE]"),
        Turn("Ses02M_script01_1_F003", text="[BREATHING]"),
    ]
    tree = write_iemocap(tmp_path, turns)
    path = tree / f"Session1/dialog/transcriptions/{TURN.dialog}.txt"
    write_text(path.with_suffix(".TXT"), path.read_text() + f"{TURN.dialog}_F009 and no colon\n")
    path.unlink()
    corpus = parse_iemocap(IemocapSettings(tree, label_set="4"))
    said = {row["id"]: (row["text"], row["events"], row["style"]) for row in corpus.rows}
    assert said == {
        TURN.name: ("Excuse me.", ["laughter", "garbage"], "improvised"),
        "Ses02M_script01_1_F003": (None, ["breathing"], "scripted"),
    }
    assert corpus.notes[0].startswith("1 lines of transcripts name a turn and do not parse")
    improvised = parse_iemocap(IemocapSettings(tree, label_set="4", improvised_only=True))
    assert [row["id"] for row in improvised.rows] == [TURN.name]
    assert reasons(improvised) == {"Ses02M_script01_1_F003": NOT_IMPROVISED}
    labels = tree / "Session2/dialog/EmoEvaluation/Ses02M_script01_1.txt"
    write_text(labels, re.sub(r"\[\d\.\d+, ", "[5.5000, ", labels.read_text()))
    assert parse_iemocap(IemocapSettings(tree, label_set="4")).blanked
    assert parse_iemocap(IemocapSettings(tree, label_set="4", improvised_only=True)).blanked == []


def test_excited_votes_count_as_happy_where_the_label_does(tmp_path: Path) -> None:
    tree = write_iemocap(tmp_path, [TURN])
    path = tree / LABELS
    write_text(path, path.read_text().replace("Neutral state; Anger; Other", "Excited; Other"))
    for merge, votes in ((True, ["happy", "other"]), (False, ["excited", "other"])):
        settings = IemocapSettings(tree, label_set="all", merge_excited=merge)
        assert [row["emotion_votes"] for row in parse_iemocap(settings).rows] == [votes]


COUNTS = {"neu": 1708, "hap": 595, "exc": 1041, "ang": 1103, "sad": 1084, "sur": 107, "fea": 40, "dis": 2, "oth": 3}
COUNTS |= {"fru": 1849, "xxx": 2507}


def test_a_label_tree_of_full_size_gives_the_known_counts(tmp_path: Path) -> None:
    names = [name for name, count in COUNTS.items() for _ in range(count)]
    dialogs: dict[str, list[str]] = {}
    for number, name in enumerate(names):  # 151 dialogs in five sessions
        dialog, turn = number % 151, number // 151
        dialogs.setdefault(f"Ses{dialog % 5 + 1:02d}F_impro{dialog:03d}", []).append(f"F{turn:03d}\t{name}")
    off_scale = 0
    for dialog, turns in dialogs.items():
        session = tmp_path / f"Session{int(dialog[3:5])}"
        (session / "sentences/wav" / dialog).mkdir(parents=True)
        lines = []
        for turn in turns:
            rating, off_scale = (
                ("5.5000", off_scale + 1) if turn == "F000\tneu" and off_scale < 7 else ("2.5", off_scale)
            )
            lines.append(f"[6.2901 - 8.2357]\t{dialog}_{turn}\t[{rating}, 2.5000, 2.5000]")
            (session / "sentences/wav" / dialog / f"{dialog}_{turn[:4]}.wav").touch()  # audio is not opened
        write_text(session / "dialog/EmoEvaluation" / f"{dialog}.txt", "\n".join(lines))
    everything = parse_iemocap(IemocapSettings(tmp_path, label_set="all"))
    assert len(everything.rows) == 10_039 and everything.dropped == [] and len(everything.blanked) == 7
    usual = parse_iemocap(IemocapSettings(tmp_path, label_set="4"))
    counts = {"neutral": 1708, "happy": 1636, "angry": 1103, "sad": 1084}
    assert Counter(row["emotion"] for row in usual.rows) == counts and len(usual.rows) == 5_531
    assert len(usual.blanked) == 7


def test_a_release_with_fewer_sessions_says_so(tmp_path: Path) -> None:
    tree = write_iemocap(tmp_path, [TURN])
    for number in (3, 5):
        (tree / f"Session{number}").rename(tree / f"gone{number}")
    with pytest.raises(ValueError, match=r"held_out_session is 5.*\(1, 2, 4\)"):
        parse_iemocap(IemocapSettings(tree, label_set="4"))
    assert parse_iemocap(IemocapSettings(tree, label_set="4", held_out_session=4)).notes == [
        "Sessions that are not there: 3, 5."
    ]


def test_a_wrong_root_is_refused_with_what_is_there_and_where_it_is(tree: Path) -> None:
    for wrong in (tree.parent, tree / "Session1"):
        with pytest.raises(ValueError, match=r"expected Session1/ … Session5/.*found ") as raised:
            parse_iemocap(IemocapSettings(wrong, label_set="4"))
        assert f"It is in {tree}: give that." in str(raised.value)
    with pytest.raises(ValueError, match="does not exist"):
        parse_iemocap(IemocapSettings(tree / "gone", label_set="4"))
    with pytest.raises(ValueError, match="is a file"):
        parse_iemocap(IemocapSettings(tree / LABELS, label_set="4"))
    (tree.parent.parent / "empty" / "deep").mkdir(parents=True)
    with pytest.raises(ValueError, match="found nothing"):
        parse_iemocap(IemocapSettings(tree.parent.parent / "empty" / "deep", label_set="4"))


rating = st.integers(10_000, 50_000).map(lambda value: value / 10_000)
names = st.builds(
    "Ses0{}{}_{}{:02d}{}_{}{:03d}".format,
    st.integers(1, 5),
    st.sampled_from("FM"),
    st.sampled_from(["impro", "script"]),
    st.integers(1, 9),
    st.sampled_from(["", "a", "b", "_1", "_2b"]),
    st.sampled_from("FM"),
    st.integers(0, 999),
)


@CASES
@given(
    st.lists(
        st.builds(Turn, names, st.sampled_from(["neu", "ang", "sad", "hap", "exc"]), rating, rating, rating),
        max_size=4,
        unique_by=lambda turn: turn.name,
    )
)
def test_every_well_formed_label_line_is_read_exactly(
    tmp_path_factory: pytest.TempPathFactory, turns: list[Turn]
) -> None:
    corpus = parse_iemocap(IemocapSettings(write_iemocap(tmp_path_factory.mktemp("iemocap"), turns), label_set="4"))
    found = {row["id"]: row for row in corpus.rows}
    assert corpus.dropped == []
    assert set(found) == {turn.name for turn in turns}
    for turn in turns:
        row = found[turn.name]
        scaled = [(value - 1) / 4 for value in (turn.activation, turn.dominance, turn.valence)]
        assert [row["arousal"], row["dominance"], row["valence"]] == pytest.approx(scaled, abs=1e-9)
        assert row["speaker"] == turn.name[:5] + turn.name.split("_")[-1][0]


@CASES
@given(st.lists(st.text(string.printable + "é•[]-%_", max_size=80), max_size=6))
def test_no_line_crashes_the_parser_or_vanishes(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    tree = write_iemocap(tmp_path_factory.mktemp("iemocap"), [TURN])
    with (tree / LABELS).open("a", encoding="utf-8", newline="") as file:
        file.write("\n".join(f"[{line}".replace("\n", " ").replace("\r", " ") for line in lines))
    corpus = parse_iemocap(IemocapSettings(tree, label_set="4"))
    assert len(corpus.rows) == 1
    assert len(corpus.dropped) == len(lines)


@pytest.mark.slow
@pytest.mark.skipif("RELLM_IEMOCAP" not in os.environ, reason="RELLM_IEMOCAP does not point at the real IEMOCAP")
def test_the_real_corpus_has_its_known_counts() -> None:
    corpus = parse_iemocap(IemocapSettings(Path(os.environ["RELLM_IEMOCAP"]), label_set="4"))
    counts = Counter(row["emotion"] for row in corpus.rows)
    assert counts == {"neutral": 1708, "happy": 595 + 1041, "angry": 1103, "sad": 1084}
    everything = parse_iemocap(IemocapSettings(Path(os.environ["RELLM_IEMOCAP"]), label_set="all"))
    assert len(everything.rows) == 10_039 and everything.dropped == []
    assert len({row["speaker"] for row in everything.rows}) == 10
    assert all(row["text"] for row in everything.rows)
