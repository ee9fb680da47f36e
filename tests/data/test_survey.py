"""What rows teach, counted from data on disk, and the table that says so."""

import io
import json
from pathlib import Path

from rich.console import Console

from relllm import load_corpus
from relllm.data.survey import TRAINING, draw_survey, emotions_of, survey_rows, survey_splits
from relllm.labels import EMOTIONS


def load(rows: list[dict], folder: Path) -> object:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_corpus(folder / "rows.jsonl")


def test_every_kind_of_row_is_counted(tmp_path: Path) -> None:
    part = {"type": "audio", "path": "a.wav"}
    user, said = {"role": "user", "content": [part]}, [{"type": "text", "text": "Oh."}]
    answer: dict = {"role": "assistant", "content": []}
    typed = {"role": "user", "content": [{"type": "text", "text": "Hi."}]}
    rows = [
        {"id": "a", "emotion": "sad", "arousal": 0.2, "valence": 0.7, "messages": [user, {**answer, "content": said}]},
        {"id": "b", "emotion": "boredom", "arousal": None, "messages": [typed, answer]},
        {"id": "c", "emotion": None, "arousal": 1.0, "text": "hello", "messages": [user], "age": "40"},
    ]
    loaded = load(rows, tmp_path).map(lambda row: {"valence": None if row["valence"] is None else 7.0})
    survey = survey_rows(loaded)  # `load_corpus` would refuse the 7
    assert (survey.rows, survey.audio, survey.replies, survey.transcripts) == (3, 2, 1, 1)
    assert survey.emotions == {"sad": 1, "boredom": 1} and survey.ids_by_emotion["boredom"] == ["b"]
    assert survey.dimensions == {"arousal": 2, "dominance": 0, "valence": 0} and survey.outside == {"valence": [7.0]}
    assert survey.idle(["reply"]) == (2, ["b", "c"]) and "age" in survey.columns
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(draw_survey({"training": survey}))
    text = " ".join(console.export_text().split())
    assert "emotion: boredom" in text and "Columns that nothing reads: age." in text


def test_rows_of_a_corpus_have_a_reply_that_is_not_empty(tmp_path: Path) -> None:
    rows = [{"id": f"{index}", "audio": "a.wav", "response": reply} for index, reply in enumerate(("Oh.", "", None))]
    survey = survey_rows(load(rows, tmp_path))
    assert (survey.audio, survey.replies, survey.idle(["reply"])) == (3, 1, (2, ["1", "2"]))


def test_the_classes_of_a_new_head_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = [
        {"id": f"{i}", "audio": "a.wav", "emotion": name} for i, name in enumerate(("calm", "fear", "sad", "happy"))
    ]
    loaded = load(rows, tmp_path)
    assert emotions_of(survey_rows(loaded)) == ["happy", "sad", "fear", "calm"]
    assert emotions_of(survey_rows(loaded.remove_columns("emotion"))) == list(EMOTIONS) == emotions_of(None)
    assert list(survey_splits(loaded, {"dev": loaded})) == [TRAINING, "evaluation dev"]
    assert list(survey_splits(load_corpus(tmp_path / "rows.jsonl", streaming=True), None)) == []
