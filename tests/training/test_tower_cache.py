"""The cache of tower outputs: a run with it is the run without it, whatever happens to its files."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from tiny_models import (
    audio_inputs,
    audio_part,
    clip,
    conversation_inputs,
    text_part,
    tiny_emotion_tower,
    tiny_model,
    tiny_processor,
    user_turn,
)
from trainers import REPLIES, build, make_rows, make_trainer

from relllm import EMOTIONS, ReLLMForConditionalGeneration, ReLLMSFTConfig, ReLLMSFTTrainer, tower_outputs
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.tower_outputs import TowerCache, cache_settings, clip_key
from relllm.training.collator import ReLLMCollator

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
LOGGED = {"loss", "response_loss", "emotion_loss", "dimension_loss", "response_kl", "grad_norm"}
RUN = {
    "learning_rate": 1e-2,
    "max_steps": 4,  # two an epoch
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "random",
}


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Eight rows of different lengths; two have clips of several windows."""
    (tmp_path / "clips").mkdir()
    rows = make_rows(tmp_path / "clips")
    for index, seconds in ((2, 2.7), (5, 4.1)):
        soundfile.write(tmp_path / "clips" / f"{index}.wav", clip(seconds, seed=index), 16_000, subtype="FLOAT")
    return rows


def conversations() -> list[dict]:
    """Rows of two clips, one of several windows."""
    rows = []
    for index in range(4):
        parts = [audio_part(clip(seconds, seed=index).tolist()) for seconds in (0.3, 2.1 + 0.2 * index)]
        messages = [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [text_part(REPLIES[index % 3])]},
        ]
        rows.append({"messages": messages, "emotion": [EMOTIONS[index], None], "text": ["I got", "the job"]})
    return rows


def train(rows: list[dict], folder: Path, *, model=None, processor=None, **settings) -> ReLLMSFTTrainer:
    model = (model if model is not None else tiny_model(lora=LORA)).double()
    processor = processor if processor is not None else tiny_processor(model.config)
    trainer = make_trainer(rows, folder, processor, model, **(RUN | settings))
    trainer.train()
    return trainer


def assert_same_run(found: ReLLMSFTTrainer, expected: ReLLMSFTTrainer) -> None:
    """Each loss, each gradient's norm and each weight at the end, to 1e-6.

    Both are in float64 but for the losses, which are float32: what is left of the order of sums is below 1e-7.
    """
    pairs = list(zip(found.state.log_history, expected.state.log_history, strict=True))
    for entry, wanted in pairs:
        for name in LOGGED & wanted.keys():
            assert entry[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-6), name
    assert any("response_loss" in wanted for _, wanted in pairs)
    for (name, weight), wanted in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-6, msg=name)


def skip_if_towers_draw() -> None:
    tower = tiny_emotion_tower()
    before = torch.get_rng_state()
    tower(torch.zeros(1, 16_000))
    if not torch.equal(before, torch.get_rng_state()):
        pytest.skip("wav2vec2 of this release of Transformers draws numbers, and shifts those of dropout")


def hits(trainer: ReLLMSFTTrainer) -> list[float]:
    return [entry["tower_cache_hits"] for entry in trainer.state.log_history if "tower_cache_hits" in entry]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def outputs_of(seed: int, frames: int = 7) -> TowerOutputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, frames, 5), (2,), (2, 4), (2, 3))
    frames_, _, embedding, dimensions = (torch.randn(shape, generator=generator) for shape in shapes)
    return TowerOutputs(frames_, torch.tensor([frames, frames - 1]), embedding, dimensions)


# As without it


@pytest.mark.parametrize("full_window, workers", [(True, 0), (False, 2)])
def test_a_run_with_the_cache_is_the_run_without(tmp_path, rows, full_window: bool, workers: int) -> None:
    settings = {"processor": tiny_processor(full_window=full_window), "dataloader_num_workers": workers}
    skip_if_towers_draw()
    expected = train(rows, tmp_path / "without", **settings)
    found = train(rows, tmp_path / "with", tower_cache_dir=str(tmp_path / "cache"), **settings)
    assert_same_run(found, expected)
    assert len(files(tmp_path / "cache")) == 2 * len(rows)  # of each tower
    assert hits(expected) == [] and hits(found)[:2] == [0, 0] and hits(found)[-1] == 1


def test_so_is_one_with_a_teacher_and_several_clips_a_row(tmp_path: Path) -> None:
    runs = []
    for cache in (None, str(tmp_path / "cache")):
        model, processor, settings = build()
        settings = settings | {"tower_cache_dir": cache, "max_steps": 2, "gradient_accumulation_steps": 2}
        settings["dimension_loss_weight"] = 0.0  # these rows have emotions alone
        runs.append(train(conversations(), tmp_path / "run", model=model, processor=processor, **settings))
    assert_same_run(runs[1], runs[0])
    assert hits(runs[1]) == [0, 1] and "response_kl" in runs[1].state.log_history[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{"fusion": "none"}, {"audio": "wavlm-group", "fusion": "token"}])
