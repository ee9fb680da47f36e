"""`from_towers`: pretrained parts go in bit for bit, whatever their kind, and come out of a saved model unchanged."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_models import (
    LLM_FAMILIES,
    LORA,
    SPEECH_TOWERS,
    WAVEFORM_TOWERS,
    clip,
    conversation_inputs,
    tiny_emotion_tower,
    tiny_llm,
    tiny_speech_tower,
    tiny_tokenizer,
    user_turn,
)
from transformers import AutoModel

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.modeling.checkpoint_relllm import find_commit

# WavLM's own attention, on a padded batch
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
TEXT_IDS = torch.tensor([[1, 40, 41, 42, 43, 2]])


def build(
    speech: str = "whisper", family: str = "llama", *, tied: bool = False, emotion: str | None = "wav2vec2", **kw
):
    """The model and the parts that it was built from."""
    audio, text = tiny_speech_tower(speech, layers=2), tiny_llm(family, tied=tied, layers=2)
    emotion_tower = tiny_emotion_tower(emotion) if emotion else None
    options = {"lora": LORA, "tokenizer": tiny_tokenizer(), "projector_inner_dim": 16, **kw}
    model = ReLLMForConditionalGeneration.from_towers(audio, text, emotion_tower, **options)
    return model.eval(), audio, text, emotion_tower


def bare_names(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state dict without the LoRA's own tensors and without its `base_layer` level."""
    state = module.state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if "lora_" not in name}


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    found_state, expected_state = bare_names(found), bare_names(expected)
    assert found_state.keys() == expected_state.keys()
    assert all(torch.equal(found_state[name], expected_state[name]) for name in expected_state)


@pytest.mark.parametrize("speech", SPEECH_TOWERS)
def test_every_speech_tower_keeps_its_weights_and_hears_a_clip(speech: str) -> None:
    model, audio, text, emotion = build(speech)
    assert_same_weights(model.model.audio_tower, audio.get_encoder() if speech == "whisper" else audio)
    assert_same_weights(model.model.emotion_tower, emotion)
    assert_same_weights(model.model.text_model, text)
    processor = ReLLMProcessor.from_config(model.config, tiny_tokenizer(), full_window=False)
    inputs = conversation_inputs(processor, [[user_turn("Listen: ", clip(0.5))], [user_turn(clip(0.8))]])
    outputs = model(**inputs)
    assert outputs.logits.isfinite().all() and outputs.emotion_logits.shape == (2, 5)


@torch.no_grad()
@pytest.mark.parametrize("emotion", WAVEFORM_TOWERS)
def test_every_emotion_tower_keeps_its_weights_and_its_reading(emotion: str) -> None:
    model, _, _, tower = build(emotion=emotion)
    assert_same_weights(model.model.emotion_tower, tower)
    values = torch.from_numpy(clip(0.5))[None]
    audio = model.get_audio_features(torch.randn(1, 16, 50), input_values=values)
    assert torch.equal(audio.tower_dimensions, tower(values).dimensions)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_every_llm_answers_text_exactly_as_it_does_alone_also_after_saving(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model, _, text, _ = build(family=family, tied=tied)
    expected = text(TEXT_IDS).logits
    assert torch.equal(model(input_ids=TEXT_IDS).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=TEXT_IDS).logits, expected)
    text_model = loaded.model.text_model
    shared = text_model.get_input_embeddings().weight is text_model.get_output_embeddings().weight
    assert shared == tied
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_greedy_text_replies_are_those_of_the_bare_llm(family: str) -> None:
    model, _, text, _ = build(family=family)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = text.generate(TEXT_IDS, suppress_tokens=[model.config.audio_token_id], **options)
    assert torch.equal(model.generate(input_ids=TEXT_IDS, **options), expected)


@pytest.mark.parametrize("speech", ["whisper", "wavlm"])
def test_directories_give_the_same_model_as_loaded_towers(speech: str, tmp_path: Path) -> None:
    model, audio, text, emotion = build(speech)
    for name, part in {"audio": audio, "text": text, "emotion": emotion}.items():
        part.save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    loaded = ReLLMForConditionalGeneration.from_towers(
        tmp_path / "audio", tmp_path / "text", tmp_path / "emotion", lora=LORA, projector_inner_dim=16
    )
    towers = ("audio_tower", "emotion_tower", "text_model")
    assert all(getattr(loaded.model, name).training is False for name in towers[:2])
    for name in towers:
        assert_same_weights(getattr(loaded.model, name), getattr(model.model, name))
    assert loaded.config.audio_token_id == model.config.audio_token_id


