"""Augmentation in training: what a clip draws, in whichever worker, process or resumed run. None in evaluation."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from tiny_models import audio_part, clip, tiny_emotion_tower
from torch.utils.data import DataLoader
from trainers import make_rows, make_trainer

import relllm
from relllm import EMOTIONS, ReLLMSFTConfig
from relllm.processing.audio_relllm import load_audio
from relllm.training.augmentation import Augmentation, AugmentationSettings, change_speed
from relllm.training.collator import ReLLMCollator
from relllm.training.emotion_training import EmotionTowerTrainer, EmotionTrainingConfig
from relllm.training.run import parse_arguments

ALL_EFFECTS = {
    "augment_speed": [0.9, 1.1],
    "augment_reverb": [0.2, 0.6],
    "augment_noise_snr_db": [5, 30],
    "augment_gain_db": [-10, 6],
    "augment_telephone": True,
    "augment_codec": ["mp3", "opus", "ulaw"],
}
QUICK = {"augment_speed": [0.8, 1.2], "augment_noise_snr_db": [5, 30], "augment_probability": 0.7}


def augmentation(seed: int = 3, **settings) -> Augmentation:
    return Augmentation(AugmentationSettings(**(settings or ALL_EFFECTS)), seed=seed)


# What a clip draws


def test_a_draw_follows_from_seed_epoch_row_and_clip_and_from_nothing_else() -> None:
    first = augmentation(augment_noise_snr_db=[5, 30], augment_probability=1.0)
    drawn = first(clip(0.3), row_id="a")
    again = augmentation(augment_noise_snr_db=[5, 30], augment_probability=1.0)
    again(clip(0.5, seed=4), row_id="b")
    np.random.default_rng().random()
    assert np.array_equal(again(clip(0.3), row_id="a"), drawn)
    others = [again(clip(0.3), row_id="b"), again(clip(0.3), row_id="a", clip=1)]
    again.epoch = 1
    others.append(again(clip(0.3), row_id="a"))
    others.append(augmentation(4, augment_noise_snr_db=[5, 30], augment_probability=1.0)(clip(0.3), row_id="a"))
    different = {values.tobytes() for values in [drawn, *others]}
    assert len(different) == 5


def test_a_row_without_an_id_draws_by_its_samples() -> None:
    augment = augmentation(augment_gain_db=[-30, 0], augment_probability=1.0)
    gains = [float(augment(wave)[0] / wave[0]) for wave in (clip(0.3), clip(0.3, seed=1), clip(0.3))]
    assert gains[0] == gains[2] != gains[1]


def test_each_effect_comes_as_often_and_as_strong_as_stated() -> None:
    augment = augmentation(augment_gain_db=[-12, -2], augment_probability=0.3)
    flat = np.full(800, 0.5, np.float32)
    gains = np.array([20 * np.log10(augment(flat, row_id=row)[0] / 0.5) for row in range(2000)])
    drawn = gains[gains != 0]
    assert len(drawn) / len(gains) == pytest.approx(0.3, abs=0.04)
    assert -12 <= drawn.min() < -11.8 and -2.2 < drawn.max() <= -2 and drawn.mean() == pytest.approx(-7, abs=0.4)


def test_switching_an_effect_on_leaves_the_draws_of_the_others() -> None:
    speed = augmentation(augment_speed=[0.8, 1.2])
    both = augmentation(augment_speed=[0.8, 1.2], augment_noise_snr_db=[5, 30])
    lengths = [[len(augment(clip(0.3), row_id=row)) for row in range(20)] for augment in (speed, both)]
    assert lengths[0] == lengths[1] and len(set(lengths[0])) > 5


def test_all_effects_together_keep_to_full_scale_and_leave_the_given_clip_alone() -> None:
    augment = augmentation(**ALL_EFFECTS, augment_probability=1.0)
    for row in range(8):
        wave = np.clip(5 * clip(0.4, seed=row), -1, 1)
        given = wave.copy()
        heard = augment(wave, row_id=row)
        assert np.isfinite(heard).all() and np.abs(heard).max() <= 1 and heard.dtype == np.float32
        assert np.array_equal(wave, given) and not np.array_equal(heard[:100], wave[:100])


def test_speed_makes_no_clip_too_short_or_too_long() -> None:
    settings = AugmentationSettings(augment_speed=[0.5, 0.5], augment_probability=1.0)
    slow = Augmentation(settings, seed=0, max_duration_s=1.0)
    assert [len(slow(clip(duration_s))) for duration_s in (0.4, 0.6)] == [12_800, 9_600]
    fast = augmentation(augment_speed=[2.0, 2.0], augment_probability=1.0)
    assert [len(fast(clip(duration_s))) for duration_s in (0.05, 0.04)] == [400, 640]
    wide = Augmentation(fast.settings, seed=0, min_duration_s=0.04)
    assert [len(wide(clip(duration_s))) for duration_s in (0.08, 0.079)] == [640, 1_264]


def test_recorded_noise_is_read_resampled_and_repeated(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    hum = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(4410) / 44_100)
    soundfile.write(tmp_path / "deep" / "hum.wav", np.stack([hum, hum], 1), 44_100)
    augment = augmentation(augment_noise_snr_db=[10, 10], augment_noise_dir=str(tmp_path), augment_probability=1.0)
    wave = clip(0.5)
    added = augment(wave, row_id="a").astype(np.float64) - wave
    assert np.mean(wave**2) / np.mean(added**2) == pytest.approx(10, rel=0.01)
    spectrum = np.abs(np.fft.rfft(added * np.hanning(len(added))))
    assert np.argmax(spectrum) * 2 == pytest.approx(1000, abs=4)  # bins of 2 Hz


def test_a_folder_of_noise_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    settings = {"augment_noise_snr_db": [10, 10], "augment_noise_dir": str(tmp_path)}
    with pytest.raises(FileNotFoundError, match=r"holds no file that ends in \.wav"):
        augmentation(**settings)
    (tmp_path / "bad.wav").write_text("not audio")
    with pytest.raises(ValueError, match=r"bad\.wav cannot be read"):
        augmentation(**settings)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        augmentation(**settings | {"augment_noise_dir": str(tmp_path / "gone")})


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment_speed": [1.1, 0.9]}, r"augment_speed must be a range \[low, high\] within \[0\.5, 2\]"),
        ({"augment_speed": [0.9]}, "augment_speed must be a range"),
        ({"augment_reverb": [200, 600]}, r"augment_reverb must be a range .* within \[0\.05, 5\], got \[200, 600\]"),
        ({"augment_gain_db": [float("nan"), 0]}, "augment_gain_db must be a range"),
        ({"augment_codec": ["aac"]}, r"augment_codec has \['aac'\]"),
        ({"augment_probability": 0.0}, r"augment_probability must be in \(0, 1\]"),
        ({"augment_noise_dir": "noise"}, "set augment_noise_snr_db"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    for config in (ReLLMSFTConfig, EmotionTrainingConfig):
        with pytest.raises(ValueError, match=message):
            config(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_settings_come_from_yaml_and_flags_and_are_off_by_default(tmp_path: Path) -> None:
    needed = ["--model_name_or_path", "m", "--data", "d", "--output_dir", str(tmp_path)]
    _, args = parse_arguments(needed)
    assert not args.augments
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("augment_speed: [0.9, 1.1]\naugment_telephone: true\naugment_codec: [mp3, ulaw]\n")
    _, args = parse_arguments(["--config", str(recipe), *needed, "--augment_noise_snr_db", "5", "30"])
    assert args.augments and args.augment_speed == [0.9, 1.1] and args.augment_noise_snr_db == [5.0, 30.0]
    assert args.augment_telephone and args.augment_codec == ["mp3", "ulaw"] and args.augment_gain_db is None


def test_a_collator_that_cannot_augment_is_refused(tmp_path: Path, processor) -> None:
    trainer = make_trainer(make_rows(tmp_path, 2), tmp_path / "run", processor)
    args = ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, augment_telephone=True)
    with pytest.raises(ValueError, match="data_collator is a function, and only a ReLLMCollator augments"):
        relllm.ReLLMSFTTrainer(
            model=trainer.model,
            args=args,
            train_dataset=trainer.train_dataset,
            processing_class=processor,
            data_collator=lambda rows: {},
        )


# The collator


def test_the_placeholders_follow_the_clip_that_the_towers_hear(processor) -> None:
    row = {"id": "a", "audio": clip(1.0), "response": "I see."}
    slow = augmentation(augment_speed=[0.6, 0.6], augment_probability=1.0)
    batch = ReLLMCollator(processor, EMOTIONS, augmentation=slow)([row])
    expected = ReLLMCollator(processor, EMOTIONS)([row | {"audio": change_speed(clip(1.0), 0.6)}])
    torch.testing.assert_close(batch, expected, rtol=0, atol=0, equal_nan=True)
    plain = ReLLMCollator(processor, EMOTIONS)([row])
    assert batch["input_ids"].shape[1] > plain["input_ids"].shape[1]


def test_each_clip_of_a_conversation_draws_for_itself_and_the_row_is_left_alone(processor) -> None:
    messages = [
        {"role": "user", "content": [audio_part(clip(0.5)), audio_part(clip(0.5))]},
        {"role": "assistant", "content": "I see."},
    ]
    augment = augmentation(augment_speed=[0.6, 1.6], augment_probability=1.0)
    batch = ReLLMCollator(processor, EMOTIONS, augmentation=augment)([{"id": "a", "messages": messages}])
    lengths = batch["input_values_mask"].sum(1).tolist()
    assert lengths[0] != lengths[1] and 8000 not in lengths
    assert np.array_equal(messages[0]["content"][0]["audio"], clip(0.5))


def test_the_teacher_reads_the_same_transcript(processor) -> None:
    row = {"id": "a", "audio": clip(1.0), "text": "I got the job", "response": "Great."}
    slow = augmentation(augment_speed=[0.6, 0.6], augment_probability=1.0)
    plain, heard = (
        ReLLMCollator(processor, EMOTIONS, teacher=True, augmentation=augment)([row]) for augment in (None, slow)
    )
    for name in ("teacher_input_ids", "teacher_labels"):
        assert torch.equal(plain[name], heard[name])
    assert heard["input_values_mask"].sum() > plain["input_values_mask"].sum()


def test_the_draws_do_not_depend_on_how_rows_are_batched(tmp_path: Path, processor) -> None:
    rows = make_rows(tmp_path, 6)
    collate = ReLLMCollator(processor, EMOTIONS, augmentation=augmentation(**QUICK))

    def heard(batches: list[list[dict]]) -> dict[str, bytes]:
        found = {}
        for batch_rows in batches:
            batch = collate(batch_rows)
            for row, values, mask in zip(batch_rows, batch["input_values"], batch["input_values_mask"], strict=True):
                found[row["id"]] = values[: mask.sum()].numpy().tobytes()
        return found

    alone = heard([[row] for row in rows])
    assert heard([rows[:4], rows[4:]]) == alone
    assert heard([rows[::-1]]) == alone
    assert heard([rows[0::2], rows[1::2]]) == alone  # the shares of two processes


# The trainer


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each clip that is augmented, in any process: epoch, row, and what came of it."""
    journal = tmp_path / "drawn.jsonl"
    work = Augmentation.__call__

    def recording(self: Augmentation, waveform: np.ndarray, **place: object) -> np.ndarray:
        heard = work(self, waveform, **place)
        line = {"epoch": self.epoch, "row": place["row_id"], "heard": heard.tobytes().hex()[:4000], "n": len(heard)}
        with journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return heard

    monkeypatch.setattr(Augmentation, "__call__", recording)
    return journal


