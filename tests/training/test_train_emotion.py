"""`relllm train-emotion`: encoders and towers to start from, CCC on the development split, a tower for RE-LLM."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, disable_progress_bars
from tiny_models import (
    clip,
    tiny_audio_config,
    tiny_emotion_config,
    tiny_emotion_tower,
    tiny_llm,
    tiny_speech_tower,
    tiny_tokenizer,
)
from transformers import AutoModel, EvalPrediction, Wav2Vec2FeatureExtractor

from relllm import ReLLMEmotionConfig, ReLLMEmotionModel, ReLLMForConditionalGeneration
from relllm.data.annotate import annotate_rows
from relllm.data.data_settings import AnnotationSettings
from relllm.labels import DIMENSIONS
from relllm.training.checkpoints import RunComplete
from relllm.training.emotion_training import (
    EmotionScriptArguments,
    EmotionTowerTrainer,
    EmotionTrainingConfig,
    build_emotion_tower,
    concordance_metrics,
    parse_emotion_arguments,
    run_emotion_training,
)

disable_progress_bars()
# WavLM's own attention, on a padded batch
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tones whose pitch is the valence and whose modulation is arousal and dominance; one row is unlabelled."""
    folder = tmp_path_factory.mktemp("corpus")
    time_s = np.arange(6400) / 16_000
    rows = []
    for index in range(48):
        rng = np.random.default_rng(index)
        valence, arousal = rng.uniform(0.1, 0.9, 2)
        wave = np.sin(2 * np.pi * (200 + 800 * valence) * time_s) * (1 + arousal * np.sin(2 * np.pi * 20 * time_s))
        soundfile.write(folder / f"{index}.wav", 0.2 * wave + 0.005 * rng.standard_normal(len(wave)), 16_000)
        labels = {"arousal": arousal, "dominance": arousal, "valence": valence}
        labels = labels if index else dict.fromkeys(labels)
        rows.append(
            {"id": f"{index}", "audio": f"{index}.wav", "split": "validation" if index > 35 else "train"} | labels
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def save_encoder(folder: Path, kind: str = "wav2vec2") -> str:
    torch.manual_seed(1)
    AutoModel.from_config(tiny_audio_config(kind, layers=2)).save_pretrained(folder)
    return str(folder)


def args_of(folder: Path, **changes: object) -> EmotionTrainingConfig:
    quick = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 12,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return EmotionTrainingConfig(output_dir=str(folder), **{**quick, **changes})


def test_the_defaults_are_audeerings(tmp_path: Path) -> None:
    flags = ["--model_name_or_path", "m", "--data", "d", "--output_dir", str(tmp_path)]
    script, args = parse_emotion_arguments([*flags, "--num_layers", "12"])
    assert (args.learning_rate, args.lr_scheduler_type, args.per_device_train_batch_size) == (1e-4, "constant", 32)
    assert (args.num_train_epochs, args.weight_decay, args.gradient_accumulation_steps) == (5, 0, 1)
    assert args.load_best_model_at_end and args.metric_for_best_model == "ccc" and args.greater_is_better
    assert script.num_layers == 12 and not script.train_feature_encoder


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": None}, "model_name_or_path and data are needed"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"final_dropout": 1.0}, r"final_dropout must be in \[0, 1\)"),
        ({"resume": "maybe"}, "resume must be"),
    ],
)
def test_a_wrong_setting_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmotionScriptArguments(**{"model_name_or_path": "m", "data": "d", **change})


@pytest.mark.slow
def test_a_run_learns_keeps_the_best_and_gives_a_tower_that_rellm_takes(corpus: str, tmp_path: Path) -> None:
    script = EmotionScriptArguments(model_name_or_path=save_encoder(tmp_path / "encoder"), data=corpus)
    trainer = run_emotion_training(script, args_of(tmp_path / "run", num_train_epochs=20))
    evaluations = [entry for entry in trainer.state.log_history if "eval_ccc" in entry]
    assert {f"eval_ccc_{name}" for name in DIMENSIONS} <= evaluations[0].keys()
    best = max(entry["eval_ccc"] for entry in evaluations)
    saved = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert saved["eval_ccc"] == pytest.approx(best, abs=1e-6) and best > evaluations[0]["eval_ccc"] > -1
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "run")
    assert extractor.do_normalize and extractor.return_attention_mask
    tower = ReLLMEmotionModel.from_pretrained(tmp_path / "run")
    model = ReLLMForConditionalGeneration.from_towers(
        audio=tiny_speech_tower("whisper"),
        text=tiny_llm(),
        emotion=tmp_path / "run",
        tokenizer=tiny_tokenizer(),
        projector_inner_dim=16,
    )
    state = model.model.emotion_tower.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in tower.state_dict().items())


