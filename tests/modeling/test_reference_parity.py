"""Forward passes against the original RE-LLM and BLSP-Emo code: features, towers, projectors, heads, LLM, generation.

Losses, gradients and optimiser steps: `test_reference_parity_training.py`. Where ours differs on purpose, a switch
(`projector_masking=False`) reproduces the original, or the difference is shown to be the one that is documented.
"""

import copy
import functools

import golden
import pytest
import torch
from golden import SCALARS, assert_close, assert_parity, hear, recorded, relllm_model
from torch import Tensor
from transformers import LogitsProcessorList

from relllm.labels import DIMENSIONS
from relllm.modeling.audio_tower_relllm import encode_audio
from relllm.modeling.projector_relllm import ProjectorOutput

BATCHES = ("b1", "b3")
GENERATED = ("b1_lora", "b3_lora", "b3_nolora", "b3_lora_stopword")

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("batch", BATCHES)
def test_log_mel_features_are_the_original_ones(batch: str):
    ours, inputs = golden.audio_inputs(batch), recorded(f"inputs_{batch}")
    prefix, tail = inputs["speech_values_prefix"], inputs["speech_values_tail"]
    expected = tail[:, None, None].expand_as(ours["input_features"]).clone()
    expected[..., : prefix.shape[-1]] = prefix
    assert_close(ours["input_features"], expected)
    assert torch.equal(ours["input_features_mask"], inputs["speech_mask"].long())


@pytest.mark.parametrize("batch", BATCHES)
def test_waveforms_are_normalised_as_in_the_original(batch: str):
    ours, forward = golden.audio_inputs(batch), recorded(f"forward_{batch}_lora")
    for i, mask in enumerate(ours["input_values_mask"]):
        assert_close(ours["input_values"][i][mask.bool()], forward[f"w2v2.input_values.{i}"])


@pytest.mark.parametrize("batch", BATCHES)
def test_speech_tower_gives_the_original_frames(batch: str):
    inputs, forward = golden.audio_inputs(batch), recorded(f"forward_{batch}_lora")
    mask = inputs["input_features_mask"]
    lengths = forward["whisper.output_lengths"]
    assert torch.equal(encode_audio(relllm_model().model.audio_tower, inputs["input_features"], mask)[1], lengths)

    def frames(model) -> Tensor:
        output, _ = encode_audio(model.model.audio_tower, inputs["input_features"], mask)
        return output.last_hidden_state[:, : int(lengths.max())]

    assert_parity(frames, relllm_model(), forward["whisper.last_hidden_state"])


@pytest.mark.parametrize("batch", BATCHES)
def test_emotion_tower_batched_gives_what_the_original_gave_clip_by_clip(batch: str):
    model, forward = relllm_model(), recorded(f"forward_{batch}_lora")
    assert_parity(lambda model: hear(model, batch)[0].emotion_embedding, model, forward["emotion_embedding"])
    dimensions = forward["adv_arousal_dominance_valence"]
    assert_parity(lambda model: hear(model, batch)[0].tower_dimensions, model, dimensions)