def take(journal: Path) -> dict[tuple[int, str], str]:
    """(epoch, row) -> what the towers heard; the journal is empty afterwards."""
    found: dict[tuple[int, str], str] = {}
    for line in map(json.loads, journal.read_text().splitlines() if journal.exists() else []):
        heard = f"{line['n']} {line['heard']}"
        assert found.setdefault((line["epoch"], line["row"]), heard) == heard
    journal.unlink(missing_ok=True)
    return found


SETTINGS = {
    **QUICK,
    "max_steps": -1,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "random",
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
}


def run_of(folder: Path, processor, **settings) -> dict[str, torch.Tensor]:
    """Trains on eight rows for three epochs of two steps; the weights that came of it."""
    resume = settings.pop("resume", None)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = make_rows(folder / "clips")
    trainer = make_trainer(rows, folder / "run", processor, **SETTINGS | settings)
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


WORKERS = (
    {"dataloader_num_workers": 2},
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
)


@pytest.mark.slow
def test_workers_draw_what_one_process_draws(tmp_path: Path, processor, drawn: Path) -> None:
    expected_weights = run_of(tmp_path / "alone", processor)
    expected = take(drawn)
    rows = {f"row-{index}" for index in range(8)}
    assert expected.keys() == {(epoch, row) for epoch in range(3) for row in rows}
    assert all(len({expected[epoch, row] for epoch in range(3)}) > 1 for row in rows)  # each epoch draws anew
    for number, workers in enumerate(WORKERS):
        weights = run_of(tmp_path / f"workers-{number}", processor, **workers)
        assert take(drawn) == expected, workers
        assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights), workers


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers",
    [{}, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}],
    ids=["one process", "persistent workers"],
)
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(
    tmp_path: Path, processor, drawn: Path, workers: dict
) -> None:
    expected_weights = run_of(tmp_path, processor, save_strategy="steps", save_steps=1, **workers)
    expected = take(drawn)
    for step in (2, 3):  # at an epoch's end, and within an epoch
        weights = run_of(tmp_path, processor, resume=str(tmp_path / "run" / f"checkpoint-{step}"), **workers)
        found = take(drawn)
        assert found.items() <= expected.items(), step
        assert len(found) == 4 * (6 - step), step  # four rows a step, and none that had been seen
        assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights), step


