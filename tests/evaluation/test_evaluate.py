"""`relllm evaluate`: its numbers from its lines, by hand; killed and resumed; two processes; folds; the command."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from empathy_scorers import scorer_of
from pictures import blank_pictures
from processes import ForkServer
from scipy.spatial.distance import jensenshannon
from tiny_models import RATE, clip, tiny_llm, tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoTokenizer, LlamaModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from typer.testing import CliRunner

from relllm import ReLLMEmotionModel
from relllm.cli import app
from relllm.data.loading import load_corpus
from relllm.evaluation import evaluating, folds
from relllm.evaluation.empathy.scoring import load_scorers, score_pairs
from relllm.evaluation.evaluating import evaluate, plan_batches, read_predictions
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.fingerprints import data_fingerprint, model_fingerprint
from relllm.evaluation.folds import evaluate_folds, fold_values
from relllm.evaluation.predicting import SpeechPredictor
from relllm.evaluation.summary import _classes_without_clips, summarize_clips
from relllm.labels import DIMENSIONS, EMOTIONS

pytestmark = pytest.mark.usefixtures("no_drawing")
EMOTIONS_OF_ROWS = ("sad", "happy", "angry", "neutral", "surprise", "sad", "happy", "fear", None, "sad")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "re-llm"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


VOTES = {0: ["happy", "sad", "other"], 1: ["angry"], 2: ["disgust"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Ten clips: one no audio, one outside the label set, one without emotion, one without dimensions."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = []
    for i, emotion in enumerate(EMOTIONS_OF_ROWS):
        soundfile.write(folder / f"c{i}.wav", clip(0.3 + 0.07 * ((7 * i) % 10), seed=i), RATE)
        values = {name: None if i == 3 else round(float(rng.random()), 3) for name in DIMENSIONS}
        who = {"speaker": f"s{i % 3}", "session": f"Ses0{1 + i % 2}", "split": "test", "dimension_source": "label"}
        who["emotion_votes"] = VOTES.get(i)
        rows.append({"id": f"c{i}", "audio": f"c{i}.wav", "text": f"words {i}", "emotion": emotion, **values, **who})
    (folder / "c5.wav").write_bytes(b"no audio at all")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(model: Path, corpus: Path, out: Path, **options) -> EvaluationSettings:
    given = {"batch_size": 2, "max_new_tokens": 4, "device": "cpu", **options}
    return EvaluationSettings(str(model), str(corpus), out, **given)


@pytest.fixture(scope="module")
def whole(model: Path, corpus: Path, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with blank_pictures():
        evaluate(settings(model, corpus, out), progress=False)
    return out


def test_the_metrics_are_those_of_the_lines_counted_by_hand(whole: Path):
    metrics, (_, lines) = json.loads((whole / "metrics.json").read_text()), read_predictions(whole)
    asked = [line for line in lines if line["emotion"] in EMOTIONS and "error" not in line]
    assert len(asked) == 7
    for way in ("generated", "likelihood", "head"):
        answers = [line["recognition"][way] for line in asked]
        said = [answer["emotion"] if way == "generated" else max(answer, key=answer.get) for answer in answers]
        right = [guess == line["emotion"] for guess, line in zip(said, asked, strict=True)]
        recalls = [
            np.mean([ok for ok, line in zip(right, asked, strict=True) if line["emotion"] == name])
            for name in {line["emotion"] for line in asked}
        ]
        part = metrics["recognition"][way]
        assert part["wa"] == pytest.approx(np.mean(right)) and part["ua"] == pytest.approx(np.mean(recalls))
        assert part["num_unparsed"] == said.count(None) and part["num_clips"] == 7
        if way != "generated":
            sure = np.array([max(answer.values()) for answer in answers])
            edges = np.linspace(0, 1, 16)
            bins = [(sure > low) & (sure <= high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
            gaps = [
                inside.mean() * abs(np.mean(np.array(right)[inside]) - sure[inside].mean())
                for inside in bins
                if inside.any()
            ]
            assert part["ece"] == pytest.approx(sum(gaps))
    for name in DIMENSIONS:
        x, y = np.array(
            [
                (line[name], line["dimensions"][name])
                for line in lines
                if line[name] is not None and "dimensions" in line
            ]
        ).T
        ccc = 2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        found = metrics["dimensions"][name]
        assert found["ccc"] == pytest.approx(ccc) and found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
        assert found["rmse"] == pytest.approx(np.sqrt(np.mean((x - y) ** 2))) and found["num_clips"] == len(x) == 8
    assert metrics["dimensions"]["scale"] == "[0, 1]"


def test_raters_votes_are_in_the_lines_and_answers_are_held_against_them(whole: Path):
    metrics, (_, lines) = json.loads((whole / "metrics.json").read_text()), read_predictions(whole)
    assert {i: line["emotion_votes"] for i, line in enumerate(lines) if "emotion_votes" in line} == VOTES
    shares = [[0, 0.5, 0, 0.5, 0], [0, 0, 1, 0, 0]]  # in the order of EMOTIONS
    for way in ("generated", "likelihood", "head"):
        part = metrics["recognition"][way]["votes"]
        assert part["num_clips"] == 2 and 0 <= part["any_rater_macro_f1"] <= 1
        if way == "generated":
            assert part["ece"] is part["jensen_shannon"] is None
            continue
        said = [[line["recognition"][way][name] for name in EMOTIONS] for line in lines[:2]]
        expected = [jensenshannon(p, q, base=2) ** 2 for p, q in zip(shares, said, strict=True)]
        assert part["jensen_shannon"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_lines_are_in_the_order_of_the_data_and_what_is_left_out_is_counted(whole: Path, corpus: Path):
    metrics, (identity, lines) = json.loads((whole / "metrics.json").read_text()), read_predictions(whole)
    assert [line["id"] for line in lines] == [f"c{i}" for i in range(10)]
    assert "c5.wav" in lines[5]["error"] and "recognition" not in lines[5]
    data = metrics["data"]
    assert (data["num_clips"], data["num_failed"], data["num_speakers"]) == (10, 1, 3)
    assert (data["num_without_emotion"], data["num_outside_label_set"]) == (1, 1) and set(data["failed"]) == {"c5"}
    assert data["fingerprint"] == identity["data_fingerprint"] == data_fingerprint(load_corpus(str(corpus)))
    assert metrics["system"] == "re-llm" and set(metrics["left_out"]) == {"empathy"}
    assert "options: neutral, sad, angry, happy, or surprise" in metrics["prompts"]["recognition"]
    assert {"torch", "transformers", "relllm"} <= set(metrics["versions"]) and metrics["seed"] == 0
    names = {path.stem for path in (whole / "plots").glob("*.png")}
    ways = ("likelihood", "head")
    expected = {f"reliability_{way}" for way in ways} | {f"confusion_matrix_{way}" for way in ("generated", *ways)}
    assert names == expected | {"valence_arousal"}


def test_one_by_one_gives_the_same_predictions(whole: Path, model: Path, corpus: Path, tmp_path: Path):
    evaluate(settings(model, corpus, tmp_path, batch_size=1), progress=False)
    for line, alone in zip(read_predictions(whole)[1], read_predictions(tmp_path)[1], strict=True):
        if "error" in line:
            assert line == alone
            continue
        assert line["recognition"]["generated"] == alone["recognition"]["generated"]
        assert line["recognition"]["likelihood"] == pytest.approx(alone["recognition"]["likelihood"], abs=1e-5)
        assert line["dimensions"] == pytest.approx(alone["dimensions"], abs=1e-5)


def evaluate_twice(model: Path, corpus: Path, first: Path, second: Path) -> None:
    """One of two ranks, to the first folder and then to the second, where rank 1 is killed at its second batch."""
    with blank_pictures():
        evaluate(settings(model, corpus, first), progress=False)
    predict, calls = SpeechPredictor.predict, []

    def die_at_second(self: SpeechPredictor, rows: list) -> list[dict]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return predict(self, rows)

    if os.environ["RANK"] == "1":
        SpeechPredictor.predict = die_at_second
    evaluate(settings(model, corpus, second), progress=False)


@pytest.mark.slow
def test_two_processes_give_the_same_file_and_one_goes_on_after_a_kill(
    whole, model, corpus, fork_server: ForkServer, tmp_path: Path
):
    first, second = tmp_path / "first", tmp_path / "second"
    ranks = fork_server.run_ranks(evaluate_twice, model, corpus, first, second)
    assert ranks[1].exitcode == -signal.SIGKILL and ranks[0].exitcode != 0, ranks[1].stderr[-2000:]
    assert (first / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert sorted(path.name for path in first.iterdir()) == ["metrics.json", "plots", "predictions.jsonl"]
    assert len((second / "predictions.jsonl").read_text().splitlines()) == 1 + 4  # a batch of each
    assert not (second / "metrics.json").exists()
    evaluate(settings(model, corpus, second), progress=False)
    assert (second / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert sorted(path.name for path in second.iterdir()) == ["metrics.json", "plots", "predictions.jsonl"]


def test_an_interrupted_run_goes_on_without_repeating_a_clip(whole, model, corpus, tmp_path: Path, monkeypatch):
    asked: list[str] = []
    predict = SpeechPredictor.predict

    def interrupt(self, rows):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(row["id"] for row in rows)
        return predict(self, rows)

    monkeypatch.setattr(SpeechPredictor, "predict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(model, corpus, tmp_path), progress=False)
    path = tmp_path / "predictions.jsonl"
    assert len(path.read_text().splitlines()) == 1 + 4
    path.write_bytes(path.read_bytes() + b'{"id": "c')  # a line that was being written
    with pytest.raises(ValueError, match="other settings .questions"):
        evaluate(settings(model, corpus, tmp_path, max_new_tokens=5), progress=False)
    monkeypatch.setattr(
        SpeechPredictor, "predict", lambda self, rows: asked.extend(r["id"] for r in rows) or predict(self, rows)
    )
    evaluate(settings(model, corpus, tmp_path), progress=False)
    assert sorted(asked) == [f"c{i}" for i in range(10)]
    assert path.read_bytes() == (whole / "predictions.jsonl").read_bytes()


def test_a_complete_run_is_returned_as_it_is_without_a_model(whole, model, corpus, monkeypatch):
    monkeypatch.setattr(evaluating, "load_predictor", lambda *_, **__: pytest.fail("a model was loaded"))
    assert evaluate(settings(model, corpus, whole)) == json.loads((whole / "metrics.json").read_text())


def test_the_head_alone_reads_as_beside_the_others_and_runs_no_llm(whole, model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaModel, "forward", lambda *_, **__: pytest.fail("the LLM ran"))
    metrics = evaluate(settings(model, corpus, tmp_path, ways=("head",)), progress=False)
    assert metrics["recognition"].keys() == {"head"}
    for line, other in zip(read_predictions(tmp_path)[1], read_predictions(whole)[1], strict=True):
        assert "error" in line or line["recognition"] == {"head": other["recognition"]["head"]}
    with pytest.raises(ValueError, match="no head that a training has taught emotions"):
        evaluate(settings(model, corpus, tmp_path / "text", tasks=("ser",), ways=("head",), system="text-only"))
    with pytest.raises(ValueError, match="ways must be some of generated, likelihood, head, got heads"):
        settings(model, corpus, tmp_path, ways=("heads",))


def test_towers_do_not_run_for_clips_that_a_cache_has(whole, model, corpus, tmp_path, monkeypatch):
    options = {"ways": ("head",), "tower_cache_dir": str(tmp_path / "towers")}
    evaluate(settings(model, corpus, tmp_path / "first", **options), progress=False)
    for tower in (WhisperEncoder, ReLLMEmotionModel):
        monkeypatch.setattr(tower, "forward", lambda *_, **__: pytest.fail("a tower ran"))
    evaluate(settings(model, corpus, tmp_path / "second", **options, seed=1), progress=False)
    for folder in ("first", "second"):
        for line, other in zip(read_predictions(tmp_path / folder)[1], read_predictions(whole)[1], strict=True):
            assert "error" in line or line["dimensions"] == pytest.approx(other["dimensions"], abs=1e-5)
            assert "error" in line or line["recognition"]["head"] == pytest.approx(
                other["recognition"]["head"], abs=1e-5
            )
    with pytest.raises(ValueError, match="leave tower_cache_dir out"):
        settings(model, corpus, tmp_path, engine="vllm", tower_cache_dir="towers", device="auto")
    with pytest.raises(ValueError, match="text-only runs no towers: leave tower_cache_dir out"):
        evaluate(settings(model, corpus, tmp_path / "read", system="text-only", tower_cache_dir="towers"))


def test_a_task_that_cannot_be_measured_is_an_error_before_anything_runs(model, corpus, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no scorers"):
        evaluate(settings(model, corpus, out, tasks=("ser", "empathy")))
    rows = [json.loads(line) | {"text": None} for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    mute = tmp_path / "mute.jsonl"
    mute.write_text("".join(json.dumps(row | {"audio": str(corpus / row["audio"])}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="no row has a transcript"):
        evaluate(settings(model, mute, out, tasks=("empathy",), empathy_scorers="gone", allow_weak_scorers=True))
    with pytest.raises(ValueError, match="has no dimensions"):
        evaluate(settings(model, corpus, out, tasks=("dimensions",), system="text-only"))
    with pytest.raises(ValueError, match="Unknown tasks"):
        settings(model, corpus, out, tasks=("sers",))
    assert not out.exists()


def test_text_only_opens_no_audio_and_takes_any_causal_lm(model, corpus, tmp_path: Path):
    tiny_llm().save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    silent = tmp_path / "silent"
    silent.mkdir()
    shutil.copy(corpus / "metadata.jsonl", silent)  # without the clips
    for name, source in (("own", model), ("llm", tmp_path / "llm")):
        metrics = evaluate(settings(source, silent, tmp_path / name, system="text-only"), progress=False)
        assert metrics["system"] == "text-only" and metrics["data"]["num_failed"] == 0
        assert set(metrics["recognition"]) == {"generated", "likelihood"} and "dimensions" not in metrics
        assert "Speech: {transcript}<|im_end|>" in metrics["prompts"]["recognition"]


def test_text_only_reads_a_recognisers_words_and_its_rows_stay_the_same(model, corpus, tmp_path: Path):
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"asr": None if row["id"] == "c2" else f"heard {row['id']}"} for row in rows]
    (tmp_path / "asr.jsonl").write_text("".join(json.dumps(row | {"audio": "gone.wav"}) + "\n" for row in rows))
    options = {"system": "text-only", "tasks": ("ser",)}
    read = evaluate(
        settings(model, tmp_path / "asr.jsonl", tmp_path / "a", text_column="asr", **options), progress=False
    )
    gold = evaluate(settings(model, tmp_path / "asr.jsonl", tmp_path / "b", **options), progress=False)
    assert read["data"]["failed"] == {"c2": "no transcript"} and gold["data"]["num_failed"] == 0
    assert read["data"]["fingerprint"] == gold["data"]["fingerprint"] and read["data"]["text_column"] == "asr"
    ways = [{line["id"]: line["recognition"]["likelihood"] for line in read_predictions(tmp_path / name)[1][3:]}
            for name in "ab"]  # fmt: skip
    assert ways[0].keys() == ways[1].keys() and all(ways[0][name] != ways[1][name] for name in ways[0])
    with pytest.raises(ValueError, match="hears the clips"):
        evaluate(settings(model, corpus, tmp_path / "c", text_column="asr"))
    with pytest.raises(ValueError, match="has no column 'asr'"):
        evaluate(settings(model, corpus, tmp_path / "c", text_column="asr", **options))


def test_rows_are_batched_by_the_length_of_what_is_read():
    rows = Dataset.from_list([{"id": "a", "text": "long words", "asr": "x"}, {"id": "b", "text": "y", "asr": "long"}])
    assert plan_batches(rows, 1, "text-only") == [[0], [1]]
    assert plan_batches(rows, 1, "text-only", "asr") == [[1], [0]]


def test_dimensions_that_one_model_of_several_folds_was_not_taught_are_left_out():
    labels = {"emotion": None, "arousal": 0.1, "dominance": 0.2, "valence": 0.3}
    lines = [{**labels, "dimensions": {"arousal": 0.2, "valence": 0.4}}, {**labels, "dimensions": {"valence": 0.1}}]
    assert summarize_clips(lines, EMOTIONS)["dimensions"].keys() == {"valence", "scale"}
    assert "dimensions" not in summarize_clips([*lines, {**labels, "dimensions": {"arousal": 0.2}}], EMOTIONS)


def test_a_class_that_no_clip_has_is_named_with_the_label_set_that_leaves_it_out():
    part = {"class_names": list(EMOTIONS), "recall": dict.fromkeys(EMOTIONS, 0.5) | {"surprise": None}}
    said = _classes_without_clips({"recognition": {"head": part}})
    assert said.startswith("no clip is surprise") and "--label-set 4" in said
    assert _classes_without_clips({"recognition": {"head": part | {"recall": dict.fromkeys(EMOTIONS, 0.5)}}}) is None


def test_folds_are_pooled_and_their_mean_is_beside_it(corpus, tmp_path: Path):
    for number in (1, 2):
        fold = tmp_path / f"model-Ses0{number}"
        model = tiny_model()
        model.model.emotion_head.weight.data.mul_(-1 if number == 2 else 1)
        model.save_pretrained(fold)
        tiny_processor().save_pretrained(fold)
    out = tmp_path / "out"
    metrics = evaluate_folds(settings(tmp_path / "model-{fold}", corpus, out), "session", progress=False)
    runs = [json.loads((out / "folds" / name / "metrics.json").read_text()) for name in ("Ses01", "Ses02")]
    assert [one["data"]["held_out"] for one in runs] == ["session=Ses01", "session=Ses02"]
    lines = read_predictions(out)[1]
    assert sorted(line["id"] for line in lines) == [f"c{i}" for i in range(10)]
    assert {line["session"] for line in read_predictions(out / "folds" / "Ses02")[1]} == {"Ses02"}
    asked = [line for line in lines if line["emotion"] in EMOTIONS and "error" not in line]
    right = [max(one := line["recognition"]["head"], key=one.get) == line["emotion"] for line in asked]
    assert metrics["recognition"]["head"]["wa"] == pytest.approx(np.mean(right))
    assert metrics["data"]["num_clips"] == 10 and metrics["data"]["num_failed"] == 1
    told = metrics["folds"]
    assert (told["column"], told["values"]) == ("session", ["Ses01", "Ses02"]) and "pooled" in told["pooled"]
    for way in ("generated", "likelihood", "head"):
        for name in ("ua", "wa", "macro_f1"):
            expected = np.mean([one["recognition"][way][name] for one in runs])
            assert told["mean"]["recognition"][way][name] == pytest.approx(expected)
    expected = np.mean([one["dimensions"]["valence"]["ccc"] for one in runs])
    assert told["mean"]["dimensions"]["valence"]["ccc"] == pytest.approx(expected)
    assert metrics["model"]["fingerprint"] not in [one["model"]["fingerprint"] for one in runs]


def test_folds_need_a_model_each(model, corpus, tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="did not train on it"):
        evaluate_folds(settings(model, corpus, tmp_path), "session")
    with pytest.raises(ValueError, match="leave --held-out"):
        evaluate_folds(settings(tmp_path / "{fold}", corpus, tmp_path, held_out="session=Ses01"), "session")
    assert fold_values(str(corpus), "speaker") == ("speaker", ["s0", "s1", "s2"])
    assert fold_values(str(corpus), "session=Ses02, Ses01") == ("session", ["Ses02", "Ses01"])
    with pytest.raises(ValueError, match="at least two"):
        fold_values(str(corpus), "session=Ses01")
    monkeypatch.setattr(folds, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(folds, "read_predictions", lambda out: ({}, [{"id": out.name}, {"id": "c3"}]))
    with pytest.raises(ValueError, match="The clip 'c3' is in two folds"):
        evaluate_folds(settings(tmp_path / "{fold}", corpus, tmp_path), "session")


def test_fingerprints_are_of_the_bytes_and_not_of_the_place(model, corpus, tmp_path: Path):
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    original = data_fingerprint(load_corpus(str(corpus)))
    assert data_fingerprint(load_corpus(str(moved))) == original
    content = bytearray((moved / "c1.wav").read_bytes())
    content[-1] ^= 1
    (moved / "c1.wav").write_bytes(content)
    assert data_fingerprint(load_corpus(str(moved))) != original
    shutil.copytree(model, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == model_fingerprint(str(model))
    other = tiny_model()
    other.model.emotion_head.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) != model_fingerprint(str(model))


def test_the_command_measures_names_bad_clips_and_fails_if_all_are_bad(model, corpus, tmp_path: Path):
    options = ["--device", "cpu", "--batch-size", "4", "--label-set", "4", "--tasks", "ser,dimensions"]
    result = CliRunner().invoke(app, ["evaluate", str(model), str(corpus), "--out", str(tmp_path / "run"), *options])
    assert result.exit_code == 0, result.output
    assert all(
        text in result.output for text in ("likelihood", "macro_f1", "valence", "1 clips could not be read", "c5")
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["label_set"] == list(EMOTIONS[:4])
    row = json.loads((corpus / "metadata.jsonl").read_text().splitlines()[0]) | {"audio": str(tmp_path / "none.wav")}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    command = ["evaluate", str(model), str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "bad"), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "No such audio file" in result.output.replace("\n", " ")


def test_trained_scorers_read_transcript_and_reply(model, corpus, tmp_path: Path):
    for mechanism in ("ER", "IP", "EX"):
        scorer = scorer_of(tmp_path / "encoder", mechanism=mechanism)
        scorer.save_pretrained(tmp_path / "scorers" / mechanism)
        AutoTokenizer.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "scorers" / mechanism)
    out, folder = tmp_path / "run", str(tmp_path / "scorers")
    options = {"tasks": ("empathy",), "empathy_scorers": folder, "allow_weak_scorers": True}  # nobody measured them
    metrics = evaluate(settings(model, corpus, out, **options), progress=False)
    lines = read_predictions(out)[1]
    assert all(("reply" in line) != ("error" in line) and "recognition" not in line for line in lines)
    assert "recognition" not in metrics and (out / "plots" / "levels.png").is_file()
    asked = [line for line in lines if "reply" in line]
    texts = {row["id"]: row["text"] for row in load_corpus(str(corpus))}
    alone = score_pairs(load_scorers(folder), [(texts[line["id"]], line["reply"]) for line in asked], batch_size=1)
    for mechanism in ("ER", "IP", "EX"):
        levels = [scores[mechanism]["level"] for scores in alone]
        assert [line["empathy"][mechanism]["level"] for line in asked] == levels
        part = metrics["empathy"][mechanism]
        assert part["mean_level"] == pytest.approx(sum(levels) / len(levels), abs=1e-6) and part["num_replies"] == 9
        assert part["levels"] == [levels.count(level) for level in range(3)]
    assert metrics["empathy"]["scorers"]["fingerprint"].startswith("sha256:")
    assert metrics["empathy"]["scorers"]["quality"] == dict.fromkeys(("ER", "IP", "EX"))
