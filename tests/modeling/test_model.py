"""The model's forward pass and its configuration: shapes, padding, precision, freezing, compilation, validation."""

import functools
import shutil
from collections.abc import Callable

import pytest
import torch
from tiny_models import (
    LLM_FAMILIES,
    LORA,
    audio_inputs,
    clip,
    conversation_inputs,
    tiny_audio_config,
    tiny_config,
    tiny_emotion_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    user_turn,
)
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedConfig, StaticCache
from transformers.utils import ModelOutput

from relllm import ReLLMConfig, ReLLMEmotionConfig, ReLLMForConditionalGeneration, ReLLMModel
from relllm.modeling.releases_relllm import CACHE

CONVERSATIONS = (
    [user_turn("Listen: ", clip(0.5), " and ", clip(2.7, seed=1))],  # two clips, the second in two windows
    [user_turn(clip(0.9, seed=2))],
)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return dict(conversation_inputs(tiny_processor(), list(CONVERSATIONS)))


def valid_positions(output: ModelOutput) -> list[Tensor]:
    """The projected positions of each window, without the padding."""
    return [window[:length] for window, length in zip(output.audio_hidden_states, output.audio_lengths, strict=True)]


# --- outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("projector", ["conv", "conv-layers"])
@pytest.mark.parametrize("fusion", ["concat", "token", "none"])
def test_a_row_gives_the_same_numbers_alone_and_in_a_padded_batch(fusion: str, projector: str) -> None:
    config = tiny_config(
        layers=2, fusion=fusion, projector_layers=int(projector == "conv-layers"), projector_ffn_dim=20
    )
    model, processor = tiny_model(config), tiny_processor(config)
    batch = conversation_inputs(processor, list(CONVERSATIONS))
    together = model(**batch)
    rows = [model(**conversation_inputs(processor, conversation)) for conversation in CONVERSATIONS]
    for index, row in enumerate(rows):
        logits = together.logits[index, -row.logits.shape[1] :]
        torch.testing.assert_close(logits, row.logits[0], rtol=1e-4, atol=5e-5)
    for name in ("emotion_logits", "dimensions", "emotion_embedding", "tower_dimensions", "audio_lengths"):
        if expected := [row[name] for row in rows if name in row]:
            torch.testing.assert_close(together[name], torch.cat(expected), rtol=1e-4, atol=5e-5)
    expected = [window for row in rows for window in valid_positions(row)]
    for window, alone in zip(valid_positions(together), expected, strict=True):
        torch.testing.assert_close(window, alone, rtol=1e-4, atol=5e-5)
    assert together.emotion_logits.shape == (3, 5) and together.dimensions.shape == (3, 3)
    assert (together.emotion_embedding is None) == (fusion == "none")


