"""Corpora by pattern: seven in their public layouts, and one of a lab's own in five lines."""

from pathlib import Path

import pytest
from corpus_trees import write_text, write_wav
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.corpora.folder import parse_folder, parse_pattern
from relllm.data.corpora.patterns import NO_MATCH, PATTERNS
from relllm.data.data_settings import FolderSettings, LabelSettings
from relllm.data.loading import load_corpus
from relllm.data.parsing import NO_AUDIO, NO_LABEL, OUTSIDE_SET, REPEATED
from relllm.data.rows import Corpus, validate_row

MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime\n"
# Files of each, and of some rows: id -> emotion, speaker, split, text, gender.
TREES: dict[str, tuple[list[str], dict[str, str], dict[str, tuple]]] = {
    "hedgewars": (
        [f"voices/{name}.ogg" for name in ("Default_uk/Laugh", "Pirate/Uh-oh", "Pirate/Traitor", "Singer/Ow3")],
        {},
        {
            "Default_uk-Laugh": ("happy", "Default_uk", None, None, None),
            "Pirate-Uh-oh": ("alarm", "Pirate", None, None, None),
            "Pirate-Traitor": ("angry", "Pirate", None, None, None),
            "Singer-Ow3": ("pain", "Singer", None, None, None),
        },
    ),
    "ravdess": (
        [
            "Actor_01/03-01-02-01-01-01-01.wav",
            "Actor_24/03-01-06-02-02-02-24.wav",
            "Actor_02/03-01-08-01-01-01-02.wav",
        ],
        {},
        {
            "03-01-02-01-01-01-01": ("calm", "01", None, "Kids are talking by the door.", "male"),
            "03-01-06-02-02-02-24": ("fear", "24", None, "Dogs are sitting by the door.", "female"),
            "03-01-08-01-01-01-02": ("surprise", "02", None, "Kids are talking by the door.", "female"),
        },
    ),
    "crema-d": (
        ["AudioWAV/1001_DFA_ANG_XX.wav", "AudioWAV/1091_IEO_HAP_LO.wav", "AudioWAV/1002_WSI_FEA_X.wav"],
        {"VideoDemographics.csv": "ActorID,Age,Sex\n1001,51,Male\n"},
        {
            "1001_DFA_ANG_XX": ("angry", "1001", None, "Don't forget a jacket.", None),
            "1091_IEO_HAP_LO": ("happy", "1091", None, "It's eleven o'clock.", None),
            "1002_WSI_FEA_X": ("fear", "1002", None, "We'll stop in a couple of minutes.", None),
        },
    ),
    "emodb": (
        ["wav/03a01Fa.wav", "wav/08b02Ac.wav", "wav/16a07La.wav", "wav/13b10Wa.wav"],
        {"erklaerung.txt": "nichts"},
        {
            "03a01Fa": ("happy", "03", None, "Der Lappen liegt auf dem Eisschrank.", "male"),
            "08b02Ac": (
                "fear",
                "08",
                None,
                "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
                "female",
            ),
            "16a07La": ("boredom", "16", None, "In sieben Stunden wird es soweit sein.", "female"),
            "13b10Wa": ("angry", "13", None, "Die wird auf dem Platz sein, wo wir sie immer hinlegen.", "female"),
        },
    ),
    "savee": (
        ["AudioData/DC/sa01.wav", "AudioData/KL/su15.wav", "ALL/JE_n30.wav", "AudioData/JK/a02.wav"],
        {"AudioData/Info.txt": "read me"},
        {
            "DC_sa01": ("sad", "DC", None, None, None),
            "KL_su15": ("surprise", "KL", None, None, None),
            "JE_n30": ("neutral", "JE", None, None, None),
            "JK_a02": ("angry", "JK", None, None, None),
        },
    ),
    "meld": (
        [
            "train_splits/dia0_utt0.wav",
            "dev_splits_complete/dia0_utt0.wav",
            "output_repeated_splits_test/dia0_utt0.wav",
        ],
        {
            "train_sent_emo.csv": f"{MELD_HEADER}1,I’m fine.,Chandler,neutral,neutral,0,0,8,21,0,1\n",
            "dev_sent_emo.csv": f"{MELD_HEADER}1,Oh no!,Phoebe,sadness,negative,0,0,4,7,0,1\n",
            "test_sent_emo.csv": f'{MELD_HEADER}1,"Why, yes",Mark,joy,positive,0,0,3,19,0,1\n',
        },
        {
            "train_dia0_utt0": ("neutral", "Chandler", "train", "I’m fine.", None),
            "dev_dia0_utt0": ("sad", "Phoebe", "validation", "Oh no!", None),
            "test_dia0_utt0": ("happy", "Mark", "test", "Why, yes", None),
        },
    ),
    "msp-improv": (
        [
            "Audio/session1/S01A/P/MSP-IMPROV-S01A-F01-P-FM01.wav",
            "Audio/session2/S03H/S/MSP-IMPROV-S03H-M02-S-FM03.wav",
        ],
        {
            "Evalution.txt": "UTD-IMPROV-S01A-F01-P-FM01.avi; A; A:5.000000; V:1.000000; D:NaN ; N:5.000000;\n"
            "WORKER1; Anger; ; A:5; V:1; D:2;\n\nUTD-IMPROV-S03H-M02-S-FM03.avi; X; A:3.0; V:3.0; D:2.0; N:4.0;\n"
        },
        {
            "MSP-IMPROV-S01A-F01-P-FM01": ("angry", "F01", None, None, "female"),
            "MSP-IMPROV-S03H-M02-S-FM03": (None, "M02", None, None, "male"),
        },
    ),
}


