"""Model cards: numbers only from runs on the same weights, licences carried over, nothing of a corpus."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from light_checkpoints import build, save_towers
from tiny_models import tiny_model, tiny_processor
from typer.testing import CliRunner

from relllm.cli import app
from relllm.evaluation.fingerprints import model_fingerprint
from relllm.hub.cards import TEMPLATE, check_card, check_measured, write_model_card
from relllm.hub.evidence import read_public_run
from relllm.hub.licences import MSP_TOWER, Tower, model_licence, read_towers
from relllm.hub.sharing import CardSettings, MergeSettings
from relllm.hub.staging import merge_checkpoint
from relllm.training.config import ReLLMScriptArguments, ReLLMSFTConfig
from relllm.training.run import training_record

CLIP = {"id": "Ses05M_impro03_F007", "speaker": "Ses05F", "text": "I lost my luggage at the airport"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save_run(folder: Path, fingerprint: str, **changes: object) -> Path:
    """As `relllm evaluate` writes it, with what must not be published in it."""
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "confusion.png").write_bytes(b"PNG")
    (folder / "predictions.jsonl").write_text(json.dumps(CLIP) + "\n")
    scores = {"ua": 0.612345, "wa": 0.6, "macro_f1": None, "num_clips": 40}
    metrics = {
        "format": "relllm-run-1",
        "system": "re-llm",
        "name": str(folder),
        "model": {"id": "/secret/place/model", "fingerprint": fingerprint, "towers": {}},
        "data": {
            "id": "/secret/place/iemocap",
            "corpus": "iemocap",
            "split": "test",
            "held_out": "speaker=Ses05F",
            "fingerprint": "sha256:0",
            "num_clips": 40,
            "num_failed": 1,
            "num_speakers": 2,
            "dimension_sources": {"/secret/place/tower": 40},
            "failed": {CLIP["id"]: "no file"},
        },
        "seed": 0,
        "versions": {"relllm": "0.1.0"},
        "recognition": {"generated": scores, "head": {**scores, "ua": 0.5}},
        "dimensions": {"arousal": {"ccc": 0.7, "pearson": 0.8, "rmse": 0.1, "num_clips": 40}, "scale": "[0, 1]"},
        "empathy": {
            "ER": {"mean_level": 1.25, "levels": [5, 20, 15], "num_replies": 40},
            "scorers": {"id": "/secret/place/scorers"},
        },
        "folds": None,
        **changes,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_a_card_has_the_numbers_of_its_run_in_text_and_model_index(model: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", model_fingerprint(str(model)))
    done = CliRunner().invoke(app, ["card", str(run), "--model", str(model), "--repo-id", "org/m"])
    assert done.exit_code == 0, done.output
    card = ModelCard.load(model / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {
        "UA, in the model's own words": 0.6123,
        "WA, in the model's own words": 0.6,
        "UA, by the emotion head": 0.5,
        "WA, by the emotion head": 0.6,
        "CCC of arousal": 0.7,
        "Mean level of ER (0 to 2)": 1.25,
    }  # macro-F1 is undefined
    assert "| in the model's own words | 0.612 | 0.600 | – | 40 |" in card.text
    assert "plots/confusion.png" in card.text and (model / "plots" / "confusion.png").is_file()
    assert {"iemocap"} == {result.dataset_type for result in card.data.eval_results}
    check_card(model)


def test_a_card_has_nothing_of_the_corpus(model: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", model_fingerprint(str(model)))
    write_model_card(CardSettings(model, [run]))
    published = "".join((model / name).read_text() for name in ("README.md", "evaluation.json"))
    for private in (*CLIP.values(), "Ses05", "/secret/place", str(tmp_path)):
        assert private not in published, private
    assert "held out by speaker" in published


def test_without_a_run_the_card_says_so_and_has_no_metric(model: Path) -> None:
    card = ModelCard.load(write_model_card(CardSettings(model)))
    assert "**Not evaluated.**" in card.text and card.data.get("eval_results") is None
    assert not (model / "evaluation.json").exists()
    check_card(model)


def test_it_states_the_limits_and_the_law(model: Path) -> None:
    text = write_model_card(CardSettings(model)).read_text()
    for words in ("No diagnosis", "No covert emotion inference", "Article 5(1)(f)", "Annex III", "Article 50"):
        assert words in text


def test_a_run_of_another_model_or_an_unfinished_one_is_no_evidence(model: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", "sha256:" + "0" * 64)
    with pytest.raises(ValueError, match="measured another model"):
        write_model_card(CardSettings(model, [run]))
    (run / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="not finished"):
        write_model_card(CardSettings(model, [run]))
    assert not (model / "README.md").exists()


def test_a_metric_without_a_run_stops_a_push(model: Path, tmp_path: Path) -> None:
    write_model_card(CardSettings(model, [save_run(tmp_path / "run", model_fingerprint(str(model)))]))
    card = (model / "README.md").read_text()
    (model / "README.md").write_text(card.replace("value: 0.6123", "value: 0.9"))
    with pytest.raises(ValueError, match=r"= 0.9 on iemocap test.*no run in evaluation.json"):
        check_card(model)
    (model / "README.md").write_text(card.replace("A speech LLM", "My speech LLM"))
    check_card(model)  # words are the publisher's own
    (model / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="no run in evaluation.json"):
        check_card(model)


def test_evidence_of_other_weights_stops_a_push(model: Path, tmp_path: Path) -> None:
    write_model_card(CardSettings(model, [save_run(tmp_path / "run", model_fingerprint(str(model)))]))
    check_measured(model)
    (model / "model.safetensors").unlink()
    tiny_model(lora=None).save_pretrained(model)
    with pytest.raises(ValueError, match="is of another model"):
        check_measured(model)


def test_a_card_of_hand_is_not_replaced_unasked(model: Path) -> None:
    (model / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_model_card(CardSettings(model))
    assert (model / "README.md").read_text() == "mine"


def test_the_emotion_tower_of_audeering_marks_the_whole_and_its_corpus(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    names = {"audio_tower": "openai/whisper-large-v2", "emotion_tower": MSP_TOWER, "text_model": "Qwen/Qwen-7B-Chat"}
    config["towers"] = {part: {"name": name, "revision": None} for part, name in names.items()}
    (model / "config.json").write_text(json.dumps(config))
    data = {"corpus": "msp-podcast", "split": "Test1", "held_out": None, "num_clips": 9, "num_failed": 0}
    run = save_run(tmp_path / "run", model_fingerprint(str(model)), data={**data, "num_speakers": None})
    card = ModelCard.load(write_model_card(CardSettings(model, [run])))
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.base_model == list(names.values())
    assert "results on MSP-Podcast with it are not clean" in card.text and "**Not clean:**" in card.text
    assert "**Warning:** the terms of the text_model" in card.text
    with pytest.raises(ValueError, match="is under cc-by-nc-sa-4.0, which marks the whole model"):
        write_model_card(CardSettings(model, [run], license="apache-2.0", overwrite=True))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="is under cc-by-nc-sa-4.0"):
        check_card(model)


def test_a_local_tower_has_the_licence_of_its_own_card_and_no_path(tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "towers")
    (towers / "llm" / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    model = build(towers)
    model.save_pretrained(tmp_path / "model", light=True)
    found = read_towers(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert [tower.licence for tower in found] == ["unknown", "unknown", "cc-by-sa-4.0"]
    text = write_model_card(CardSettings(tmp_path / "model")).read_text()
    assert str(tmp_path) not in text and "license: cc-by-sa-4.0" in text


@pytest.mark.parametrize(
    ("towers", "chosen", "expected"),
    [
        (["apache-2.0", "mit"], None, "apache-2.0"),
        (["unknown"], None, "unknown"),
        (["unknown"], "mit", "mit"),
        (["other", "cc-by-nc-sa-4.0"], None, "cc-by-nc-sa-4.0"),
        (["apache-2.0"], "cc-by-nc-4.0", "cc-by-nc-4.0"),
        (["apache-2.0"], "openrail", "openrail"),
        (["cc-by-nc-4.0"], "openrail", None),
        (["apache-2.0"], "mit", None),
    ],
)
def test_the_strictest_licence_is_carried_and_a_wish_may_only_add(
    towers: list[str], chosen: str | None, expected: str | None
) -> None:
    parts = [Tower("text_model", "org/x", "llama", licence) for licence in towers]
    if expected is None:
        with pytest.raises(ValueError, match="--license"):
            model_licence(parts, chosen)
    else:
        assert model_licence(parts, chosen) == expected


def test_training_settings_beside_the_checkpoint_are_in_the_card(model: Path) -> None:
    (model / "training_settings.json").write_text('{"learning_rate": 2e-05, "lora_r": 16}')
    assert "| learning_rate | 2e-05 |" in write_model_card(CardSettings(model)).read_text()


def test_a_checkpoint_in_the_folder_of_a_run_has_the_record_of_the_run(model: Path, tmp_path: Path) -> None:
    """Also once it is merged; how far the run went later is not its own."""
    (tmp_path / "run").mkdir()
    record = {"learning_rate": 2e-05, "steps_done": 900, "epochs_done": 3.0}
    (tmp_path / "run" / "training_settings.json").write_text(json.dumps(record))
    checkpoint = model.rename(tmp_path / "run" / "checkpoint-300")
    text = write_model_card(CardSettings(checkpoint)).read_text()
    assert "| learning_rate | 2e-05 |" in text and "| steps_done | 300 |" in text and "epochs_done" not in text
    merge_checkpoint(MergeSettings(str(checkpoint), tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "training_settings.json").read_text()) == {
        "learning_rate": 2e-05,
        "steps_done": 300,
    }


def test_what_a_run_records_of_itself_has_no_path_and_no_token(tmp_path: Path) -> None:
    towers = {"audio_tower": "openai/whisper-tiny", "emotion_tower": "org/tower", "text_model": str(tmp_path)}
    script = ReLLMScriptArguments(data=str(tmp_path / "corpus"), **towers)
    args = ReLLMSFTConfig(output_dir=str(tmp_path), hub_token="hf_secret", learning_rate=1e-4, use_cpu=True)
    record = training_record(script, args)
    text = json.dumps(record)
    assert str(tmp_path) not in text and "hf_secret" not in text
    assert record["audio_tower"] == "openai/whisper-tiny" and record["text_model"] == "a local folder"
    assert (record["learning_rate"], record["lora_r"]) == (1e-4, 16)
    assert not any(name.startswith(("augment_", "tower_cache_")) for name in record)
    noise = {"augment_noise_dir": str(tmp_path), "augment_noise_snr_db": [5.0, 30.0]}
    augmented = ReLLMSFTConfig(output_dir=str(tmp_path), report_to="none", **noise)
    record = training_record(script, augmented)
    assert record["augment_noise_snr_db"] == [5.0, 30.0] and record["augment_noise_dir"] == "a local folder"


def test_what_a_checkpoint_decided_is_not_recorded_as_a_setting_of_the_run(tmp_path: Path) -> None:
    script = ReLLMScriptArguments(data="data", model_name_or_path="org/stage1")
    args = ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    record = training_record(script, args)
    assert record["model_name_or_path"] == "org/stage1"
    assert not {"full_window", "max_duration_s"} & set(record)  # the defaults, which its processor need not have


def test_a_name_that_is_no_path_is_published_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "re-llm").mkdir()  # a folder of the same name
    assert read_public_run(save_run(tmp_path / "run", "f"), "f")["system"] == "re-llm"


def test_the_template_in_model_cards_is_the_package_s() -> None:
    linked = Path(__file__).parents[2] / "model_cards" / "template.md"
    assert linked.resolve() == TEMPLATE.resolve()


@pytest.mark.parametrize("name", ["demo.md", "real_small.md"])
def test_the_examples_are_valid_cards_and_say_what_they_were_trained_on(name: str) -> None:
    folder = Path(__file__).parents[2] / "model_cards"
    card = ModelCard.load(folder / name)
    assert card.data.license == "apache-2.0" and card.data.eval_results
    assert "rule-made prosody, not human emotion" in card.text
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text)
    assert bool(images) == (name == "demo.md") and all((folder / image).is_file() for image in images)