@torch.no_grad()
def test_every_output_follows_from_its_parts_written_out(model, inputs) -> None:
    body = model.model
    features = model.get_audio_features(**audio_inputs(inputs))
    assert torch.equal(torch.cat(valid_positions(model(**inputs))), features.pooler_output)
    assert (inputs["input_ids"] == model.config.audio_token_id).sum() == len(features.pooler_output)
    lone = conversation_inputs(tiny_processor(), [user_turn(clip(2.7, seed=1))])
    output = model.get_audio_features(**audio_inputs(lone))
    pooled = output.pooler_output.mean(0)  # over the clip's positions, both windows
    torch.testing.assert_close(output.emotion_logits[0], body.emotion_head.weight @ pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.dimensions[0], body.dimension_head.weight @ pooled, rtol=1e-4, atol=1e-5)
    windows = [body.emotion_tower(lone["input_values"][[i]], lone["input_values_mask"][[i]]) for i in range(2)]
    frames = [(int(length) - 1) // 2 + 1 for length in lone["input_features_mask"].sum(-1)]
    share = torch.tensor(frames) / sum(frames)
    expected = sum(weight * window.embedding[0] for weight, window in zip(share, windows, strict=True))
    torch.testing.assert_close(output.emotion_embedding[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_shifted_cross_entropy_over_the_labelled_tokens(model, inputs) -> None:
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    output = model(**inputs, labels=labels)
    logits = output.logits[:, :-1].reshape(-1, output.logits.shape[-1])
    expected = nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(output.loss, expected)
    summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(3)).loss
    torch.testing.assert_close(summed, expected * 12 / 3)


@torch.no_grad()
def test_the_base_model_gives_the_hidden_states_behind_the_logits(model, inputs) -> None:
    hidden = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**inputs).logits, rtol=1e-4, atol=1e-5)
    last = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(last, model(**inputs).logits[:, -1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tuples_hidden_states_and_attentions_come_on_request(model, inputs) -> None:
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(model(**inputs, return_dict=False)[0], output.logits)


@torch.no_grad()
@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_sdpa_and_eager_attention_agree_on_valid_positions(family: str, inputs) -> None:
    model = tiny_model(layers=2, text=family)
    valid = inputs["attention_mask"].bool()
    model.set_attn_implementation("sdpa")
    sdpa = model(**inputs)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True)
    torch.testing.assert_close(sdpa.logits[valid], eager.logits[valid], rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(sdpa.emotion_logits, eager.emotion_logits, rtol=1e-4, atol=5e-5)
    assert len(eager.attentions) == 2


@torch.no_grad()
def test_bfloat16_stays_near_float32(inputs) -> None:
    config = tiny_config(layers=2)
    exact = tiny_model(config)
    rounded = tiny_model(config).to(torch.bfloat16)
    output = rounded(**inputs)
    assert output.logits.dtype == torch.bfloat16
    valid = inputs["attention_mask"].bool()
    expected = exact(**inputs).logits[valid]
    assert (output.logits.float()[valid] - expected).abs().mean() < 0.05 * expected.std()
    assert rounded.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_input_features_without_input_values_are_refused_with_an_emotion_tower(model, inputs) -> None:
    with pytest.raises(ValueError, match="input_features came without input_values"):
        model(**{**inputs, "input_values": None})
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


# --- freezing and modes ----------------------------------------------------------------------------------------------


def test_training_mode_leaves_frozen_towers_in_eval_and_a_thawed_one_follows() -> None:
    model = tiny_model(layers=2)
    model.train()
    assert not any(module.training for module in model.model.audio_tower.modules())
    assert not any(module.training for module in model.model.emotion_tower.modules())
    assert model.model.text_model.training and model.model.multi_modal_projector.training
    model.model.emotion_tower.requires_grad_(True)
    assert model.train().model.emotion_tower.training and not model.model.audio_tower.training
    assert not model.eval().model.emotion_tower.training


def test_only_projector_heads_and_lora_get_gradients(inputs) -> None:
    model = tiny_model(layers=2).train()
    output = model(**inputs, labels=inputs["input_ids"])
    (output.loss + output.emotion_logits.square().sum() + output.dimensions.square().sum()).backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    prefixes = ("model.multi_modal_projector.", "model.emotion_head.", "model.dimension_head.")
    assert found == {name for name, _ in model.named_parameters() if name.startswith(prefixes) or "lora_" in name}


def test_thawed_towers_learn() -> None:
    config = tiny_config(layers=2)
    config.audio_config.encoder_layerdrop = 0.0
    model = tiny_model(config)
    model.model.audio_tower.requires_grad_(True)
    inputs = conversation_inputs(tiny_processor(), list(CONVERSATIONS))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    learned = [p for name, p in model.model.audio_tower.named_parameters() if "embed_positions" not in name]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in learned if parameter.ndim > 1)
    assert all(parameter.grad is None for parameter in model.model.emotion_tower.parameters())


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_decoder_follows_the_lora_mask_without_a_graph_break() -> None:
    config = tiny_config(layers=2)
    config.text_config.num_hidden_layers = 1
    model = tiny_model(config)
    decoder, scope = model.model.get_decoder(), model.model.lora_scope
    embeddings = torch.randn(1, 6, 40)
    at = [torch.tensor([[0, 1, 1, 0, 0, 0]]).bool(), torch.tensor([[0, 0, 0, 0, 1, 1]]).bool()]
    masks = [*at, torch.zeros_like(at[0]), None, True, at[0], None]
    torch.compiler.reset()
    compiled = torch.compile(decoder.forward, backend="eager", fullgraph=True)
    found, expected = [], []
    for mask in masks:
        with scope.use(mask):
            expected.append(decoder(inputs_embeds=embeddings).last_hidden_state)
            found.append(compiled(inputs_embeds=embeddings).last_hidden_state)
    for hidden, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(hidden, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(expected[2], expected[3]) and not torch.allclose(expected[0], expected[1], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_both_names_whatever_the_release(model, name: str) -> None:
    row = dict(conversation_inputs(tiny_processor(), CONVERSATIONS[1]))
    whole = {**row, "input_ids": torch.cat([row["input_ids"], torch.tensor([[40, 41]])], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    expected = model(**whole).logits[:, -2:]
    for part in (model, model.model):
        cache = DynamicCache(config=model.config.get_text_config())
        outputs = part(**row, **{name: cache})
        assert getattr(outputs, CACHE) is cache
        step = {"attention_mask": whole["attention_mask"], "input_ids": whole["input_ids"][:, -2:]}
        torch.testing.assert_close(model(**step, **{name: cache}).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_decode_step_with_a_static_cache_compiles_as_one_graph(model) -> None:
    row = dict(conversation_inputs(tiny_processor(), CONVERSATIONS[1]))
    length = row["input_ids"].shape[1]
    past = [StaticCache(model.config.get_text_config(), max_cache_len=length + 2) for _ in range(2)]
    torch.compiler.reset()
    runs = [model.forward, torch.compile(model.forward, backend="eager", fullgraph=True)]
    logits = []
    for cache, run in zip(past, runs, strict=True):
        model(**row, past_key_values=cache)
        step = {
            "attention_mask": torch.ones(1, length + 1, dtype=torch.long),
            "position_ids": torch.tensor([[length]]),
        }
        logits.append(run(input_ids=torch.tensor([[40]]), past_key_values=cache, **step).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["conv", "conv-layers"])
def test_projecting_placing_and_the_llm_compile_as_one_graph(projector: str) -> None:
    config = tiny_config(layers=2, projector_layers=int(projector == "conv-layers"), projector_ffn_dim=20)
    config.text_config.num_hidden_layers = 1
    model = tiny_model(config)
    batch = conversation_inputs(tiny_processor(config), list(CONVERSATIONS))
    heard = {name: batch.pop(name) for name in audio_inputs(batch) if name != "audio_num_windows"}
    with torch.no_grad():
        given = {**batch, "tower_outputs": model.model.run_towers(**heard)}
    torch.compiler.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    results = []
    for run in (model.forward, compiled):
        model.zero_grad()
        output = run(**given, labels=batch["input_ids"])
        (output.loss + output.emotion_logits.square().mean()).backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append({"logits": output.logits[batch["attention_mask"].bool()], **gradients})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="Inductor needs a C compiler.")
@torch.no_grad()
def test_inductor_compiles_the_decoder(inputs) -> None:
    config = tiny_config(layers=2)
    config.text_config.num_hidden_layers = 1
    model = tiny_model(config)
    expected = model(**inputs).logits
    decoder = model.model.get_decoder()
    torch.compiler.reset()
    decoder.forward = torch.compile(decoder.forward, fullgraph=True)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[valid], expected[valid], rtol=1e-4, atol=5e-5)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_a_configuration_is_made_without_writing_out_its_towers(monkeypatch) -> None:
    """As the validation does for a message of what a tower's configuration is not: half of the time it took."""

    def refuse(config: PreTrainedConfig) -> str:
        raise AssertionError(f"A {type(config).__name__} was written out.")

    monkeypatch.setattr(PreTrainedConfig, "__repr__", refuse)
    assert tiny_config(layers=2).emotion_config.encoder_config.hidden_size == 24


def with_adapter() -> PreTrainedConfig:
    config = tiny_audio_config("wav2vec2")
    config.add_adapter = True
    return config


REFUSED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "speech tower of another kind": (
        lambda: ReLLMConfig(audio_config=tiny_text_config(), emotion_fusion="none"),
        "audio_config must be of one of the kinds.*'llama'",
    ),
    "speech tower with an adapter": (
        lambda: ReLLMConfig(audio_config=with_adapter(), emotion_fusion="none"),
        "audio_config has add_adapter=True",
    ),
    "emotion encoder of another kind": (
        lambda: ReLLMEmotionConfig(encoder_config=tiny_audio_config("whisper")),
        "encoder_config must be of one of the kinds.*'whisper'",
    ),
    "emotion labels in another order": (
        lambda: ReLLMEmotionConfig(id2label={0: "valence", 1: "arousal", 2: "dominance"}),
        "must be .*in this order",
    ),
    "fusion without a tower": (lambda: ReLLMConfig(emotion_fusion="concat"), "needs an emotion_config"),
    "tower without fusion": (
        lambda: ReLLMConfig(emotion_config=tiny_emotion_config(), emotion_fusion="none"),
        "takes no emotion_config",
    ),
    "even kernel": (functools.partial(tiny_config, projector_kernel_sizes=[5, 4, 5]), "odd and positive.*4"),
    "no kernel": (functools.partial(tiny_config, projector_kernel_sizes=[]), "odd and positive"),
    "heads do not divide the bottleneck": (
        lambda: ReLLMConfig(emotion_fusion="none", projector_inner_dim=20, projector_layers=1),
        r"projector_inner_dim \(20\) must be a multiple of projector_heads \(8\)",
    ),
    "negative audio token": (lambda: ReLLMConfig(emotion_fusion="none", audio_token_id=-1), "audio_token_id.*-1"),
    "no emotion labels": (lambda: ReLLMConfig(emotion_fusion="none", emotion_labels=[]), "emotion_labels must be"),
    "emotion labels twice": (
        lambda: ReLLMConfig(emotion_fusion="none", emotion_labels=["sad", "sad"]),
        "emotion_labels must be distinct",
    ),
    "rank zero": (lambda: ReLLMConfig(emotion_fusion="none", lora_config={"r": 0}), r"lora_config\['r'\].*0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_configuration_refuses(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "value"), [("emotion_fusion", "add"), ("lora_scope", "speech"), ("projector_type", "mlp")]
)
def test_a_choice_outside_the_list_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(Exception, match=rf"(?s){name}.*{value}"):
        ReLLMConfig(**{"emotion_fusion": "none", name: value})


def test_a_bare_configuration_has_the_papers_sizes() -> None:
    config = ReLLMConfig(emotion_fusion="none")
    assert config.projector_kernel_sizes == [5, 5, 5] and config.projector_inner_dim == 512
    assert config.lora_scope == "audio" and config.emotion_labels == ["neutral", "happy", "angry", "sad", "surprise"]
    assert config.audio_config.model_type == "whisper" and config.text_config.model_type == "llama"


def test_auto_model_builds_the_generation_class_from_a_config() -> None:
    config = tiny_config(layers=2, lora=LORA)
    assert type(AutoModel.from_config(config)) is ReLLMForConditionalGeneration
    assert type(ReLLMModel(config)) is ReLLMModel