def write_tree(root: Path, name: str) -> Path:
    audio, tables, _ = TREES[name]
    for path in audio:
        write_wav(root / name / path)
        write_text((root / name / path).with_name(f"._{Path(path).name}"), "\x00")
    for path, text in tables.items():
        write_text(root / name / path, text)
    return root / name


def shown(corpus: Corpus) -> dict[str, tuple]:
    columns = ("emotion", "speaker", "split", "text", "gender")
    return {row["id"]: tuple(row[name] for name in columns) for row in corpus.rows}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_corpus_is_read_in_its_public_layout(name: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path, name)
    corpus = parse_pattern(PATTERNS[name], LabelSettings(root))
    assert shown(corpus) == TREES[name][2] and corpus.dropped == []
    for row in corpus.rows:
        validate_row(row, corpus.own_emotions)
        language = {"emodb": "de"}.get(name, "uk" if "_uk" in row["id"] else "en")
        assert row["language"] == language and Path(row["audio"]).is_file()
    with pytest.raises(ValueError, match="expected audio files like"):
        parse_pattern(PATTERNS[name], LabelSettings(write_tree(tmp_path, "savee" if name != "savee" else "emodb")))


def test_what_a_row_does_not_show_of_the_seven(tmp_path: Path) -> None:
    rated, unrated = parse_pattern(PATTERNS["msp-improv"], LabelSettings(write_tree(tmp_path, "msp-improv"))).rows
    assert (rated["arousal"], rated["dominance"], rated["valence"], rated["session"]) == (1.0, None, 0.0, "1")
    assert (unrated["arousal"], unrated["dominance"], unrated["dimension_source"]) == (0.5, 0.25, "label")
    four = parse_pattern(PATTERNS["emodb"], LabelSettings(write_tree(tmp_path, "emodb"), label_set="4"))
    assert {entry.id: entry.reason for entry in four.dropped} == {"08b02Ac": OUTSIDE_SET, "16a07La": OUTSIDE_SET}
    merged = LabelSettings(write_tree(tmp_path, "ravdess"), emotions=("calm=neutral", "02=neutral"))
    assert shown(parse_pattern(PATTERNS["ravdess"], merged))["03-01-02-01-01-01-01"][0] == "neutral"


