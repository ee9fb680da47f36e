"""Model cards: numbers only from runs on the same weights, licences carried over, nothing of a corpus."""

import importlib.metadata
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import transformers
from fake_hub import Repository, point_at, serve_hub
from huggingface_hub import ModelCard
from light_checkpoints import build, save_towers
from packaging.requirements import Requirement
from tiny_models import tiny_model, tiny_processor
from typer.testing import CliRunner

from relllm.cli import app
from relllm.data.corpora import iemocap
from relllm.evaluation.fingerprints import model_fingerprint
from relllm.hub.cards import TEMPLATE, _requirements, check_card, check_measured, write_model_card
from relllm.hub.evidence import cell, read_public_run
from relllm.hub.licences import MSP_TOWER, Licence, Tower, choose_licence, read_towers
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


def test_a_card_says_which_of_the_clips_made_the_model(model: Path, tmp_path: Path) -> None:
    """Which `relllm evaluate --allow-seen` measures."""
    seen = {"recorded": True, "trained_on": 7, "validated_on": 3, "chosen_by": True, "corpora": ["iemocap"]}
    write_model_card(CardSettings(model, [save_run(tmp_path / "run", model_fingerprint(str(model)), training=seen)]))
    words = "**Not unseen:** of these clips 7 trained it and by 3 its checkpoint was chosen."
    assert words in (model / "README.md").read_text()