def test_a_folder_is_one_runs_and_a_complete_one_does_nothing(corpus: str, tmp_path: Path) -> None:
    script = EmotionScriptArguments(model_name_or_path=save_encoder(tmp_path / "encoder"), data=corpus)
    run_emotion_training(script, args_of(tmp_path / "run", num_train_epochs=1))
    with pytest.raises(RunComplete, match="3 steps"):
        run_emotion_training(script, args_of(tmp_path / "run", num_train_epochs=1))
    with pytest.raises(ValueError, match=r"complete run with other settings \(seed: 42, now 7\)"):
        run_emotion_training(script, args_of(tmp_path / "run", num_train_epochs=1, seed=7))
    save_encoder(tmp_path / "encoder", "hubert")
    with pytest.raises(ValueError, match="model_name_or_path_fingerprint"):
        run_emotion_training(script, args_of(tmp_path / "run", num_train_epochs=1))


def test_the_convolutions_stay_as_they_were_unless_they_are_to_train(corpus: str, tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    before = AutoModel.from_pretrained(encoder).state_dict()
    for train in (False, True):
        script = EmotionScriptArguments(
            model_name_or_path=encoder, data=corpus, train_feature_encoder=train, eval_split=""
        )
        trainer = run_emotion_training(script, args_of(tmp_path / f"run-{train}", max_steps=1))
        after = trainer.model.encoder.state_dict()
        moved = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
        assert any(name.startswith("feature_extractor") for name in moved) == train
        assert any(name.startswith("encoder.layers.") for name in moved)


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert-group", "wavlm"])
def test_every_kind_of_encoder_keeps_its_weights_under_a_fresh_head(kind: str, tmp_path: Path) -> None:
    name = save_encoder(tmp_path, kind)
    tower = build_emotion_tower(name, final_dropout=0.3)
    expected = AutoModel.from_pretrained(name).state_dict()
    assert all(torch.equal(weight, expected[key]) for key, weight in tower.encoder.state_dict().items())
    assert tower.config.final_dropout == 0.3
    values = torch.from_numpy(clip(0.4))[None]
    assert tower.eval()(values).dimensions.shape == (1, 3)


def test_fewer_layers_are_the_lowest_ones(tmp_path: Path) -> None:
    name = save_encoder(tmp_path / "encoder")
    tower = build_emotion_tower(name, num_layers=1)
    assert len(tower.encoder.encoder.layers) == 1 == tower.config.encoder_config.num_hidden_layers
    expected = AutoModel.from_pretrained(name).encoder.layers[0].state_dict()
    kept = tower.encoder.encoder.layers[0].state_dict()
    assert all(torch.equal(kept[key], weight) for key, weight in expected.items())
    tower.save_pretrained(tmp_path / "tower")
    assert len(ReLLMEmotionModel.from_pretrained(tmp_path / "tower").encoder.encoder.layers) == 1
    with pytest.raises(ValueError, match="num_layers=3, and the encoder has 2"):
        build_emotion_tower(name, num_layers=3)


def test_a_tower_keeps_its_head(tmp_path: Path) -> None:
    tower = tiny_emotion_tower()
    tower.save_pretrained(tmp_path)
    loaded = build_emotion_tower(str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in tower.state_dict().items())


def test_what_is_no_waveform_encoder_is_refused(tmp_path: Path) -> None:
    tiny_speech_tower("whisper").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be of one of the kinds .*wav2vec2.*got 'whisper'"):
        build_emotion_tower(str(tmp_path))


def test_concordance_is_that_of_the_reference_library_over_labelled_clips() -> None:
    audmetric = pytest.importorskip("audmetric")
    rng = np.random.default_rng(0)
    target = rng.uniform(size=(50, 3)).astype(np.float32)
    predicted = (0.5 * target + 0.3 * rng.uniform(size=(50, 3))).astype(np.float32)
    target[::7, 1] = np.nan
    metrics = concordance_metrics(EvalPrediction(predictions=predicted, label_ids=target))
    for index, name in enumerate(DIMENSIONS):
        known = np.isfinite(target[:, index])
        expected = audmetric.concordance_cc(target[known, index], predicted[known, index])
        assert metrics[f"ccc_{name}"] == pytest.approx(expected, abs=1e-5)
    assert metrics["ccc"] == pytest.approx(np.mean([metrics[f"ccc_{name}"] for name in DIMENSIONS]))


def save_rows(corpus: str, folder: Path, dropped: dict[str, str]) -> str:
    """The corpus without a column (`""`) or with no value in it in the named split."""
    rows = [json.loads(line) for line in (Path(corpus) / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(Path(corpus) / row["audio"])
        for name, split in dropped.items():
            if not split:
                del row[name]
            elif row["split"] == split:
                row[name] = None
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("split", ["", "train"])
def test_a_dimension_without_labels_is_not_trained_nor_evaluated_nor_read(
    corpus: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: str
) -> None:
    data = save_rows(corpus, tmp_path, {"dominance": split})
    start = tiny_emotion_tower()
    start.classifier.out_proj.weight.data *= 0.1  # within the scale, whatever was drawn
    start.classifier.out_proj.bias.data.fill_(0.5)
    start.save_pretrained(tmp_path / "start")
    script = EmotionScriptArguments(model_name_or_path=str(tmp_path / "start"), data=data)
    trainer = run_emotion_training(script, args_of(tmp_path / "run"))
    assert "'train' has fewer than two labels of dominance" in caplog.text
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert "eval_ccc_dominance" not in metrics
    assert metrics["eval_ccc"] == pytest.approx((metrics["eval_ccc_arousal"] + metrics["eval_ccc_valence"]) / 2)
    moved = (trainer.model.classifier.out_proj.weight - start.classifier.out_proj.weight).abs().sum(1)
    assert [value > 0 for value in moved] == [True, False, True]

    tower = ReLLMEmotionModel.from_pretrained(tmp_path / "run")
    assert tower.config.trained_dimensions == ["arousal", "valence"]
    read = tower(torch.from_numpy(clip(0.4))[None]).dimensions
    assert read.isnan().tolist() == [[False, True, False]]
    row = {"id": "a", "audio": f"{corpus}/1.wav"}
    settings = AnnotationSettings(emotion_model="tower")
    annotate_rows(Dataset.from_list([row]), tmp_path / "out.jsonl", lambda: tower, settings, progress=False)
    annotated = json.loads((tmp_path / "out.jsonl").read_text())
    assert annotated["dominance"] is None and annotated["dimension_source"] == "pseudo:tower"
    assert annotated["arousal"] is not None and annotated["valence"] is not None


def test_a_tower_of_two_dimensions_learns_the_third_from_rows_that_have_it(corpus: str, tmp_path: Path) -> None:
    config = tiny_emotion_config()
    config.trained_dimensions = ["valence"]
    ReLLMEmotionModel(config).save_pretrained(tmp_path / "start")
    script = EmotionScriptArguments(model_name_or_path=str(tmp_path / "start"), data=corpus)
    run_emotion_training(script, args_of(tmp_path / "run", max_steps=1))
    assert ReLLMEmotionModel.from_pretrained(tmp_path / "run").config.trained_dimensions == list(DIMENSIONS)


def test_rows_without_any_label_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"audio": "a.wav", "valence": 0.5}, {"audio": "b.wav", "valence": None}])
    args = args_of(tmp_path, eval_strategy="no", load_best_model_at_end=False)
    with pytest.raises(ValueError, match="No two training rows are labelled"):
        EmotionTowerTrainer(tiny_emotion_tower(), args, train_dataset=rows)