def project(model, forward: golden.Recorded) -> ProjectorOutput:
    return model.model.multi_modal_projector(
        forward["adapter.input"].to(model.dtype), forward["adapter.input_mask"].sum(-1)
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_projector_alone_gives_the_original_positions(batch: str):
    forward = recorded(f"forward_{batch}_lora")
    output = project(relllm_model(), forward)
    assert_parity(lambda model: project(model, forward).hidden_states, relllm_model(), forward["adapter.output"])
    assert torch.equal(output.lengths, forward["adapter.output_mask"].sum(-1))


@pytest.mark.parametrize("batch", BATCHES)
def test_projected_positions_from_raw_audio_are_the_original_ones(batch: str):
    (_, valid), forward = hear(relllm_model(), batch), recorded(f"forward_{batch}_lora")
    assert_parity(lambda model: hear(model, batch)[0].last_hidden_state, relllm_model(), forward["adapter.output"])
    assert torch.equal(valid.long(), forward["adapter.output_mask"])


def test_masked_projector_agrees_on_the_longest_clip_and_on_each_clip_alone():
    """The original's convolutions mix padding into a shorter clip's last positions; ours do not."""
    forward = recorded("forward_b3_lora")
    embedding = forward["emotion_embedding"]
    frames = torch.cat([forward["whisper.last_hidden_state"], _repeat_like(embedding, forward)], dim=-1)
    lengths = forward["whisper.output_lengths"]
    masked, original = (relllm_model(masking=m).model.multi_modal_projector for m in (True, False))
    batched, recorded_output = masked(frames, lengths), forward["adapter.output"]
    shorter_differ = []
    for i, (length, count) in enumerate(zip(lengths.tolist(), batched.lengths.tolist(), strict=True)):
        ours = batched.hidden_states[i, :count]
        assert_close(ours, original(frames[i : i + 1, :length], lengths[i : i + 1]).hidden_states[0])
        difference = (ours - recorded_output[i, :count]).abs().max()
        if length == lengths.max():
            assert_close(ours, recorded_output[i, :count])
        else:
            shorter_differ.append(bool(difference > 1e-3))
    assert all(shorter_differ)


def _repeat_like(embedding: Tensor, forward: golden.Recorded) -> Tensor:
    return embedding[:, None].expand(-1, forward["whisper.last_hidden_state"].shape[1], -1)


def test_projector_with_transformer_layers_gives_the_original_positions():
    case, forward = recorded("subsampler_hidden_b3"), recorded("forward_b3_lora")
    weights = {k: w for k, w in golden.original_weights().items() if not k.startswith("w2v2cat_adapter.")}
    own = {k.replace("weights.", "w2v2cat_adapter.", 1): w for k, w in case.items() if k.startswith("weights.")}
    expected = case["output"]
    model = golden.convert(weights | own, adapter_hidden_layers=golden.CONFIG["subsampler_hidden_case_layers"])
    assert_parity(lambda model: project(model, forward).hidden_states, model, expected)
    assert torch.equal(project(model, forward).lengths, case["output_mask"].sum(-1))


@pytest.mark.parametrize("batch", BATCHES)
def test_heads_give_the_original_emotions_and_dimensions_by_name(batch: str):
    model, forward = relllm_model(), recorded(f"forward_{batch}_lora")
    assert_parity(lambda model: hear(model, batch)[0].emotion_logits, model, forward["er_logits"])
    columns = [DIMENSIONS.index(name) for name in golden.DIMENSIONS_OF_ORIGINAL_TARGETS]
    assert_parity(lambda model: hear(model, batch)[0].dimensions[:, columns], model, forward["avd_pred"])


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_llm_hears_as_in_the_original(batch: str, lora: bool):
    """Hidden states after each layer and logits, at every position that attention sees."""
    model, forward = relllm_model(lora=lora), recorded(f"forward_{batch}_{'lora' if lora else 'nolora'}")
    sequence = golden.speech_branch(model, batch, hear(model, batch))
    sequence.inputs_embeds = recorded(f"forward_{batch}_lora")["llm.inputs_embeds"]
    mask = sequence.attention_mask
    assert torch.equal(mask, forward["llm.attention_mask"])
    assert_parity(lambda model: golden.run_llm(model, sequence).logits, model, forward["llm.speech_logits"], mask)

    def hidden(model, layer: int) -> Tensor:
        return golden.run_llm(model, sequence, output_hidden_states=True).hidden_states[layer]

    last = model.config.text_config.num_hidden_layers
    for layer in range(1, last + 1):
        if layer == last or f"llm.speech_hidden.{layer}" in forward:
            expected = forward[f"llm.speech_hidden.{layer}"]
            assert_parity(functools.partial(hidden, layer=layer), model, expected, mask)


@pytest.mark.parametrize("batch", BATCHES)
def test_raw_audio_becomes_the_original_sequence_and_logits(batch: str):
    model, forward = relllm_model(), recorded(f"forward_{batch}_lora")
    sequence = golden.speech_branch(model, batch, hear(model, batch))
    assert torch.equal(sequence.attention_mask, forward["llm.attention_mask"])
    assert torch.equal(sequence.audio_mask.long(), forward["lora_mask"])
    assert torch.equal(sequence.labels, forward["llm.speech_labels"])

    def from_audio(model) -> golden.Branch:
        return golden.speech_branch(model, batch, hear(model, batch))

    assert_parity(lambda model: from_audio(model).inputs_embeds, model, forward["llm.inputs_embeds"])
    expected = forward["llm.speech_logits"]
    assert_parity(lambda m: golden.run_llm(m, from_audio(m)).logits, model, expected, sequence.attention_mask)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_llm_reads_as_in_the_original(batch: str, lora: bool):
    model, forward = relllm_model(lora=lora), recorded(f"forward_{batch}_{'lora' if lora else 'nolora'}")
    sequence, expected = golden.text_branch(model, batch), forward["llm.text_logits"]
    assert_parity(lambda model: golden.run_llm(model, sequence).logits, model, expected, sequence.attention_mask)


@pytest.mark.parametrize("branch", ["speech", "text"])
@pytest.mark.parametrize("scope", ["text", "global"])
def test_lora_of_other_scopes_gives_the_original_logits(scope: str, branch: str):
    model, expected = relllm_model(scope=scope), recorded("lora_scopes_b3")[f"{scope}.{branch}_logits"]
    sequence = golden.text_branch(model, "b3")
    if branch == "speech":
        sequence = golden.speech_branch(model, "b3", hear(model, "b3"))
        sequence.inputs_embeds = recorded("forward_b3_lora")["llm.inputs_embeds"]
    assert_parity(lambda model: golden.run_llm(model, sequence).logits, model, expected, sequence.attention_mask)


def test_bare_llm_with_holes_gives_the_original_hidden_states():
    model, case = relllm_model(lora=False), recorded("qwen_text")
    mask, embeds = case["attention_mask"], model.get_input_embeddings()(case["input_ids"])
    positions = torch.arange(mask.shape[1]).expand_as(mask)

    def run(model):
        return model.model.text_model(
            inputs_embeds=embeds.to(model.dtype),
            attention_mask=mask,
            position_ids=positions,
            output_hidden_states=True,
        )

    assert_parity(lambda model: run(model).logits, model, case["logits"], mask)
    for layer in range(len(run(model).hidden_states)):
        hidden = case[f"hidden.{layer}"]
        assert_parity(lambda model, layer=layer: run(model).hidden_states[layer], model, hidden, mask)


def test_swapping_the_gated_projections_is_noticed():
    """The comparison discriminates: a conversion with w1 and w2 exchanged fails it by far."""
    weights = golden.original_weights()
    swapped = {
        k.replace(".w1.", ".w?.").replace(".w2.", ".w1.").replace(".w?.", ".w2."): w for k, w in weights.items()
    }
    model = golden.convert(swapped)
    sequence = golden.speech_branch(model, "b3", hear(model, "b3"))
    expected = golden.run_llm(relllm_model(), sequence).logits
    difference = (golden.run_llm(model, sequence).logits - expected)[sequence.attention_mask.bool()]
    assert difference.abs().max() > 0.05


@pytest.mark.parametrize("part", ["multi_modal_projector.fc1", "text_model.model.layers.0.mlp.up_proj.base_layer"])
def test_a_weight_that_is_wrong_by_a_hundredth_is_noticed(part: str):
    """In whichever precision it is wrong: in both, or in float32 alone."""
    forward, model = recorded("forward_b3_lora"), copy.deepcopy(relllm_model())
    sequence = golden.speech_branch(model, "b3", hear(model, "b3"))

    def logits(model) -> Tensor:
        return golden.run_llm(model, golden.speech_branch(model, "b3", hear(model, "b3"))).logits

    assert_parity(logits, model, forward["llm.speech_logits"], sequence.attention_mask)
    model.model.get_submodule(part).weight[0] *= 1.01
    with pytest.raises(AssertionError, match="Our float32 is off by"):
        assert_parity(logits, model, forward["llm.speech_logits"], sequence.attention_mask)
    with pytest.raises(AssertionError, match="not close"):
        assert_parity(logits, copy.deepcopy(model), forward["llm.speech_logits"], sequence.attention_mask)


# Generation


class EndAfterStopWord:
    """The original's stop words: once one is there, only the end follows. Unlike an end token, it may come first."""

    def __init__(self, stop_words: list[int], eos_token_id: int):
        self.stop_words = torch.tensor(stop_words)
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1]:
            stopped = torch.isin(input_ids, self.stop_words).any(1)
            scores[stopped] = -torch.inf
            scores[stopped, self.eos_token_id] = 0
        return scores


