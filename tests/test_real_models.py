"""Pretrained Whisper tiny.en and SmolLM2-135M-Instruct, and recorded human speech: `make test-real REAL_MODELS=DIR`.

Nothing is downloaded. RELLM_REAL_MODELS names a folder with both models as Hugging Face directories; where the
recordings are looked for is in `benchmarks/real_models.py`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import clip, fill_lora, tiny_emotion_config
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperModel

import relllm
from relllm import ReLLMEmotionModel, ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.processing.turns_relllm import build_chat_template
from relllm.training.building import four_bit_config, quantize_llm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from real_models import (
    MODES,
    Speech,
    encode,
    find_speech,
    load_whisper,
    model_folder,
    nats_per_token,
    transcribe,
    word_error_rate,
)

WHISPER, LLM = model_folder("whisper-tiny.en"), model_folder("SmolLM2-135M-Instruct")
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        WHISPER is None or LLM is None,
        reason="RELLM_REAL_MODELS names no folder with whisper-tiny.en and SmolLM2-135M-Instruct",
    ),
]
QUESTION = "What is the capital of France?"
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def build(folder: Path, **options) -> ReLLMForConditionalGeneration:
    """Both towers, a random emotion tower, and a LoRA that acts."""
    torch.manual_seed(0)
    model = ReLLMForConditionalGeneration.from_towers(
        audio=WHISPER, text=LLM, emotion=folder, dtype=torch.float32, lora={"r": 4, "lora_alpha": 8}, **options
    ).eval()
    fill_lora(model, std=0.02)
    return model


@pytest.fixture(scope="module")
def emotion(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emotion-tower")
    torch.manual_seed(3)
    ReLLMEmotionModel(tiny_emotion_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(emotion) -> ReLLMForConditionalGeneration:
    return build(emotion)


@pytest.fixture(scope="module")
def processor(model) -> ReLLMProcessor:
    return ReLLMProcessor.from_config(model.config, str(LLM), full_window=False)


@pytest.fixture(scope="module")
def speech():
    found = find_speech()
    if not found:
        pytest.skip("no recordings: RELLM_REAL_SPEECH (pocketsphinx's test/data), asterisk-core-sounds-en-wav")
    return found


@pytest.fixture(scope="module")
def whisper():
    return load_whisper(WHISPER)


def same_reply(one: ReLLMForConditionalGeneration, other: ReLLMForConditionalGeneration, inputs) -> bool:
    return torch.equal(one.generate(**inputs, **GREEDY), other.generate(**inputs, **GREEDY))


def test_replies_to_text_are_the_bare_models_token_for_token(model, processor):
    """The LoRA acts, at audio positions only; the chat template is the same text."""
    tokenizer = AutoTokenizer.from_pretrained(LLM)
    template = build_chat_template(tokenizer)
    bare = AutoModelForCausalLM.from_pretrained(LLM, dtype=torch.float32).eval()
    for question in (QUESTION, "Write one sentence about the sea.", "How many days has a week?"):
        turns = [{"role": "user", "content": question}]
        ours = processor.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        theirs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
        reply = model.generate(**ours, max_new_tokens=24, do_sample=False)
        assert torch.equal(reply, bare.generate(**theirs, max_new_tokens=24, do_sample=False))
    assert "Paris" in ask(model, processor)


def ask(model, processor) -> str:
    turns = [{"role": "user", "content": QUESTION}]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, add_generation_prompt=True)
    reply = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return processor.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_speech_tower_is_whispers_encoder(model, whisper):
    audio = clip(4.0)
    theirs = WhisperModel.from_pretrained(WHISPER, dtype=torch.float32).get_encoder().eval()
    features = WhisperFeatureExtractor.from_pretrained(WHISPER)(audio, sampling_rate=16_000, return_tensors="pt")
    full = ReLLMProcessor.from_config(model.config, str(LLM)).feature_extractor([audio])
    assert torch.allclose(full["input_features"], features.input_features, atol=1e-5)
    with torch.no_grad():
        expected = theirs(features.input_features).last_hidden_state
        heard = model.model.run_towers(full["input_features"], full["input_features_mask"], full["input_values"])
    assert heard.frames.shape[1] == 200
    torch.testing.assert_close(heard.frames, expected[:, :200], atol=2e-4, rtol=1e-4)


def test_recorded_speech_is_transcribed_through_our_tower_and_the_cheap_mode_costs_words(speech, whisper):
    """The whole window is Whisper as it was made. The two others are compared in `docs/real.md`."""
    for part in speech:
        few = Speech(part.name, part.clips[:10], part.texts[:10])
        heard = {mode: transcribe(*whisper, few.clips, mode) for mode in MODES}
        errors = {mode: word_error_rate(few.texts, heard[mode], cut=True) for mode in MODES}
        nats = {mode: nats_per_token(*whisper, few, mode) for mode in MODES}
        print(f"{few.name}: word error rate {errors}, nats a token {nats}")
        assert word_error_rate(few.texts, heard[MODES[0]]) < 0.25
        assert all(errors[mode] < 0.5 for mode in MODES)
        assert abs(nats[MODES[2]] - nats[MODES[1]]) < 0.5


def test_our_tower_over_the_whole_window_is_what_whisper_itself_transcribes(speech, whisper):
    model, processor = whisper
    for waveform in speech[0].clips[:2]:
        features = processor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
        expected = model.get_encoder()(features).last_hidden_state
        torch.testing.assert_close(encode(model, waveform, MODES[0]), expected, atol=2e-4, rtol=1e-4)


def test_a_full_and_a_light_checkpoint_reply_alike(model, processor, tmp_path):
    inputs = processor.apply_request(clip(2.0))
    model.save_pretrained(tmp_path / "full")
    model.base_model.freeze()
    model.save_pretrained(tmp_path / "light", light=True)
    sizes = {form: (tmp_path / form / "model.safetensors").stat().st_size for form in ("full", "light")}
    assert sizes["full"] > 560e6
    loaded = {form: AutoModel.from_pretrained(tmp_path / form).eval() for form in ("full", "light")}
    assert same_reply(model, loaded["full"], inputs) and same_reply(model, loaded["light"], inputs)
    # projector and LoRA; and all of the embeddings, because a token for audio makes them one row longer
    assert sizes["light"] < 170e6


def test_remote_code_replies_alike_in_a_process_without_the_package(model, processor, tmp_path):
    relllm.register_for_auto_class()
    try:
        model.save_pretrained(tmp_path / "code")
        processor.save_pretrained(tmp_path / "code")
    finally:
        relllm.register_for_auto_class(False)
    waveform = clip(2.0)
    np.save(tmp_path / "clip.npy", waveform)
    child = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "relllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import numpy, torch
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = processor.apply_request(numpy.load(sys.argv[2]))
print(json.dumps(model.generate(**inputs, do_sample=False, max_new_tokens=12)[0].tolist()))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", child, str(tmp_path / "code"), str(tmp_path / "clip.npy")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == model.generate(**processor.apply_request(waveform), **GREEDY)[0].tolist()


def test_in_bfloat16_it_knows_the_capital_and_hears_about_the_same(model, processor, emotion):
    small = build(emotion).to(torch.bfloat16)
    assert "Paris" in ask(small, processor)
    inputs = processor.feature_extractor([clip(3.0)])
    inputs.pop("num_audio_tokens")
    with torch.no_grad():
        exact, near = (m.get_audio_features(**inputs).pooler_output.float() for m in (model, small))
    assert torch.nn.functional.cosine_similarity(exact, near, dim=-1).min() > 0.99


def test_with_the_llm_in_four_bit_it_knows_the_capital(processor, emotion, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install relllm[quantized]")
    small = quantize_llm(build(emotion), four_bit_config(torch.float32)).eval()
    layer = small.model.text_model.model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Linear4bit" and layer.base_layer.weight.dtype == torch.uint8
    assert small.model.audio_tower.layers[0].fc1.weight.dtype == torch.float32
    assert "Paris" in ask(small, processor)
    inputs = processor.apply_request(clip(2.0))
    reply = small.generate(**inputs, **GREEDY)
    small.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).eval().generate(**inputs, **GREEDY), reply)


def test_a_batch_of_ragged_clips_replies_as_one_by_one(model, processor):
    clips = [clip(seconds, seed=index) for index, seconds in enumerate((0.7, 3.1, 5.0))]
    batch = processor.apply_request(clips)
    replies = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for waveform, reply in zip(clips, replies, strict=True):
        alone = processor.apply_request(waveform)
        expected = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        length = len(expected)
        assert torch.equal(reply[:length], expected)


def test_beams_find_a_reply_at_least_as_likely_as_the_greedy_one(model, processor):
    inputs = processor.apply_request(clip(2.0))
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    scores = []
    for beams in (1, 4):
        reply = model.generate(**inputs, num_beams=beams, **options)
        whole = {**inputs, "input_ids": reply, "attention_mask": torch.ones_like(reply)}
        with torch.no_grad():
            logits = model(**whole).logits[0, length - 1 : -1].log_softmax(-1)
        scores.append(float(logits.gather(-1, reply[0, length:, None]).sum()))
    assert scores[1] >= scores[0] - 1e-3


def test_two_minutes_of_audio_are_windows_and_get_a_reply(model, processor):
    inputs = processor.apply_request(np.tile(clip(30.0), 4)[:-1])
    assert inputs["audio_num_windows"].tolist() == [4]
    assert int((inputs["input_ids"] == processor.audio_token_id).sum()) == 4 * 188
    reply = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert reply.shape[1] > inputs["input_ids"].shape[1]