def test_so_is_one_of_other_towers(tmp_path: Path, rows, kind: dict[str, str]) -> None:
    settings = {"max_steps": 3}
    skip_if_towers_draw()
    expected = train(rows, tmp_path / "run", model=tiny_model(lora=LORA, **kind), **settings)
    cache = str(tmp_path / "cache")
    found = train(rows, tmp_path / "run", model=tiny_model(lora=LORA, **kind), tower_cache_dir=cache, **settings)
    assert_same_run(found, expected)
    assert hits(found)[-1] == 1


def test_an_evaluation_reads_and_fills_it_too(tmp_path: Path, rows) -> None:
    expected = make_trainer(rows, tmp_path / "run", tiny_processor()).evaluate(Dataset.from_list(rows))
    trainer = make_trainer(rows, tmp_path / "run", tiny_processor(), tower_cache_dir=str(tmp_path / "cache"))
    trainer.evaluate(Dataset.from_list(rows[:3]))
    for share in (3 / 8, 1.0):  # the first has batches with some clips of the cache and some not
        metrics = trainer.evaluate(Dataset.from_list(rows))
        assert metrics.pop("eval_tower_cache_hits") == share
        for name in (name for name in expected if not name.endswith(("_time", "_runtime", "_second"))):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name  # a CCC may be near zero