def test_a_fresh_lora_starts_at_zero_and_alone_trains_in_the_llm() -> None:
    model, *_ = build()
    b = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert b and all((parameter == 0).all() for parameter in b)
    a = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
    assert all(parameter.std() > 0 for parameter in a)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prefixes = ("model.multi_modal_projector.", "model.emotion_head.", "model.dimension_head.")
    assert all(name.startswith(prefixes) or "lora_" in name for name in trained)
    assert all(any(name.startswith(prefix) for name in trained) for prefix in prefixes)


def test_a_peft_config_and_a_dict_give_the_same_lora(tmp_path: Path) -> None:
    settings = {"r": 6, "lora_alpha": 12, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    from_dict, *_ = build(lora=settings)
    from_peft, *_ = build(lora=LoraConfig(task_type="CAUSAL_LM", **settings))
    assert settings.items() <= from_dict.config.lora_config.items() <= from_peft.config.lora_config.items()
    assert from_peft.state_dict().keys() == from_dict.state_dict().keys()
    layer = from_peft.model.text_model.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"relllm": 2.0} and layer.lora_A["relllm"].out_features == 6
    from_peft.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.lora_config == from_peft.config.lora_config


def test_without_a_lora_and_without_an_emotion_tower_it_is_the_speech_llm_baseline() -> None:
    model, *_ = build(emotion=None, lora=None)
    assert model.config.emotion_fusion == "none" and model.model.emotion_tower is None
    assert not any("lora_" in name for name in model.state_dict())
    processor = ReLLMProcessor.from_config(model.config, tiny_tokenizer())
    inputs = conversation_inputs(processor, [user_turn(clip(0.5))])
    assert "input_values" not in inputs
    assert model(**inputs).emotion_embedding is None


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_tokenizer_that_fills_the_vocabulary_gets_one_more_row_for_the_audio_token(
    tied: bool, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(audio_token=False)
    text = tiny_llm(tied=tied, vocab_size=len(tokenizer))
    expected = text(TEXT_IDS).logits
    model = ReLLMForConditionalGeneration.from_towers(
        tiny_speech_tower("whisper"), text, tiny_emotion_tower(), lora=LORA, tokenizer=tokenizer
    ).eval()
    assert model.config.audio_token_id == 300 and model.config.text_config.vocab_size == 301
    processor = ReLLMProcessor.from_config(model.config, tokenizer)
    assert processor.audio_token_id == 300
    inputs = conversation_inputs(processor, [user_turn(clip(0.5))])
    model.save_pretrained(tmp_path)
    for candidate in (model, AutoModel.from_pretrained(tmp_path)):
        logits = candidate(input_ids=TEXT_IDS).logits
        assert logits.shape[-1] == 301
        torch.testing.assert_close(logits[..., :300], expected, rtol=0, atol=1e-6)
        assert (candidate.generate(**inputs, max_new_tokens=8, do_sample=True)[:, -8:] != 300).all()


def test_bfloat16_towers_give_a_bfloat16_model_that_trains_in_float32() -> None:
    model, *_ = build(dtype=torch.bfloat16)
    dtypes = {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()}
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)} and model.dtype == torch.bfloat16
    model, *_ = build()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_loaded_llm_needs_its_tokenizer() -> None:
    with pytest.raises(ValueError, match="Pass tokenizer="):
        ReLLMForConditionalGeneration.from_towers(tiny_speech_tower("whisper"), tiny_llm())


def test_loaded_towers_share_their_weights_with_the_model_and_keep_their_configs() -> None:
    audio, text, emotion = tiny_speech_tower("hubert"), tiny_llm(), tiny_emotion_tower()
    configs = [part.config.to_dict() for part in (audio, text, emotion)]
    model = ReLLMForConditionalGeneration.from_towers(audio, text, emotion, lora=LORA, tokenizer=tiny_tokenizer())
    model.resize_token_embeddings(400, mean_resizing=False)
    assert [part.config.to_dict() for part in (audio, text, emotion)] == configs
    mlp = model.model.text_model.model.layers[0].mlp.up_proj.base_layer.weight
    assert mlp.data_ptr() == text.model.layers[0].mlp.up_proj.weight.data_ptr()


def test_towers_of_the_hub_are_recorded_with_their_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, tower in (("speech", tiny_speech_tower("whisper")), ("llm", tiny_llm())):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / commit
        tower.save_pretrained(snapshot)
        if name == "llm":
            tiny_tokenizer().save_pretrained(snapshot)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = ReLLMForConditionalGeneration.from_towers("org/speech", "org/llm", lora=LORA)
    assert model.config.towers == {
        "audio_tower": {"name": "org/speech", "revision": commit},
        "text_model": {"name": "org/llm", "revision": commit},
    }
    assert find_commit("org/absent") is None and find_commit(tmp_path) is None and find_commit("/gone/a/b") is None
