"""ESD: every layout and encoding that circulates, the blocks of numbers, the splits, and what contradicts itself."""

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from corpus_trees import esd_line, esd_name, esd_split, write_esd, write_text, write_wav
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relllm.data.corpora.esd import CONTRADICTION, NO_CLIP_NAME, NO_SPLIT_FOLDER, parse_esd
from relllm.data.data_settings import EsdSettings
from relllm.data.parsing import BAD_LINE, NO_AUDIO, OUTSIDE_SET, REPEATED
from relllm.data.rows import COLUMNS, Corpus, validate_row

CASES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def splits(corpus: Corpus) -> dict[str, str | None]:
    return {row["id"]: row["split"] for row in corpus.rows}


def reasons(corpus: Corpus) -> dict[str, str]:
    return {entry.id: entry.reason for entry in corpus.dropped}


@pytest.mark.parametrize("split_folders", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_every_layout_gives_the_same_rows(tmp_path: Path, nested: bool, split_folders: bool) -> None:
    corpus = parse_esd(EsdSettings(write_esd(tmp_path, nested=nested, split_folders=split_folders), label_set="5"))
    numbers = {
        "000001": ("neutral", "validation"),
        "000021": ("neutral", "test"),
        "000051": ("neutral", "train"),
        "000351": ("angry", "validation"),
        "000701": ("happy", "validation"),
        "001051": ("sad", "validation"),
        "001401": ("surprise", "validation"),
    }
    expected = {f"{speaker}_{number}": labels for speaker in ("0011", "0012") for number, labels in numbers.items()}
    assert {row["id"]: (row["emotion"], row["split"]) for row in corpus.rows} == expected
    assert (corpus.dropped, corpus.notes) == ([], [])
    for row in corpus.rows:
        validate_row(row)
        assert tuple(row) == COLUMNS
        assert Path(row["audio"]).stem == row["id"]
        assert Path(row["audio"]).is_file()
        assert row["text"] == f"It is number {int(row['id'][5:])}."
        assert (row["speaker"], row["session"], row["language"]) == (row["id"][:4], None, "en")
        assert row["arousal"] is row["dominance"] is row["valence"] is row["dimension_source"] is None


@pytest.mark.parametrize("names", [("val", "test"), ("valid", "test"), ("dev", "test"), ("eval", "test")])
@pytest.mark.parametrize("layout", ["split last", "split first", "flat"])
def test_mirrors_give_the_rows_of_the_release(tmp_path: Path, layout: str, names: tuple[str, str]) -> None:
    expected = parse_esd(EsdSettings(write_esd(tmp_path / "release", split_folders=True)))
    root = tmp_path / "mirror"
    for row in expected.rows:
        split = {"validation": names[0], "test": names[1], "train": "Train"}[row["split"]]
        speaker, emotion = row["speaker"], row["emotion"].title()
        folders = {
            "split last": f"{speaker}/{emotion}/{split}",
            "split first": f"{split}/{speaker}/{emotion}",
            "flat": "",
        }
        (root / folders[layout]).mkdir(parents=True, exist_ok=True)
        shutil.copy(row["audio"], root / folders[layout])
        text = tmp_path / "release" / speaker / f"{speaker}.txt"
        shutil.copy(text, root / {"split last": f"{speaker}", "split first": f"{split}/{speaker}", "flat": ""}[layout])
    found = parse_esd(EsdSettings(root))
    assert found.dropped == [] and found.notes == expected.notes

    def strip(corpus: Corpus) -> list[dict]:
        return sorted(({**row, "audio": ""} for row in corpus.rows), key=lambda row: row["id"])

    assert strip(found) == strip(expected)


def test_the_folder_with_the_speakers_is_taken_as_well_as_the_one_above(tmp_path: Path) -> None:
    write_esd(tmp_path, nested=True)
    inner = parse_esd(EsdSettings(tmp_path / "Emotion Speech Dataset", label_set="5"))
    assert inner.rows == parse_esd(EsdSettings(tmp_path, label_set="5")).rows


@pytest.mark.parametrize("name", ["dev", "Test", "train"])
def test_a_root_that_is_called_as_a_split_is_says_nothing_of_the_splits(tmp_path: Path, name: str) -> None:
    expected = parse_esd(EsdSettings(write_esd(tmp_path / "esd"), label_set="5"))
    (tmp_path / "esd").rename(tmp_path / name)
    found = parse_esd(EsdSettings(tmp_path / name, label_set="5"))
    assert splits(found) == splits(expected) and found.notes == expected.notes


def test_the_label_set_keeps_surprise_out_of_four_emotions(tmp_path: Path) -> None:
    corpus = parse_esd(EsdSettings(write_esd(tmp_path, ["0011"]), label_set="4"))
    assert reasons(corpus) == {"0011_001401": OUTSIDE_SET}
    assert len(corpus.rows) == 6


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
def test_transcripts_are_read_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    tree = write_esd(tmp_path, ["0011"], [1])
    write_text(tree / "0011" / "0011.txt", "\n0011_000001\tThe café is señor Núñez's.\tNeutral\r\n\n", encoding)
    corpus = parse_esd(EsdSettings(tree, label_set="5"))
    assert [row["text"] for row in corpus.rows] == ["The café is señor Núñez's."]
    legacy = encoding in ("cp1252", "latin-1")
    assert corpus.notes == (["Transcripts that are not UTF-8 were read: 0011.txt as cp1252."] if legacy else [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb2312"])
def test_mandarin_is_read_on_request(tmp_path: Path, encoding: str) -> None:
    tree = write_esd(tmp_path, ["0001", "0011"], [1])
    write_text(tree / "0001" / "0001.txt", "0001_000001\t打远一看，它们很是美丽。\t中立\n", encoding)
    english = parse_esd(EsdSettings(tree, label_set="5"))
    assert [row["id"] for row in english.rows] == ["0011_000001"]
    assert english.notes == ["Speakers left out, for language='en': 0001."]
    mandarin = parse_esd(EsdSettings(tree, label_set="5", language="zh"))
    assert [(row["text"], row["emotion"], row["language"]) for row in mandarin.rows] == [
        ("打远一看，它们很是美丽。", "neutral", "zh")
    ]
    assert "Emotions in the transcripts that are not compared with the number: '中立' (1 lines)." in mandarin.notes
    assert mandarin.facts.language == "zh"
    assert len(parse_esd(EsdSettings(tree, label_set="5", language="all")).rows) == 2
    assert parse_esd(EsdSettings(write_esd(tmp_path / "english"), label_set="5")).facts.language == "en"


def test_clips_without_a_transcript_keep_their_labels(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011"], [1, 351])
    (tree / "0011" / "0011.txt").unlink()
    corpus = parse_esd(EsdSettings(tree, label_set="5"))
    assert {row["id"]: (row["emotion"], row["text"]) for row in corpus.rows} == {
        "0011_000001": ("neutral", None),
        "0011_000351": ("angry", None),
    }
    assert corpus.notes == [
        "No transcripts of speaker 0011: there is no 0011.txt.",
        "2 clips have no transcript: 0011_000351, 0011_000001.",
    ]


def test_a_split_folder_wins_over_the_number_unless_told_otherwise_and_the_difference_is_named(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011"], [1, 51], split_folders=True)
    (tree / "0011/Neutral/train").rename(tree / "0011/Neutral/test")
    assert splits(parse_esd(EsdSettings(tree, label_set="5"))) == {"0011_000001": "validation", "0011_000051": "test"}
    numbers = parse_esd(EsdSettings(tree, label_set="5", splits="numbers"))
    assert splits(numbers) == {"0011_000001": "validation", "0011_000051": "train"}
    assert numbers.notes == [
        "The split folder contradicts the number block of 1 clips, and the number was taken: "
        "0011_000051 (folder test, number train)."
    ]
    assert "and the folder was taken" in parse_esd(EsdSettings(tree, label_set="5", splits="folders")).notes[0]


def test_splits_by_folder_drop_what_is_in_none_and_refuse_a_tree_without_any(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011"], [1, 351])
    with pytest.raises(ValueError, match="splits='folders', but .* has no folders train, test, evaluation"):
        parse_esd(EsdSettings(tree, label_set="5", splits="folders"))
    (tree / "0011/Angry/train").mkdir()
    (tree / "0011/Angry/0011_000351.wav").rename(tree / "0011/Angry/train/0011_000351.wav")
    corpus = parse_esd(EsdSettings(tree, label_set="5", splits="folders"))
    assert splits(corpus) == {"0011_000351": "train"}
    assert reasons(corpus) == {"0011_000001": NO_SPLIT_FOLDER}
    assert splits(parse_esd(EsdSettings(tree, label_set="5"))) == {"0011_000351": "train", "0011_000001": "validation"}


def test_speakers_left_out_are_heard_in_no_other_split(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011", "0012", "0013"], [1, 21, 51])
    found: dict[str | None, set[str]] = {}
    for row in parse_esd(EsdSettings(tree, label_set="5", leave_speakers_out=["0012"])).rows:
        found.setdefault(row["split"], set()).add(row["id"])
    assert found == {
        "test": {"0012_000001", "0012_000021", "0012_000051"},
        "validation": {"0011_000001", "0013_000001"},
        "train": {"0011_000021", "0011_000051", "0013_000021", "0013_000051"},
    }
    with pytest.raises(ValueError, match="leave_speakers_out has 0002; the speakers are 0011, 0012, 0013"):
        parse_esd(EsdSettings(tree, label_set="5", leave_speakers_out=["0002"]))


def test_a_folder_that_contradicts_the_number_drops_the_clip_and_a_transcript_is_noted(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011"], [1, 2, 3])
    (tree / "0011/Angry").mkdir()
    moved = tree / "0011/Angry/0011_000002.wav"
    (tree / "0011/Neutral/0011_000002.wav").rename(moved)
    lines = (tree / "0011/0011.txt").read_text().replace("number 3.\tNeutral", "number 3.\tHappy")
    (tree / "0011/0011.txt").write_text(lines)
    corpus = parse_esd(EsdSettings(tree, label_set="5"))
    assert [(row["id"], row["emotion"]) for row in corpus.rows] == [
        ("0011_000001", "neutral"),
        ("0011_000003", "neutral"),
    ]
    assert [(entry.id, entry.reason, entry.detail) for entry in corpus.dropped] == [
        ("0011_000002", CONTRADICTION, f"number: neutral, folder: angry ({moved})")
    ]
    [note] = corpus.notes
    assert note.startswith("The transcripts name another emotion than number and folder for 1 clips")
    assert re.search(r"0011_000003 \(0011/0011.txt:\d+: happy\)", note)


def test_lines_without_audio_and_lines_that_do_not_parse_are_dropped_with_their_number(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011"], [1, 2])
    lines = [
        esd_line("0011", 1),
        "0011_000002 Spaces for tabs. Neutral",
        "0011_000003\tNo such clip.\tNeutral",
        "0011_000004\tNo emotion here.",
        "What is this?",
        esd_line("0011", 1),
    ]
    write_text(tree / "0011" / "0011.txt", "\n".join(lines))
    corpus = parse_esd(EsdSettings(tree, label_set="5"))
    assert {row["id"]: row["text"] for row in corpus.rows} == {
        "0011_000001": "It is number 1.",
        "0011_000002": "Spaces for tabs.",
    }
    assert reasons(corpus) == {
        "0011_000003": NO_AUDIO,
        "0011/0011.txt:4": BAD_LINE,
        "0011/0011.txt:5": BAD_LINE,
        "0011/0011.txt:6": REPEATED,
    }


def test_files_that_are_no_clips_and_clips_that_lie_there_twice_are_told(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011"], [51], split_folders=True)
    for name in ("0011_000051", "0011_001751", "0012_000001", "take two"):
        write_wav(tree / "0011" / "Neutral" / f"{name}.wav")
    corpus = parse_esd(EsdSettings(tree, label_set="5"))
    assert [row["audio"] for row in corpus.rows] == [str(tree / "0011/Neutral/train/0011_000051.wav")]
    assert reasons(corpus) == {
        "0011_000051": REPEATED,
        "0011_001751": NO_CLIP_NAME,
        "0012_000001": NO_CLIP_NAME,
        "take two": NO_CLIP_NAME,
    }


def test_audio_is_not_opened(tmp_path: Path) -> None:
    tree = write_esd(tmp_path, ["0011"], [1])
    (tree / "0011/Neutral/0011_000001.wav").write_bytes(b"")
    assert len(parse_esd(EsdSettings(tree, label_set="5")).rows) == 1


def test_folders_that_may_not_be_read_are_passed_over_in_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write_esd(tmp_path / "disk", nested=True)
    (tree / "lost+found").mkdir()
    scan = os.scandir

    def refuse(path: str | Path) -> object:
        if "lost+found" in str(path):
            raise PermissionError(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(parse_esd(EsdSettings(tree, label_set="5")).rows) == 14
    with pytest.raises(ValueError, match=f"It is in {tree}: give that"):
        parse_esd(EsdSettings(tmp_path, label_set="5"))


def test_a_wrong_root_is_refused_with_what_is_there_and_where_it_is(tmp_path: Path) -> None:
    tree = write_esd(tmp_path / "corpora" / "ESD", nested=True)
    with pytest.raises(ValueError, match=rf"found ESD/. It is in {tree}: give that"):
        parse_esd(EsdSettings(tree.parent, label_set="5"))
    with pytest.raises(ValueError, match=r"found Angry/.*Emotion Speech Dataset: give that"):
        parse_esd(EsdSettings(tree / "Emotion Speech Dataset" / "0011", label_set="5"))
    with pytest.raises(ValueError, match="does not exist"):
        parse_esd(EsdSettings(tree / "gone", label_set="5"))
    with pytest.raises(ValueError, match="has the speakers 0011, 0012, none of the language 'zh'"):
        parse_esd(EsdSettings(tree, label_set="5", language="zh"))
    with pytest.raises(ValueError, match="language must be one of en, zh, all, got 'fr'"):
        parse_esd(EsdSettings(tree, label_set="5", language="fr"))  # type: ignore[arg-type]


@CASES
@given(number=st.integers(1, 1750), speaker=st.integers(11, 20), nested=st.booleans(), text=st.text(max_size=30))
def test_every_number_has_the_emotion_and_the_split_of_its_block(
    tmp_path_factory: pytest.TempPathFactory, number: int, speaker: int, nested: bool, text: str
) -> None:
    name = f"{speaker:04d}"
    tree = write_esd(tmp_path_factory.mktemp("esd"), [name], [number], nested=nested)
    words = " ".join(text.split())
    path = (tree / "Emotion Speech Dataset" if nested else tree) / name / f"{name}.txt"
    write_text(path, f"{name}_{number:06d}\t{words}\t{esd_name(number)}\n", "utf-16")
    corpus = parse_esd(EsdSettings(tree, label_set="5"))
    [row] = corpus.rows
    assert row["emotion"] == esd_name(number).lower()
    assert row["split"] == {"evaluation": "validation"}.get(esd_split(number), esd_split(number))
    assert row["text"] == (words or None)
    assert [entry.reason for entry in corpus.dropped] == ([] if words else [BAD_LINE])


@CASES
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=60), max_size=6))
def test_no_line_crashes_the_parser_or_vanishes(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    tree = write_esd(tmp_path_factory.mktemp("esd"), ["0011"], [1])
    write_text(tree / "0011" / "0011.txt", "\n".join([esd_line("0011", 1), *(f"?{line}" for line in lines)]))
    corpus = parse_esd(EsdSettings(tree, label_set="5"))
    assert len(corpus.rows) == 1
    assert [entry.id for entry in corpus.dropped] == [f"0011/0011.txt:{n}" for n in range(2, 2 + len(lines))]


@pytest.mark.slow
@pytest.mark.skipif("RELLM_ESD" not in os.environ, reason="RELLM_ESD does not point at the real ESD")
def test_the_real_corpus_has_its_known_counts() -> None:
    root = Path(os.environ["RELLM_ESD"])
    corpus = parse_esd(EsdSettings(root, label_set="5", splits="numbers"))
    assert Counter(row["split"] for row in corpus.rows) == {"validation": 1000, "test": 1500, "train": 15_000}
    assert set(Counter(row["emotion"] for row in corpus.rows).values()) == {3500}
    assert set(Counter((row["speaker"], row["emotion"]) for row in corpus.rows).values()) == {350}
    assert {row["speaker"] for row in corpus.rows} == {f"{number:04d}" for number in range(11, 21)}