def test_a_number_is_rounded_once() -> None:
    assert [cell(value) for value in (0.56446, 0.5646, float("nan"), None, 40)] == ["0.564", "0.565", "–", "–", "40"]


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
    for content, message in (("{", "metrics.json is no JSON"), ("[]", "metrics.json holds a list, expected")):
        (run / "metrics.json").write_text(content)
        with pytest.raises(ValueError, match=message):
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
    for content, message in (("{", "evaluation.json is no JSON"), ("[]", "evaluation.json holds a list, expected")):
        (model / "evaluation.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            check_card(model)
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
    names = {
        "audio_tower": "openai/whisper-large-v2",
        "emotion_tower": MSP_TOWER,
        "text_model": "Qwen/Qwen2.5-7B-Instruct",
    }
    config["towers"] = {part: {"name": name, "revision": None} for part, name in names.items()}
    (model / "config.json").write_text(json.dumps(config))
    data = {"corpus": "msp-podcast", "split": "Test1", "held_out": None, "num_clips": 9, "num_failed": 0}
    run = save_run(tmp_path / "run", model_fingerprint(str(model)), data={**data, "num_speakers": None})
    card = ModelCard.load(write_model_card(CardSettings(model, [run])))
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.base_model == list(names.values())
    assert card.data.tower_licenses["emotion_tower"] == "cc-by-nc-sa-4.0"
    assert "results on MSP-Podcast with it are not clean" in card.text and "**Not clean:**" in card.text
    with pytest.raises(ValueError, match="is under cc-by-nc-sa-4.0, which marks the whole"):
        write_model_card(CardSettings(model, [run], license="apache-2.0", overwrite=True))
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(ValueError, match="is under cc-by-nc-sa-4.0"):
        check_card(model)


def test_a_local_tower_has_the_licence_of_its_own_card_and_no_path(tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "towers")
    for tower in ("llm", "speech"):
        (towers / tower / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    model = build(towers)
    model.save_pretrained(tmp_path / "model", light=True)
    found = read_towers(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert [tower.licence for tower in found] == ["cc-by-sa-4.0", "unknown", "cc-by-sa-4.0"]
    text = write_model_card(CardSettings(tmp_path / "model")).read_text()
    assert str(tmp_path) not in text and "license: other\n" in text  # until the third says something
    said = ["emotion_tower=mit"]
    card = ModelCard.load(write_model_card(CardSettings(tmp_path / "model", tower_license=said, overwrite=True)))
    assert card.data.license == "cc-by-sa-4.0"
    check_card(tmp_path / "model")  # which knows from the card what was said
    with pytest.raises(ValueError, match="mit is given for the text_model, which is under cc-by-sa-4.0"):
        write_model_card(CardSettings(tmp_path / "model", tower_license=["text_model=mit"], overwrite=True))


def test_a_tower_of_the_hub_has_the_licence_of_its_card_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = "license: other\nlicense_name: its-agreement\nlicense_link: https://example.org/terms"
    cards = {"org/llm": terms, "org/speech": "license: apache-2.0"}
    with serve_hub(tmp_path / "served") as hub:
        point_at(hub, tmp_path / "cache", monkeypatch)
        for name, front in cards.items():
            hub.repositories[name] = Repository({"README.md": f"---\n{front}\n---\n".encode()})
        sections = dict.fromkeys(("audio_config", "text_config"), {"model_type": "x"})
        names = {"audio_tower": {"name": "org/speech"}, "text_model": {"name": "org/llm"}}
        towers = read_towers({**sections, "towers": names})
        missing = read_towers({**sections, "towers": {**names, "text_model": {"name": "org/gone"}}})
    assert [tower.licence for tower in towers] == ["apache-2.0", "other"] and missing[1].licence == "unknown"
    found = choose_licence(towers)  # all other parts may go under the one's own terms
    assert found == Licence("other", "its-agreement", "https://example.org/terms")
    assert choose_licence(missing, link="card") == Licence("other", "terms-of-its-parts", "card")


@pytest.mark.parametrize(
    ("parts", "chosen", "expected"),
    [
        ("apache-2.0 mit", None, "apache-2.0"),
        ("bsd-3-clause cc0-1.0", None, "mit"),
        ("apache-2.0 cc-by-4.0", None, "cc-by-4.0"),
        ("apache-2.0 cc-by-nc-4.0 mit", None, "cc-by-nc-4.0"),
        ("apache-2.0 cc-by-nc-sa-4.0 cc-by-nc-4.0", None, "cc-by-nc-sa-4.0"),
        ("apache-2.0 gpl-3.0", None, "gpl-3.0"),
        ("gpl-2.0 gpl-2.0", None, "gpl-2.0"),
        ("llama3.1 llama3.1", None, "llama3.1"),
        ("unknown", None, "other"),
        ("apache-2.0 other", None, "other"),
        ("apache-2.0 llama3.1", None, "other"),
        ("cc-by-nc-sa-4.0 other", None, "other"),
        ("cc-by-sa-4.0 cc-by-nc-4.0", None, "other"),
        ("cc-by-sa-4.0 cc-by-nc-sa-4.0", None, "other"),
        ("cc-by-nd-4.0 mit", None, "other"),
        ("apache-2.0 gpl-2.0", None, "other"),
        ("gpl-3.0 cc-by-nc-4.0", None, "other"),
        ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("apache-2.0", "openrail", "openrail"),
        ("apache-2.0 unknown", "other", "other"),
        ("apache-2.0 unknown", "apache-2.0", r"not known.*--tower-license text_model=ID"),
        ("apache-2.0 other", "apache-2.0", "is under other"),
        ("apache-2.0 gpl-3.0", "apache-2.0", "is under gpl-3.0.*known to carry them: gpl-3.0"),
        ("cc-by-sa-4.0 cc-by-nc-4.0", "cc-by-nc-4.0", "is under cc-by-sa-4.0.*or give `other`"),
        ("cc-by-nc-4.0", "openrail", "is under cc-by-nc-4.0"),
        ("cc-by-nd-4.0 mit", "cc-by-nd-4.0", "is under mit"),
        ("apache-2.0", "mit", "is under apache-2.0"),
        ("apache-2.0", "cc0-1.0", "is under apache-2.0"),
        ("apache-2.0", "banana", "no licence of that id"),
        ("apache-2.0", "Apache-2.0", "near ones: apache-2.0"),
        ("apache-2.0", "unknown", "no licence of that id"),
    ],
)
def test_a_licence_says_no_more_than_is_known(parts: str, chosen: str | None, expected: str) -> None:
    towers = [Tower("text_model", None, "llama", licence) for licence in parts.split()]
    wish = Licence(chosen) if chosen else None
    if " " in expected:
        with pytest.raises(ValueError, match=f"--license {chosen}: .*{expected}"):
            choose_licence(towers, chosen=wish)
        return
    found = choose_licence(towers, chosen=wish, link="the card")
    assert found.id == expected and bool(found.name and found.link) == (expected == "other")


def test_other_needs_a_name_and_a_link_and_has_them(model: Path) -> None:
    flags = ["--license-name", "our-terms", "--license-link", "https://example.org"]
    done = CliRunner().invoke(app, ["card", "--model", str(model), *flags])
    assert done.exit_code == 0 and "Licence: other (our-terms: https://example.org)" in done.output
    check_card(model)
    card = (model / "README.md").read_text()
    (model / "README.md").write_text(card.replace("license_link: https://example.org\n", ""))
    with pytest.raises(ValueError, match="needs `license_name:` and `license_link:`"):
        check_card(model)


def test_the_checkpoint_that_a_training_went_on_with_marks_the_whole(model: Path) -> None:
    (model / "training_settings.json").write_text('{"model_name_or_path": "org/stage1"}')
    towers = [f"{part}=apache-2.0" for part in ("audio_tower", "emotion_tower", "text_model")]
    card = ModelCard.load(write_model_card(CardSettings(model, tower_license=towers)))
    assert card.data.license == "other" and "| checkpoint | org/stage1 | relllm | unknown |" in card.text
    said = [*towers, "checkpoint=cc-by-nc-4.0"]
    card = ModelCard.load(write_model_card(CardSettings(model, tower_license=said, overwrite=True)))
    assert card.data.license == "cc-by-nc-4.0" and card.data.base_model == ["org/stage1"]
    check_card(model)


IEMOCAP = {"seen_corpora": ["iemocap"], "corpus_facts": {"iemocap": asdict(iemocap.FACTS)}}


def test_what_it_was_trained_on_is_on_the_card_and_in_what_is_asked(model: Path) -> None:
    record = {**IEMOCAP, "data": "org/rows", "seen_rows": {"train": "AAAA"}}
    (model / "training_settings.json").write_text(json.dumps(record))
    flags = [f"--tower-license={part}=apache-2.0" for part in ("audio_tower", "emotion_tower", "text_model")]
    done = CliRunner().invoke(app, ["card", "--model", str(model), "--language", "de", *flags])
    assert done.exit_code == 0, done.output
    told = "Trained on IEMOCAP: Interactive Emotional Dyadic Motion Capture database: Given on request by SAIL"
    assert "Licence: other (terms-of-its-parts: " in done.output and told in done.output
    card = ModelCard.load(model / "README.md")
    assert card.data.language == ["de", "en"] and card.data.datasets == ["org/rows"]
    assert "for academic use" in card.text and "@article{busso2008iemocap" in card.text
    assert "iemocap-academic-release](https://sail.usc.edu/iemocap/)" in card.text and "AAAA" not in card.text
    chosen = CardSettings(model, tower_license=[flag.partition("=")[2] for flag in flags], license="apache-2.0")
    (model / "training_settings.json").write_text(json.dumps({**record, "selected_on_test": True}))
    assert "A checkpoint of it was chosen by a test split" not in card.text
    card = ModelCard.load(write_model_card(replace(chosen, overwrite=True)))
    assert card.data.license == "apache-2.0" and "for academic use" in card.text  # a person has decided
    assert "A checkpoint of it was chosen by a test split" in card.text


def test_the_card_says_which_releases_load_the_code(model: Path) -> None:
    text = write_model_card(CardSettings(model)).read_text()
    wanted = next(one for one in importlib.metadata.requires("relllm") if one.startswith("transformers"))
    found = re.search(r"`(transformers>=[^`]*)`", text)[1]
    assert Requirement(found) == Requirement(wanted) and f"saved with Transformers {transformers.__version__}" in text


def test_a_requirement_is_named_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torchaudio>=2.11", "torch>=2.11", "torchvision>=1", "peft-next<1", 'mypy>=1; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    assert _requirements() == "`torch>=2.11`, `torchaudio>=2.11`"


def test_a_leave_one_out_run_is_on_the_card_of_each_of_its_models(model: Path, tmp_path: Path) -> None:
    mean = {"recognition": {"head": {"ua": 0.4321, "wa": 0.5, "macro_f1": 0.5}}, "dimensions": {}}
    own = model_fingerprint(str(model))
    folds = {"column": "session", "values": ["Ses01", "Ses02"], "models": {"Ses01": "sha256:1", "Ses02": own}}
    run = save_run(tmp_path / "run", "sha256:pooled", folds={**folds, "mean": mean})
    card = ModelCard.load(write_model_card(CardSettings(model, [run])))
    assert "2 folds by session" in card.text and "This checkpoint is one of them" in card.text
    assert "| by the emotion head, mean over folds | 0.432 | 0.500 | 0.500 | |" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {
        "iemocap test, 2 folds by session of 2 models"
    }
    assert card.data.metrics == ["recall", "accuracy", "ccc", "empathy"]
    check_card(model)
    check_measured(model)
    assert "Ses0" not in (model / "README.md").read_text() + (model / "evaluation.json").read_text()
    others = save_run(tmp_path / "others", "sha256:pooled", folds={**folds, "models": {"Ses01": "sha256:1"}})
    with pytest.raises(ValueError, match="or of the folds that it is one of"):
        write_model_card(CardSettings(model, [others], overwrite=True))


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


@pytest.mark.parametrize(
    ("name", "license_name", "said"),
    [
        ("demo.md", "apache-2.0", "rule-made prosody, not human emotion"),
        ("real_small.md", "apache-2.0", "rule-made prosody, not human emotion"),
        ("voices.md", "other", "acted shouts of voice packs, labelled by the names of their files"),
    ],
)
def test_the_examples_are_valid_cards_and_say_what_they_were_trained_on(
    name: str, license_name: str, said: str
) -> None:
    folder = Path(__file__).parents[2] / "model_cards"
    card = ModelCard.load(folder / name)
    assert card.data.license == license_name and card.data.eval_results
    assert said in card.text
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text)
    assert bool(images) == (name == "demo.md") and all((folder / image).is_file() for image in images)