def test_songs_copies_lines_without_audio_and_audio_without_a_line_are_told(tmp_path: Path) -> None:
    root = write_tree(tmp_path, "ravdess")
    write_wav(root / "audio_speech_actors_01-24/Actor_01/03-01-02-01-01-01-01.wav")  # as in a mirror
    write_wav(root / "Actor_01/03-02-02-01-01-01-01.wav")
    dropped = parse_pattern(PATTERNS["ravdess"], LabelSettings(root)).dropped
    assert [(entry.reason, Path(entry.id).stem) for entry in dropped] == [
        (NO_MATCH, "03-02-02-01-01-01-01"),
        (REPEATED, "03-01-02-01-01-01-01"),
    ]
    root = write_tree(tmp_path, "meld")
    (root / "dev_splits_complete/dia0_utt0.wav").unlink()
    write_wav(root / "train_splits/dia7_utt1.wav")
    dropped = parse_pattern(PATTERNS["meld"], LabelSettings(root)).dropped
    assert {entry.id: entry.reason for entry in dropped} == {"dev_dia0_utt0": NO_AUDIO, "train_dia7_utt1": NO_LABEL}


PATTERN = r"""
path: (?P<speaker>\w+)/(?P<split>[a-z-]+)/(?P<emotion>\d\d)_\w+\.wav
maps:
  emotion: {01: froh, 02: angry, 03: other}
  split: {train-a: train, heldout: test}
language: fr
licence: cc-by-4.0
"""


def test_a_lab_s_own_corpus_is_five_lines(tmp_path: Path) -> None:
    for path in ("ana/train-a/01_x.wav", "ben/heldout/02_y.wav", "ben/heldout/03_z.wav"):
        write_wav(tmp_path / "lab" / path)
    (tmp_path / "lab.yaml").write_text(PATTERN)
    corpus = parse_folder(FolderSettings(tmp_path / "lab", pattern=str(tmp_path / "lab.yaml")))
    assert shown(corpus) == {
        "ana/train-a/01_x": ("froh", "ana", "train", None, None),
        "ben/heldout/02_y": ("angry", "ben", "test", None, None),
        "ben/heldout/03_z": (None, "ben", "test", None, None),
    }
    assert (corpus.facts.name, corpus.facts.title, corpus.facts.licence) == ("folder", "lab", "cc-by-4.0")
    assert {row["language"] for row in corpus.rows} == {"fr"} and corpus.own_emotions == {"froh"}
    expression = r"(?P<speaker>\w+)/(?P<split>[a-z-]+)/(?P<emotion>\d\d)_\w+\.wav"
    told = {"emotions": ("01=happy", "02=angry", "03=sad"), "splits": ("train-a=train", "heldout=test")}
    corpus = parse_folder(FolderSettings(tmp_path / "lab", pattern=expression, **told))
    assert [row["emotion"] for row in corpus.rows] == ["happy", "angry", "sad"]
    for broken in ("(", "(?i)x"):
        with pytest.raises(ValueError, match="no regular expression"):
            parse_folder(FolderSettings(tmp_path / "lab", pattern=broken))
    for content, message in (("paths: x", "expected `path`"), ("path: x\nmaps: {emotion: sad}", "maps has pairs")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            parse_folder(FolderSettings(tmp_path / "lab", pattern=str(tmp_path / "bad.yaml")))
    (tmp_path / "spoken").mkdir()
    write_wav(tmp_path / "spoken" / "0.wav")
    write_text(tmp_path / "spoken" / "t.csv", "n,emo,spk\n0,happy,\n")
    table = r"{path: '(?P<n>\d)\.wav', table: 't\.csv', id: '{n}', columns: {emotion: emo, speaker: spk}}"
    (tmp_path / "table.yaml").write_text(table)
    (row,) = parse_folder(FolderSettings(tmp_path / "spoken", pattern=str(tmp_path / "table.yaml"))).rows
    assert (row["emotion"], row["speaker"]) == ("happy", None)  # a column that is there, and empty
    for columns, message in ((("emotion=mod",), r"columns names \['mod'\]"), (("emotoin=speaker",), "columns has")):
        with pytest.raises(ValueError, match=message):
            parse_folder(FolderSettings(tmp_path / "lab", pattern=expression, columns=columns, **told))


@pytest.mark.usefixtures("no_drawing")
def test_the_command_writes_a_data_set_with_names_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = write_tree(tmp_path, "emodb")
    done = CliRunner().invoke(app, ["prepare", "emodb", str(root), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = load_corpus(tmp_path / "out", "train")
    assert sorted(rows["emotion"]) == ["angry", "boredom", "fear", "happy"]
    assert "EmoDB" in (tmp_path / "out/README.md").read_text()