def test_a_streamed_run_counts_its_passes_as_epochs(tmp_path: Path, processor, drawn: Path) -> None:
    rows = Dataset.from_list(make_rows(tmp_path)).to_iterable_dataset()
    settings = {**SETTINGS, "max_steps": 4, "train_sampling_strategy": "sequential"}
    make_trainer(rows, tmp_path / "run", processor, **settings).train()
    passes = take(drawn)
    assert {epoch for epoch, _ in passes} == {0, 1}
    assert all(passes[0, f"row-{index}"] for index in range(8)) and len(passes) == 16


def test_evaluation_and_prediction_hear_the_clips_as_they_are(tmp_path: Path, processor, drawn: Path) -> None:
    rows = make_rows(tmp_path, 4)
    settings = {**QUICK, "augment_probability": 1.0, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = make_trainer(rows, tmp_path / "run", processor, eval_rows=rows, **settings)
    plain = make_trainer(rows, tmp_path / "plain", processor, model=trainer.model, eval_rows=rows)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert take(drawn) == {}
    for name in ("get_eval_dataloader", "get_test_dataloader"):
        loaders = (getattr(each, name)(trainer.eval_dataset) for each in (trainer, plain))
        for ours, theirs in zip(*loaders, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert take(drawn) == {}
    trainer.train()
    assert len(take(drawn)) == 4  # the training rows alone, although it evaluated before and after
    assert trainer.data_collator.augmentation is None


def test_only_training_knows_of_augmentation() -> None:
    """`relllm evaluate`, `annotate` and inference have no way to it."""
    package = Path(relllm.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and "augmentation" in (node.module or "")
    }
    files = ("collator", "config", "emotion_training", "run", "tasks", "trainer")
    assert users == {f"training/{name}.py" for name in files}


# The emotion tower's trainer


def emotion_batches(trainer: EmotionTowerTrainer) -> Iterator[torch.Tensor]:
    loaders: list[DataLoader] = [trainer.get_train_dataloader(), trainer.get_eval_dataloader()]
    for loader in loaders:
        yield torch.cat([batch["input_values_mask"].sum(1) for batch in loader])


def test_the_emotion_tower_trains_on_augmented_clips_and_is_measured_on_plain_ones(tmp_path: Path) -> None:
    rows = Dataset.from_list([row | {"arousal": 0.5} for row in make_rows(tmp_path, 4)])
    args = EmotionTrainingConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        per_device_train_batch_size=2,
        dataloader_pin_memory=False,
        augment_speed=[0.8, 0.8],
        augment_probability=1.0,
    )
    trainer = EmotionTowerTrainer(model=tiny_emotion_tower(), args=args, train_dataset=rows, eval_dataset=rows)
    plain = torch.tensor([len(load_audio(path)) for path in rows["audio"]])
    heard, measured = emotion_batches(trainer)
    assert measured.tolist() == plain.tolist() and sorted(heard.tolist()) == sorted((plain / 0.8).ceil().tolist())