def reply(case: str, model=None):
    """Through `model.generate`: left padding before the audio, holes in it, the LoRA in the prompt only."""
    batch, settings = case.split("_")[0], SCALARS[f"generate_{case}"]
    model = model or relllm_model(lora="nolora" not in case)
    prompt = golden.generation_prompt(model, batch, hear(model, batch))
    eos, stop_words = settings["eos_token_id"], settings["stop_words_ids"] or []
    assert all(len(word) == 1 for word in stop_words)
    return model.generate(
        inputs_embeds=prompt.inputs_embeds,
        attention_mask=prompt.attention_mask,
        position_ids=prompt.position_ids,
        audio_mask=prompt.audio_mask,
        do_sample=False,
        max_new_tokens=settings["max_new_tokens"],
        min_new_tokens=settings["min_new_tokens"],
        eos_token_id=eos,
        pad_token_id=settings["pad_token_id"],
        logits_processor=LogitsProcessorList([EndAfterStopWord(sum(stop_words, []), eos)] if stop_words else []),
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("case", GENERATED)
def test_greedy_reply_has_the_original_tokens(case: str):
    assert reply(case).sequences.tolist() == SCALARS[f"generate_{case}"]["new_tokens"]


@pytest.mark.parametrize("case", GENERATED)
def test_each_step_of_a_reply_has_the_original_logits(case: str):
    expected, output = recorded(f"generate_{case}")["step_logits"], reply(case)
    running = (output.sequences != SCALARS[f"generate_{case}"]["eos_token_id"]).cumprod(1)  # after it comes padding
    model = relllm_model(lora="nolora" not in case)
    assert_parity(lambda model: torch.stack(reply(case, model).logits, dim=1), model, expected, running)


@pytest.mark.parametrize("case", ["b1_lora", "b3_lora", "b3_nolora"])
def test_prompt_of_generation_is_read_as_in_the_original(case: str):
    batch, expected = case.split("_")[0], recorded(f"generate_{case}")
    model = relllm_model(lora="nolora" not in case)
    prompt = golden.generation_prompt(model, batch, hear(model, batch))
    assert torch.equal(prompt.attention_mask, expected["prompt_attention_mask"])
    assert_parity(
        lambda model: golden.generation_prompt(model, batch, hear(model, batch)).inputs_embeds,
        model,
        expected["prompt_inputs_embeds"],
    )
    prompt.inputs_embeds, logits = expected["prompt_inputs_embeds"], expected["prompt_all_logits"]
    assert_parity(lambda model: golden.run_llm(model, prompt).logits, model, logits, prompt.attention_mask)


# BLSP-Emo from raw audio to logits


def test_blsp_emo_hears_as_in_the_original():
    model, forward = golden.blsp_emo_model(), recorded("blspemo_subsampler_b3_lora")
    audio, valid = hear(model, "b3")
    assert_parity(lambda model: hear(model, "b3")[0].last_hidden_state, model, forward["adapter.output"], valid)
    assert_parity(lambda model: hear(model, "b3")[0].emotion_logits, model, forward["er_logits"])
    sequence = golden.speech_branch(model, "b3", (audio, valid))
    assert torch.equal(sequence.attention_mask, forward["llm.attention_mask"])
    sequence.inputs_embeds = forward["llm.inputs_embeds"]
    text = golden.text_branch(model, "b3")
    for branch, name in ((sequence, "speech"), (text, "text")):
        expected = forward[f"llm.{name}_logits"]
        assert_parity(lambda m, s=branch: golden.run_llm(m, s).logits, model, expected, branch.attention_mask)
