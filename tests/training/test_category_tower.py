"""An emotion tower that is taught by categories: `relllm train-emotion --targets emotions`, and RE-LLM on it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, disable_progress_bars
from light_checkpoints import assert_same_model, save_towers
from safetensors.torch import load_file, save_file
from tiny_models import LORA, clip, fill_lora, tiny_audio_config, tiny_processor
from transformers import AutoModel

from relllm import ReLLMEmotionConfig, ReLLMEmotionModel, ReLLMForConditionalGeneration
from relllm.data.annotate import read_dimensions
from relllm.inference.replies import read_heard
from relllm.training.emotion_training import (
    EmotionScriptArguments,
    EmotionTowerTrainer,
    EmotionTrainingConfig,
    build_emotion_tower,
    run_emotion_training,
)

disable_progress_bars()
PITCHES_HZ = {"happy": 300, "alarm": 700, "pain": 1500}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones whose pitch is the emotion, of which one is rare; no dimension, and one row without a label."""
    folder = tmp_path_factory.mktemp("corpus")
    names = [*["happy"] * 12, *["alarm"] * 9, *["pain"] * 4] * 2
    rows = []
    for index, name in enumerate(names):
        time_s = np.arange(4800) / 16_000
        wave = np.sin(2 * np.pi * PITCHES_HZ[name] * time_s + index)
        soundfile.write(folder / f"{index}.wav", 0.2 * wave, 16_000)
        split = "train" if index < len(names) // 2 else "validation"
        rows.append({"id": f"{index}", "audio": f"{index}.wav", "emotion": name if index else None, "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(1)
    AutoModel.from_config(tiny_audio_config("wav2vec2")).save_pretrained(folder / "encoder")
    return folder


def train(corpus: Path, out: Path, start: Path | None = None, **changes: object) -> EmotionTowerTrainer:
    settings = {"model_name_or_path": str(start or corpus / "encoder"), "data": str(corpus), "targets": "emotions"}
    options = {"num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "use_cpu": True}
    args = EmotionTrainingConfig(output_dir=str(out), disable_tqdm=True, dataloader_pin_memory=False, **options)
    return run_emotion_training(EmotionScriptArguments(**settings | {"train_feature_encoder": True} | changes), args)


@pytest.fixture(scope="module")
def tower(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tower"
    trainer = train(corpus, folder)
    assert trainer.args.metric_for_best_model == "ua"
    counts = np.array([11, 9, 4])  # of happy, alarm, pain in training: scikit-learn's balanced weights
    assert trainer._class_weights.tolist() == pytest.approx((counts.sum() / (3 * counts)).tolist())
    return folder


def test_rows_without_an_emotion_teach_nothing(tower: Path, tmp_path: Path) -> None:
    model, args = (
        ReLLMEmotionModel.from_pretrained(tower),
        EmotionTrainingConfig(str(tmp_path), use_cpu=True, eval_strategy="no", load_best_model_at_end=False),
    )
    soundfile.write(tmp_path / "a.wav", clip(0.4), 16_000)
    row = {"audio": str(tmp_path / "a.wav"), "emotion": "pain"}
    trainer = EmotionTowerTrainer(model, args, train_dataset=Dataset.from_list([row]))
    batch = trainer.data_collator([{**row, "emotion": None}] * 2)
    assert trainer.compute_loss(model, batch).item() == 0
    with pytest.raises(ValueError, match="No training row has an emotion"):
        EmotionTowerTrainer(model, args, train_dataset=Dataset.from_list([{**row, "emotion": None}]))


def test_it_learns_the_emotions_and_reads_no_dimension(corpus: Path, tower: Path) -> None:
    found = json.loads((tower / "eval_results.json").read_text())
    model = ReLLMEmotionModel.from_pretrained(tower).eval()
    assert model.config.emotion_labels == ["happy", "alarm", "pain"] and model.config.trained_dimensions == []
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    held = [row for row in rows if row["split"] == "validation"]
    right: Counter[str] = Counter()
    for row in held:
        wave, _ = soundfile.read(corpus / row["audio"], dtype="float32")
        with torch.no_grad():
            output = model(torch.from_numpy((wave - wave.mean()) / np.sqrt(wave.var() + 1e-7))[None])
        assert output.dimensions is None
        right[row["emotion"]] += model.config.emotion_labels[int(output.emotion_logits.argmax())] == row["emotion"]
    recalls = [right[name] / sum(row["emotion"] == name for row in held) for name in PITCHES_HZ]
    assert found["eval_ua"] == pytest.approx(np.mean(recalls)) and found["eval_ua"] > 0.6
    with pytest.raises(ValueError, match=r"categories \(happy, alarm, pain\): it reads no dimension"):
        read_dimensions(model, [clip(0.4)])


def test_rellm_on_it_has_the_embedding_and_no_reading_of_the_tower(tower: Path, tmp_path: Path) -> None:
    save_towers(tmp_path)
    places = (tmp_path / "speech", tmp_path / "llm", tower)
    model = ReLLMForConditionalGeneration.from_towers(*places, lora=LORA, projector_inner_dim=16).eval()
    fill_lora(model)
    extractor = tiny_processor(config=model.config).feature_extractor
    features = extractor.extract([clip(0.4), clip(0.7)])
    features.pop("num_audio_tokens")
    expected = model.get_audio_features(**features)
    assert expected.tower_dimensions is None and expected.emotion_embedding.std(0).max() > 0
    assert [one.tower_dimensions for one in read_heard(model.config, expected)] == [{}, {}]
    for light in (False, True):
        model.save_pretrained(tmp_path / f"{light}", light=light)
        loaded = AutoModel.from_pretrained(tmp_path / f"{light}").eval()
        heard = loaded.get_audio_features(**features)
        assert torch.equal(heard.pooler_output, expected.pooler_output) and heard.tower_dimensions is None
        if not light:
            assert_same_model(loaded, model)


def test_a_corpus_without_dimensions_says_what_can_be_taught(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teach its emotions .--targets emotions"):
        train(corpus, tmp_path, targets="dimensions")
    with pytest.raises(ValueError, match="targets must be one of dimensions, emotions, got 'both'"):
        EmotionScriptArguments(model_name_or_path="m", data="d", targets="both")


def test_a_head_of_the_same_categories_is_kept_and_of_others_made_anew(
    corpus: Path, tower: Path, tmp_path: Path
) -> None:
    """Also of a published classifier of audEERING's layout, an encoder's configuration with its labels in it."""
    config = json.loads((tower / "config.json").read_text())
    for name, labels in (("same", {0: "pain", 1: "happy", 2: "alarm"}), ("other", {0: "joy", 1: "dread"})):
        folder = tmp_path / name
        folder.mkdir()
        flat = config["encoder_config"] | {"id2label": labels, "final_dropout": 0.0}
        (folder / "config.json").write_text(json.dumps(flat))
        weights = load_file(tower / "model.safetensors")
        for part in ("weight", "bias"):
            weights[f"classifier.out_proj.{part}"] = weights[f"classifier.out_proj.{part}"][: len(labels)].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert ReLLMEmotionModel.from_pretrained(folder).config.emotion_labels == list(labels.values())
    kept = build_emotion_tower(str(tmp_path / "same"), labels=["happy", "alarm", "pain"])
    assert kept.config.emotion_labels == ["pain", "happy", "alarm"]  # in the order of its own outputs
    before = load_file(tower / "model.safetensors")
    assert torch.equal(kept.classifier.out_proj.weight, before["classifier.out_proj.weight"])
    fresh = build_emotion_tower(str(tmp_path / "other"), labels=["happy", "alarm", "pain"])
    assert fresh.config.emotion_labels == ["happy", "alarm", "pain"]
    name = "encoder.layers.0.attention.q_proj.weight"
    assert torch.equal(fresh.encoder.state_dict()[name], before[f"wav2vec2.{name}"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"id2label": {0: "happy", 1: "happy"}}, "each by a name of its own"),
        ({"id2label": {0: "happy", 1: "arousal"}}, "in this order, or emotions"),
        ({"id2label": {0: "Arousal", 1: "Dominance", 2: "Valence"}}, "in this order, or emotions"),
        ({"id2label": {0: "happy", 1: "sad"}, "trained_dimensions": ["arousal"]}, "trained_dimensions must be some"),
    ],
)
def test_outputs_that_are_neither_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReLLMEmotionConfig(**fields)


def test_an_emotion_of_the_evaluation_that_training_lacks_is_named(corpus: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (corpus / "metadata.jsonl").read_text().splitlines()]
    rows[-1]["emotion"] = "sad"
    for row in rows:
        row["audio"] = str(corpus / row["audio"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"emotions \['sad'\], which the tower does not know"):
        train(corpus, tmp_path / "run", data=str(tmp_path / "rows.jsonl"))