def test_dimensions_that_are_none_are_refused() -> None:
    for names in ([], ["pleasure"]):
        with pytest.raises(ValueError, match="trained_dimensions must be some of"):
            ReLLMEmotionConfig(trained_dimensions=names)


@pytest.mark.parametrize(
    "dropped, message",
    [
        (dict.fromkeys(DIMENSIONS, "train"), "'train' has fewer than two rows with arousal or dominance or valence"),
        ({"valence": "", "dominance": "train", "arousal": "validation"}, "'validation' .* fewer than two .* arousal"),
    ],
)
def test_a_split_without_labels_is_refused(corpus: str, tmp_path: Path, dropped: dict, message: str) -> None:
    script = EmotionScriptArguments(model_name_or_path="unused", data=save_rows(corpus, tmp_path, dropped))
    with pytest.raises(ValueError, match=message):
        run_emotion_training(script, args_of(tmp_path / "run"))


def test_a_clip_too_short_for_the_tower_is_named(tmp_path: Path) -> None:
    config = tiny_emotion_config()
    config.encoder_config.conv_kernel = [10, 8, 4]  # 770 samples for a frame
    args = args_of(tmp_path, eval_strategy="no", load_best_model_at_end=False)
    collator = EmotionTowerTrainer(ReLLMEmotionModel(config), args).data_collator
    row = {"id": "a", "audio": clip(1.0)[:769], **dict.fromkeys(DIMENSIONS, 0.5)}
    with pytest.raises(ValueError, match="769 samples at 16000 Hz .* at least 48.12 ms"):
        collator([row])
    assert collator([{**row, "audio": clip(1.0)[:770]}])["input_values"].shape == (1, 770)


def test_accumulated_steps_are_averaged(corpus: str, tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    losses = []
    for steps in (1, 3):
        script = EmotionScriptArguments(model_name_or_path=encoder, data=corpus, eval_split="")
        settings = {"gradient_accumulation_steps": steps, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
        trainer = run_emotion_training(script, args_of(tmp_path / f"run-{steps}", **settings))
        losses.append(trainer.state.log_history[0]["loss"])
    assert all(0.5 < loss < 1.5 for loss in losses)  # one minus a CCC near zero, not a sum over the steps
