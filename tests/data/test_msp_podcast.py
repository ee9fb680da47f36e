"""MSP-Podcast: new and old releases, hidden and missing labels, unknown speakers, and lines that are wrong."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from corpus_trees import MSP_HEADER, MSP_SEGMENTS, Segment, write_msp_podcast, write_text, write_wav
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relllm.data.corpora.msp_podcast import UNKNOWN_SPLIT, parse_msp_podcast
from relllm.data.data_settings import MspPodcastSettings
from relllm.data.parsing import BAD_LINE, NO_AUDIO, NO_LABEL, OUTSIDE_SCALE, OUTSIDE_SET, REPEATED, UNKNOWN_EMOTION
from relllm.data.rows import COLUMNS, Corpus, validate_row

FIRST = MSP_SEGMENTS[0]
LABELS = Path("Labels/labels_consensus.csv")
CASES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reasons(corpus: Corpus) -> dict[str, str]:
    return {entry.id: entry.reason for entry in corpus.dropped}


def test_a_turn_becomes_a_row_with_its_dimensions_by_name(tmp_path: Path) -> None:
    corpus = parse_msp_podcast(MspPodcastSettings(write_msp_podcast(tmp_path), label_set="5"))
    row = corpus.rows[0]
    assert row | {"arousal": None, "dominance": None, "valence": None} == {
        "id": "MSP-PODCAST_0001_0008",
        "audio": str(tmp_path / "Audios" / "MSP-PODCAST_0001_0008.wav"),
        "text": "And that was it.",
        "response": None,
        "emotion": "neutral",
        "arousal": None,
        "dominance": None,
        "valence": None,
        "dimension_source": "label",
        "speaker": "30",
        "session": None,
        "split": "test",
        "language": "en",
        "gender": "male",
        "style": None,
        "events": None,
        "emotion_votes": ["neutral", "neutral"],
    }
    dimensions = (row["arousal"], row["dominance"], row["valence"])
    assert dimensions == pytest.approx((1.2 / 6, 1.6 / 6, 3.0 / 6))  # the file's order is act, val, dom
    for row in corpus.rows:
        validate_row(row)
        assert tuple(row) == COLUMNS
        assert Path(row["audio"]).is_file()


@pytest.mark.parametrize("label_set", ["4", "5", "all"])
def test_old_and_new_releases_give_the_same_rows(tmp_path: Path, label_set: str) -> None:
    def strip(corpus: Corpus) -> list[dict]:
        return [dict(row) | {"audio": Path(row["audio"]).name, "gender": None} for row in corpus.rows]

    new = parse_msp_podcast(MspPodcastSettings(write_msp_podcast(tmp_path / "new"), label_set=label_set))
    old = parse_msp_podcast(
        MspPodcastSettings(write_msp_podcast(tmp_path / "old", release="txt"), label_set=label_set)
    )
    assert strip(old) == strip(new)
    assert old.dropped == new.dropped
    assert old.notes == new.notes == ["The speaker of 1 turns is unknown: whether they overlap splits cannot be told."]


def test_splits_are_the_corpus_s_own_and_test_is_test1(tmp_path: Path) -> None:
    corpus = parse_msp_podcast(MspPodcastSettings(write_msp_podcast(tmp_path), label_set="5"))
    assert {row["id"][12:]: (row["emotion"], row["split"], row["speaker"]) for row in corpus.rows} == {
        "0001_0008": ("neutral", "test", "30"),
        "0001_0019": ("angry", "train", None),
        "0002_0033": ("happy", "validation", "127"),
        "0003_0001": ("sad", "test2", "30"),
        "0003_0002_0001": ("surprise", "train", "30"),
    }
    assert reasons(corpus) == {f"MSP-PODCAST_0004_{number}": OUTSIDE_SET for number in ("0004", "0005", "0006")}


def test_all_emotions_keep_other_and_no_agreement_without_an_emotion(tmp_path: Path) -> None:
    corpus = parse_msp_podcast(MspPodcastSettings(write_msp_podcast(tmp_path), label_set="all"))
    emotions = {row["id"][12:]: row["emotion"] for row in corpus.rows}
    assert emotions["0004_0004"] == "fear"
    assert emotions["0004_0005"] is emotions["0004_0006"] is None
    assert corpus.rows[-1]["arousal"] == pytest.approx(0.2)


@pytest.mark.parametrize("hidden", ["in no file", "empty in the CSV file", "in the partition"])
def test_the_turns_of_test3_have_no_labels(tmp_path: Path, hidden: str) -> None:
    stem = "MSP-PODCAST_test3_0001"
    blank = Segment(stem, "", "", "", "", speaker="", split="Test3", text=None)
    tree = write_msp_podcast(tmp_path, [FIRST, blank] if hidden == "empty in the CSV file" else [FIRST])
    write_wav(tree / "Audios" / f"{stem}.wav")
    if hidden == "in the partition":
        write_text(tree / "Partition.txt", f"Train; {FIRST.stem}.wav\n\nTest3; {stem}.wav\n")
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    if hidden == "in no file":  # then nothing says that it is of Test3
        assert reasons(corpus) == {stem: NO_LABEL}
        return
    row = corpus.rows[1]
    validate_row(row)
    assert (row["id"], row["split"], row["emotion"], row["dimension_source"]) == (stem, "test3", None, None)
    assert row["arousal"] is row["dominance"] is row["valence"] is row["speaker"] is row["text"] is None
    assert corpus.notes[0] == "The labels of 1 turns of test3 are hidden; their rows have none."


def test_labels_that_are_missing_elsewhere_are_dropped(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST, Segment("MSP-PODCAST_0009_0001", "", "", "", "")])
    assert reasons(parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))) == {"MSP-PODCAST_0009_0001": NO_LABEL}


def test_old_labels_without_partitions_and_speakers_say_what_is_lost(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST], release="txt")
    (tree / "Partitions.txt").unlink()
    (tree / "Speaker_ids.txt").unlink()
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    assert [(row["split"], row["speaker"]) for row in corpus.rows] == [(None, None)]
    assert corpus.notes[:2] == [
        "Labels.txt names no splits, and partitions.txt is not there: that of every turn is unknown.",
        "Labels.txt names no speakers, and speaker_ids.txt is not there: that of every turn is unknown.",
    ]


def test_the_misspelt_name_and_another_place_of_the_labels_are_found(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path / "csv", [FIRST])
    (tree / LABELS).rename(tree / "Labels" / "labels_concensus.csv")
    assert len(parse_msp_podcast(MspPodcastSettings(tree, label_set="5")).rows) == 1
    tree = write_msp_podcast(tmp_path / "txt", [FIRST], release="txt")
    (tree / "label").mkdir()
    (tree / "Labels.txt").rename(tree / "label" / "labels.txt")
    assert len(parse_msp_podcast(MspPodcastSettings(tree, label_set="5")).rows) == 1


def test_labels_without_audio_audio_without_labels_and_turns_without_text_are_told(tmp_path: Path) -> None:
    silent = Segment("MSP-PODCAST_0008_0001", text=None)
    tree = write_msp_podcast(tmp_path, [FIRST, silent, Segment("MSP-PODCAST_0008_0002", audio=False)])
    write_wav(tree / "Audios" / "MSP-PODCAST_0008_0003.wav")
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    assert {row["id"]: row["text"] for row in corpus.rows} == {FIRST.stem: "And that was it.", silent.stem: None}
    assert reasons(corpus) == {"MSP-PODCAST_0008_0002": NO_AUDIO, "MSP-PODCAST_0008_0003": NO_LABEL}
    assert corpus.notes == [f"1 turns have no transcript: {silent.stem}."]


def test_transcripts_in_latin_1_are_read_and_counted(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [replace(FIRST, text="  Señor\n Núñez ")], encoding="latin-1")
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    assert corpus.rows[0]["text"] == "Señor Núñez"
    assert corpus.notes == ["Transcripts that are not UTF-8 were read: 1 as cp1252."]


@pytest.mark.parametrize(
    ("line", "name", "reason", "detail"),
    [
        ("MSP-PODCAST_9.wav,Q,2.2,4.0,2.6,30,Male,Train", "MSP-PODCAST_9", UNKNOWN_EMOTION, "'Q'"),
        ("MSP-PODCAST_9.wav,N,2.2,high,2.6,30,Male,Train", "MSP-PODCAST_9", BAD_LINE, "'valence': 'high'"),
        ("MSP-PODCAST_9.wav,N,2.2,,2.6,30,Male,Train", "MSP-PODCAST_9", BAD_LINE, "'valence': ''"),
        ("MSP-PODCAST_9.wav,N,2.2,4.0,2.6,30,Male,Nowhere", "MSP-PODCAST_9", UNKNOWN_SPLIT, "'Nowhere'"),
        ("MSP-PODCAST_9.wav,N,2.2,4.0", "MSP-PODCAST_9", BAD_LINE, "MSP-PODCAST_9.wav,N,2.2,4.0"),
        ("MSP-PODCAST_9.wav,N,2,2,4,0,2,6,30,Male,Train", "MSP-PODCAST_9", BAD_LINE, "MSP-PODCAST_9.wav,N,2,2"),
        ("a note", f"{LABELS}:3", BAD_LINE, "a note"),
        (FIRST.csv_line, FIRST.stem, REPEATED, f"first in {LABELS}:2"),
    ],
)
def test_a_line_that_is_wrong_is_dropped_with_file_and_number(
    tmp_path: Path, line: str, name: str, reason: str, detail: str
) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST])
    write_wav(tree / "Audios" / "MSP-PODCAST_9.wav")
    write_text(tree / LABELS, "\n".join([MSP_HEADER, FIRST.csv_line, line]))
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    assert [row["id"] for row in corpus.rows] == [FIRST.stem]
    found = next(entry for entry in corpus.dropped if entry.id == name)
    assert found.reason == reason
    assert found.detail.startswith(f"{LABELS}:3")
    assert detail in found.detail


def test_a_rating_outside_the_scale_is_left_empty_and_its_turn_stays(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [replace(FIRST, arousal="7.5", valence="0.9"), replace(FIRST, stem="B_0001")])
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    first, second = corpus.rows
    assert first["arousal"] is first["valence"] is None and first["dominance"] == second["dominance"]
    assert second["arousal"] == pytest.approx(1.2 / 6) and corpus.dropped == []
    assert [(entry.id, entry.reason, entry.detail) for entry in corpus.blanked] == [
        (FIRST.stem, OUTSIDE_SCALE, f"{LABELS}:2: arousal is 7.5, expected 1 to 7"),
        (FIRST.stem, OUTSIDE_SCALE, f"{LABELS}:2: valence is 0.9, expected 1 to 7"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "MSP-PODCAST_9.wav; N; A:2.2; V:4.0;",
        "MSP-PODCAST_9.wav; N; A:2.2; V:4.0; V:2.6;",
        "MSP-PODCAST_9.wav",
        "SOMEBODY; Neutral; ; A:3.0; V:4.0; D:4.0;",
    ],
)
def test_a_line_of_old_labels_that_is_wrong_is_dropped(tmp_path: Path, line: str) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST], release="txt")
    write_text(tree / "Labels.txt", f"{line}\n{FIRST.text_block}")
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    assert [row["id"] for row in corpus.rows] == [FIRST.stem]
    assert [(entry.reason, entry.detail) for entry in corpus.dropped] == [(BAD_LINE, f"Labels.txt:1: {line}")]


def test_headers_in_another_case_quoted_commas_short_names_and_the_folder_audio_are_read(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST])
    (tree / "Audios").rename(tree / "Audio")
    header, line = f"{MSP_HEADER.upper()},NOTE", f'{FIRST.stem},N,2.2,4.0,2.6,-1,Female,Dev,"said, twice"'
    write_text(tree / LABELS, f"{header}\n{line}\n")
    write_text(
        tree / "Labels/labels_detailed.csv", f'FileName,EmoDetail\n{FIRST.stem},"WORKER1; Sad; Sad,Hurt; A:3;"\n'
    )
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    row = corpus.rows[0]
    assert (row["id"], row["split"], row["speaker"], row["gender"]) == (FIRST.stem, "validation", None, "female")
    assert row["emotion_votes"] == ["sad"] and corpus.dropped == []
    write_text(tree / LABELS, f"{header}\n{line.replace('Female', 'Unknown')}\n")
    assert parse_msp_podcast(MspPodcastSettings(tree, label_set="5")).rows[0]["gender"] is None


def test_old_labels_go_by_the_letters_and_not_by_the_order(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST], release="txt")
    write_text(tree / "Labels.txt", f"{FIRST.stem}.wav; N; D:7.0; A:1.0; V:4.0;\n")
    row = parse_msp_podcast(MspPodcastSettings(tree, label_set="5")).rows[0]
    assert (row["arousal"], row["dominance"], row["valence"]) == (0.0, 1.0, 0.5)


def test_a_csv_file_without_a_column_is_refused(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST])
    write_text(tree / LABELS, "FileName,EmoClass,EmoAct,EmoVal,EmoDom,Gender\n")
    with pytest.raises(ValueError, match="lacks the columns SpkrID, Split_Set; its first line is FileName,EmoClass"):
        parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))


def test_audio_is_not_opened(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path, [FIRST])
    (tree / "Audios" / f"{FIRST.stem}.wav").write_bytes(b"")
    assert len(parse_msp_podcast(MspPodcastSettings(tree, label_set="5")).rows) == 1


def test_a_wrong_root_is_refused_with_what_is_there_and_where_it_is(tmp_path: Path) -> None:
    tree = write_msp_podcast(tmp_path / "podcast", [FIRST])
    with pytest.raises(ValueError, match=rf"found podcast/. It is in {tree}: give that"):
        parse_msp_podcast(MspPodcastSettings(tmp_path, label_set="5"))
    with pytest.raises(ValueError, match=rf"found {FIRST.stem}.wav. It is in {tree}: give that"):
        parse_msp_podcast(MspPodcastSettings(tree / "Audios", label_set="5"))
    (tree / LABELS).unlink()
    with pytest.raises(
        ValueError, match="expected Audios/ and Labels/labels_consensus.csv, or Labels.txt; found Audios/"
    ):
        parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))


rating = st.integers(1000, 7000).map(lambda value: f"{value / 1000:.3f}")
segments = st.lists(
    st.builds(
        Segment,
        st.builds("MSP-PODCAST_{:04d}_{:04d}".format, st.integers(0, 9999), st.integers(0, 9999)),
        st.sampled_from("ASHUFDCNOX"),
        rating,
        rating,
        rating,
        speaker=st.one_of(st.integers(1, 3000).map(str), st.just("Unknown")),
        split=st.sampled_from(["Train", "Development", "Test1", "Test2", "Test3"]),
    ),
    max_size=4,
    unique_by=lambda segment: segment.stem,
)


@CASES
@given(segments, st.sampled_from(["csv", "txt"]))
def test_every_well_formed_label_line_is_read_exactly(
    tmp_path_factory: pytest.TempPathFactory, written: list[Segment], release: str
) -> None:
    tree = write_msp_podcast(tmp_path_factory.mktemp("msp"), written, release=release)
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="all"))
    assert corpus.dropped == []
    rows = {row["id"]: row for row in corpus.rows}
    assert set(rows) == {segment.stem for segment in written}
    for segment in written:
        row = rows[segment.stem]
        scaled = [(float(value) - 1) / 6 for value in (segment.arousal, segment.dominance, segment.valence)]
        assert [row["arousal"], row["dominance"], row["valence"]] == pytest.approx(scaled, abs=1e-6)
        assert row["speaker"] == (None if segment.speaker == "Unknown" else segment.speaker)
        assert (row["emotion"] is None) == (segment.emotion in "OX")


@CASES
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=60), max_size=6))
def test_no_line_crashes_the_parser_or_vanishes(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    tree = write_msp_podcast(tmp_path_factory.mktemp("msp"), [FIRST])
    write_text(tree / LABELS, "\n".join([MSP_HEADER, FIRST.csv_line, *(f"?{line}" for line in lines)]))
    corpus = parse_msp_podcast(MspPodcastSettings(tree, label_set="5"))
    assert len(corpus.rows) == 1
    assert len(corpus.dropped) == len(lines)


@pytest.mark.slow
@pytest.mark.skipif(
    "RELLM_MSP_PODCAST" not in os.environ, reason="RELLM_MSP_PODCAST does not point at the real corpus"
)
def test_the_real_corpus_has_its_known_counts() -> None:
    corpus = parse_msp_podcast(MspPodcastSettings(Path(os.environ["RELLM_MSP_PODCAST"]), label_set="all"))
    allowed = {OUTSIDE_SCALE, NO_LABEL}
    assert {entry.reason for entry in corpus.dropped} <= allowed, corpus.dropped[:5]
    counts = Counter(row["split"] for row in corpus.rows)
    assert set(counts) <= {"train", "validation", "test", "test2", "test3"}
    if (counts["train"], counts["test"]) == (84_030, 30_647):  # release 1.11, as the corpus's page counts it
        assert (counts["validation"], counts["test2"]) == (19_815, 14_815)
        assert counts["test3"] + sum(entry.reason == NO_LABEL for entry in corpus.dropped) == 2_347