def test_with_all_clips_in_it_no_tower_runs_and_no_features_are_made(tmp_path: Path, rows, monkeypatch) -> None:
    cache = str(tmp_path / "cache")
    model = tiny_model(lora=LORA)
    train(rows, tmp_path / "first", model=model, tower_cache_dir=cache, max_steps=2)
    trainer = make_trainer(rows, tmp_path / "run", tiny_processor(), model, tower_cache_dir=cache)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tower ran, or a feature was made")

    monkeypatch.setattr(trainer.processing_class.feature_extractor, "_speech_inputs", fail)
    for tower in (trainer.model.model.audio_tower.conv1, trainer.model.model.emotion_tower):
        tower.register_forward_pre_hook(fail)
    trainer.train()
    assert hits(trainer) == [1]
    batch = trainer.data_collator(rows[:2])
    assert not any(name.startswith("input_features") or name.startswith("input_values") for name in batch)


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path: Path, rows) -> None:
    settings = RUN | {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    settings |= {"light_checkpoints": False, "optim": "adamw_torch"}

    def make(folder: Path) -> ReLLMSFTTrainer:
        options = settings | {"tower_cache_dir": str(folder / "cache")}
        return make_trainer(rows, folder, tiny_processor(), tiny_model(lora=LORA), **options)

    whole = make(tmp_path / "whole")
    whole.train()
    cut = make(tmp_path / "cut")
    compute_loss, micro_batches = cut.compute_loss, iter(range(100))

    def die_in_the_fourth_step(*args: object, **kwargs: object) -> torch.Tensor:
        if next(micro_batches) == 7:
            raise KeyboardInterrupt
        return compute_loss(*args, **kwargs)

    cut.compute_loss = die_in_the_fourth_step
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = make(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert (cut.state.global_step, again.state.global_step) == (3, 5)
    for (name, weight), wanted in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-6, msg=name)


def test_the_model_takes_tower_outputs_for_features() -> None:
    model = tiny_model()
    processor = tiny_processor(model.config)
    inputs = conversation_inputs(processor, [[user_turn(clip(0.5))], [user_turn(clip(3.3, seed=1), clip(0.2))]])
    audio = audio_inputs(inputs)
    features = {name: audio.pop(name) for name in list(audio) if name.startswith("input_")}
    towers = model.model.run_towers(**features)
    rest = {name: value for name, value in inputs.items() if name not in features}
    torch.testing.assert_close(model(**rest, tower_outputs=towers).logits, model(**inputs).logits, rtol=0, atol=0)
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
        assert torch.equal(
            model.generate(**rest, tower_outputs=towers, **options), model.generate(**inputs, **options)
        )
    with pytest.raises(ValueError, match="exactly one of input_features and tower_outputs"):
        model.get_audio_features(**features, tower_outputs=towers)


def test_a_clip_that_is_only_counted_has_its_windows_and_positions_and_no_features() -> None:
    extractor = tiny_processor().feature_extractor
    clips = [clip(0.5), clip(3.3, seed=1), clip(0.2, seed=2)]
    whole, counted = extractor.extract(clips), extractor.extract(clips, only_counted=[False, True, False])
    assert torch.equal(counted["num_audio_tokens"], whole["num_audio_tokens"])
    assert counted["audio_num_windows"].tolist() == whole["audio_num_windows"].tolist() == [1, 2, 1]
    short = extractor([clips[0], clips[2]])
    assert all(torch.equal(counted[name], short[name]) for name in extractor.model_input_names)


# Files


def test_what_is_put_comes_back_to_the_bit(tmp_path: Path) -> None:
    cache = TowerCache(tmp_path, {"towers": 1})
    for dtype in (torch.float32, torch.bfloat16):
        outputs = outputs_of(3)
        outputs.frames = outputs.frames.to(dtype)
        cache.put("ab" * 32, outputs)
        found = cache.get("ab" * 32)
        assert all(torch.equal(found[name], outputs[name]) for name in outputs) and found.frames.dtype == dtype
    assert cache.get("cd" * 32) is None


@pytest.mark.parametrize("damage", ["cut short", "empty", "not ours"])
def test_a_damaged_file_is_missing_and_written_again(tmp_path: Path, rows, damage: str, monkeypatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(tower_outputs.logger, "warning", warned.append)
    settings = {"tower_cache_dir": str(tmp_path / "cache"), "eval_rows": rows}
    trainer = make_trainer(rows, tmp_path / "run", tiny_processor(), **settings)
    expected = trainer.evaluate()
    first, second, *_ = files(tmp_path / "cache")
    sound = first.read_bytes()
    content = {"cut short": sound[:-100], "empty": b"", "not ours": b"RIFF" * 100}
    first.write_bytes(content[damage])
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert metrics["eval_tower_cache_hits"] == 7 / 8 and str(first) in warned[0] and len(warned) == 1
    assert trainer.evaluate()["eval_tower_cache_hits"] == 1


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path: Path, monkeypatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(tower_outputs.logger, "warning", warned.append)
    cache = TowerCache(tmp_path, {})

    def no_space(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    for index in range(2):
        cache.put(f"{index:064x}", outputs_of(index))
    assert cache.is_full and files(tmp_path) == [] and len(warned) == 1 and "No space left" in warned[0]


def hammer(root: Path, seed: int) -> None:
    torch.set_num_threads(1)
    cache = TowerCache(root, {"towers": 1})
    for index in np.random.default_rng(seed).permutation(30).tolist() * 4:
        key = f"{index:064x}"
        found = cache.get(key)
        assert found is None or torch.equal(found.frames, outputs_of(index).frames)
        cache.put(key, outputs_of(index))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as the loader's workers are made
def test_two_processes_write_the_same_clips_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hammer, args=(tmp_path, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    cache = TowerCache(tmp_path, {"towers": 1})
    assert all(torch.equal(cache.get(f"{i:064x}").frames, outputs_of(i).frames) for i in range(30))
    assert len(files(tmp_path)) == 30 and not list(tmp_path.rglob("*.partial"))


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    cache = TowerCache(tmp_path, {})
    cache.put("ab" * 32, outputs_of(0))
    old, new = (files(tmp_path)[0].with_name(f"{name}.partial") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    TowerCache(tmp_path, {})
    assert not old.exists() and new.exists() and cache.get("ab" * 32) is not None


# Keys


def settings_of(model: ReLLMForConditionalGeneration, **options) -> dict[str, object]:
    return cache_settings(model.base_model, tiny_processor(model.config, **options).feature_extractor)


def test_other_towers_have_another_folder_and_the_rest_of_the_model_has_none(tmp_path: Path) -> None:
    model = tiny_model()
    plain = settings_of(model)
    assert settings_of(model, full_window=True) != plain
    assert settings_of(tiny_model(window_s=3.0)) != plain
    assert settings_of(tiny_model().bfloat16()) != plain
    assert settings_of(tiny_model(fusion="none")) != plain
    for weight in (model.model.audio_tower.layers[0].fc2.bias, model.model.emotion_tower.classifier.dense.bias):
        with torch.no_grad():
            weight[3] += 1
        assert settings_of(model) != plain
        with torch.no_grad():
            weight[3] -= 1
    with torch.no_grad():
        model.model.multi_modal_projector.fc1.weight.add_(1)
    model.save_pretrained(tmp_path / "model")
    assert settings_of(ReLLMForConditionalGeneration.from_pretrained(tmp_path / "model")) == plain
    config = model.config.emotion_config.encoder_config
    config.layer_norm_eps *= 2
    assert settings_of(model) != plain


def test_with_other_towers_nothing_stale_is_read(tmp_path: Path, rows) -> None:
    model = tiny_model()
    settings = {"eval_rows": rows, "tower_cache_dir": str(tmp_path / "cache")}
    before = make_trainer(rows, tmp_path / "run", tiny_processor(), model, **settings).evaluate()
    with torch.no_grad():
        model.model.audio_tower.layers[0].fc1.weight.mul_(1.5)
    found = make_trainer(rows, tmp_path / "run", tiny_processor(), model, **settings).evaluate()
    expected = make_trainer(rows, tmp_path / "run", tiny_processor(), model, eval_rows=rows).evaluate()
    assert found["eval_tower_cache_hits"] == 0 and found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["eval_loss"] != pytest.approx(before["eval_loss"], rel=1e-3)
    assert len(list((tmp_path / "cache").glob("*/settings.json"))) == 4  # a pair, and its speech tower


@pytest.mark.parametrize("fusion", ["concat", "none"])
def test_beside_another_emotion_tower_or_none_the_speech_tower_does_not_run_again(
    tmp_path: Path, rows, fusion: str, monkeypatch
) -> None:
    """Also where some clips are new: then all of their batch are heard."""
    settings = {"eval_rows": rows, "tower_cache_dir": str(tmp_path / "cache"), "per_device_eval_batch_size": 4}
    make_trainer(rows, tmp_path / "run", tiny_processor(), tiny_model(), **settings).evaluate()
    other = tiny_model(fusion=fusion)
    if fusion == "concat":
        with torch.no_grad():
            other.model.emotion_tower.classifier.dense.weight.mul_(1.5)
            other.model.emotion_tower.encoder.encoder.layer_norm.weight.mul_(1.5)
    processor = tiny_processor(other.config)
    expected = make_trainer(rows, tmp_path / "run", processor, other, eval_rows=rows).evaluate()
    trainer = make_trainer(rows, tmp_path / "run", processor, other, **settings)
    ran: list[int] = []
    other.model.audio_tower.layers[0].register_forward_hook(lambda *_: ran.append(1))
    found = trainer.evaluate()
    assert not ran
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert found["eval_tower_cache_hits"] == (fusion == "none")
    speech = trainer._tower_cache.speech or trainer._tower_cache
    files(speech.folder)[0].unlink()
    again = trainer.evaluate()
    assert ran and again["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert trainer.evaluate()["eval_tower_cache_hits"] == 1


def test_a_clip_that_changed_under_its_name_is_another(tmp_path: Path, rows) -> None:
    settings = {"tower_cache_dir": str(tmp_path / "cache"), "eval_rows": rows}
    trainer = make_trainer(rows, tmp_path / "run", tiny_processor(), **settings)
    trainer.evaluate()
    samples, rate = soundfile.read(rows[0]["audio"], dtype="float32")
    samples[100] += 2**-15
    soundfile.write(rows[0]["audio"], samples, rate, subtype="PCM_16")
    metrics = trainer.evaluate()
    expected = make_trainer(rows, tmp_path / "run", tiny_processor(), eval_rows=rows).evaluate()
    assert metrics["eval_tower_cache_hits"] == 7 / 8
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert clip_key(np.zeros(3, np.float32)) != clip_key(np.zeros(4, np.float32))


# Settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"unfreeze": ["audio_tower"]}, r"for frozen towers, and unfreeze has \['audio_tower'\]"),
        ({"augment_telephone": True}, "augmented clips are never heard twice"),
        ({"bf16_full_eval": True}, "bf16_full_eval gives the towers another precision"),
    ],
)
def test_settings_that_would_give_wrong_numbers_are_refused(tmp_path: Path, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReLLMSFTConfig(output_dir=str(tmp_path), use_cpu=True, tower_cache_dir=str(tmp_path / "cache"), **settings)


def test_models_and_collators_that_would_give_wrong_numbers_are_refused(tmp_path: Path, rows) -> None:
    processor = tiny_processor()
    cache = {"tower_cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match="with projector_masking=False"):
        make_trainer(rows, tmp_path / "run", processor, tiny_model(projector_masking=False), **cache)
    trainer = make_trainer(rows, tmp_path / "run", processor, **cache)
    with pytest.raises(ValueError, match="data_collator is a function, and only a ReLLMCollator"):
        ReLLMSFTTrainer(
            model=trainer.model,
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            processing_class=processor,
            data_collator=lambda batch: ReLLMCollator(processor, EMOTIONS)(batch),
        )


def test_a_run_says_where_the_cache_is_and_what_is_free(tmp_path: Path, rows, monkeypatch, capfd) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=12_300_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    folder = tmp_path / "cache"
    trainer = train(rows, tmp_path / "run", tower_cache_dir=str(folder), max_steps=1, disable_tqdm=False)
    printed = "".join(capfd.readouterr().err.split())
    assert f"Toweroutputsarekeptin{trainer._tower_cache.folder}:12.3GBarefreethere." in printed
