"""`generate` in each of its modes, against rows run one by one and against a loop that recomputes everything."""

import threading

import pytest
import torch
from tiny_models import (
    LLM_FAMILIES,
    SPEECH_TOWERS,
    audio_inputs,
    clip,
    conversation_inputs,
    tiny_config,
    tiny_model,
    tiny_processor,
    user_turn,
)
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer

from relllm import ReLLMForConditionalGeneration

# WavLM's own attention, on a padded batch
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
CONVERSATIONS = (
    [user_turn("Listen: ", clip(0.5), " and ", clip(2.7, seed=1))],  # two clips, the second in two windows
    [user_turn(clip(0.9, seed=2))],
    [user_turn("No audio here.")],
)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return dict(conversation_inputs(tiny_processor(), list(CONVERSATIONS)))


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    processor = tiny_processor()
    return [dict(conversation_inputs(processor, conversation)) for conversation in CONVERSATIONS]


def replies(model: ReLLMForConditionalGeneration, inputs: dict[str, Tensor], **options) -> Tensor:
    return model.generate(**inputs, **{**GREEDY, **options})[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def greedy_by_hand(model: ReLLMForConditionalGeneration, inputs: dict[str, Tensor], steps: int = 8) -> Tensor:
    """The arg max of a whole forward pass for each token: no cache, no `generate`."""
    start = inputs["input_ids"].shape[1]
    ids = inputs["input_ids"]
    for step in range(steps):
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False).logits
        scores = logits[:, -1].clone()
        scores[:, model.config.audio_token_id] = -torch.inf
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        assert ids.shape[1] == start + step + 1
    return ids[:, start:]


def test_greedy_replies_equal_a_loop_without_a_cache(model, alone) -> None:
    for row in alone:
        assert torch.equal(replies(model, row), greedy_by_hand(model, row))


@pytest.mark.parametrize("kind", SPEECH_TOWERS)
def test_a_padded_batch_replies_as_its_rows_do_alone(kind: str) -> None:
    emotion = kind if kind != "whisper" else "wav2vec2"
    config = tiny_config(layers=2, audio=kind, emotion=emotion)
    model, processor = tiny_model(config), tiny_processor(config)
    batch = conversation_inputs(processor, list(CONVERSATIONS))
    assert (batch["attention_mask"][1:, 0] == 0).all()  # padded on the left
    together = replies(model, batch)
    for index, conversation in enumerate(CONVERSATIONS):
        assert torch.equal(together[index], replies(model, conversation_inputs(processor, conversation))[0])


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_every_llm_family_replies_alike_in_a_batch_and_alone(family: str) -> None:
    model, processor = tiny_model(layers=2, text=family), tiny_processor()
    together = replies(model, conversation_inputs(processor, list(CONVERSATIONS)))
    for index, conversation in enumerate(CONVERSATIONS):
        row = conversation_inputs(processor, conversation)
        assert torch.equal(together[index], replies(model, row)[0])
        assert torch.equal(together[index], greedy_by_hand(model, row)[0])


def test_the_reply_depends_on_the_audio(model) -> None:
    processor = tiny_processor()
    found = {
        tuple(replies(model, conversation_inputs(processor, [user_turn(clip(0.9, seed=seed))]))[0].tolist())
        for seed in range(4)
    }
    assert len(found) > 1


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_every_cache_gives_the_same_reply(cache: str, model, inputs) -> None:
    assert torch.equal(replies(model, inputs, cache_implementation=cache), replies(model, inputs))


def test_without_a_cache_the_reply_is_the_same(model, inputs) -> None:
    assert torch.equal(replies(model, inputs, use_cache=False), replies(model, inputs))


def test_sampling_repeats_with_the_seed_and_changes_with_it(model, inputs) -> None:
    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return replies(model, inputs, do_sample=True, temperature=1.5)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_one_beam_is_greedy_and_beams_score_at_least_as_well(model, alone) -> None:
    for row in alone:
        greedy, beams = replies(model, row), replies(model, row, num_beams=4)
        scores = [sequence_score(model, row, reply) for reply in (greedy, beams)]
        assert scores[1] >= scores[0] - 1e-4


@torch.no_grad()
def sequence_score(model: ReLLMForConditionalGeneration, row: dict[str, Tensor], reply: Tensor) -> float:
    """Log probability of a reply, from one forward pass (as `generate` sees it: forbidden tokens keep their share)."""
    ids = torch.cat([row["input_ids"], reply], dim=1)
    logits = model(**{**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
    log_probs = logits[:, -reply.shape[1] - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, reply[..., None]).sum().item()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
def test_beams_over_two_clips_in_a_row_equal_the_rows_alone(options: dict, model, inputs, alone) -> None:
    together = replies(model, inputs, **options)
    count = options.get("num_return_sequences", 1)
    for index, row in enumerate(alone):
        assert torch.equal(together[count * index : count * (index + 1)], replies(model, row, **options))


def test_return_sequences_hear_the_audio_of_their_own_row(model, inputs) -> None:
    """A nearly greedy sample: each of the sequences of a row is the row's greedy reply."""
    sampled = replies(model, inputs, do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert torch.equal(sampled, replies(model, inputs).repeat_interleave(3, dim=0))


def test_beams_take_audio_that_was_encoded_before(model, inputs) -> None:
    audio = model.get_audio_features(**audio_inputs(inputs))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for options in ({}, {"num_beams": 3}):
        found = replies(model, {**text, "mm_encoder_outputs": {"audio": audio}}, **options)
        assert torch.equal(found, replies(model, inputs, **options))


def test_the_audio_token_is_never_generated_even_where_it_is_likeliest() -> None:
    model, processor = tiny_model(layers=2), tiny_processor()
    audio_id = model.config.audio_token_id
    row = conversation_inputs(processor, [user_turn(clip(0.5))])
    with torch.no_grad():
        direction = model.model(**row).last_hidden_state[0, -1]
        model.get_output_embeddings().weight[audio_id] = 10 * direction
        assert model(**row).logits[0, -1].argmax() == audio_id
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        assert (replies(model, row, **options) != audio_id).all()


def test_text_streamers_deliver_the_reply_piece_by_piece(model, alone, capsys) -> None:
    tokenizer = tiny_processor().tokenizer
    row = alone[0]
    expected = tokenizer.decode(replies(model, row)[0], skip_special_tokens=True)
    options = {"skip_prompt": True, "skip_special_tokens": True}
    replies(model, row, streamer=TextStreamer(tokenizer, **options))
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(tokenizer, **options, timeout=30)
    thread = threading.Thread(target=replies, args=(model, row), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len(pieces) > 1


def test_inputs_embeds_give_the_same_reply(model, alone) -> None:
    row = alone[0]
    is_audio = row["input_ids"] == model.config.audio_token_id
    with torch.no_grad():
        audio = model.get_audio_features(**audio_inputs(row))
        embeddings = model.get_input_embeddings()(row["input_ids"])
        embeddings[is_audio] = audio.pooler_output
    mask = row["attention_mask"]
    for options in ({}, {"num_beams": 3}):
        embedded = {"inputs_embeds": embeddings, "audio_mask": is_audio, "attention_mask": mask}
        assert torch.equal(model.generate(**embedded, **GREEDY, **options), replies(model, row, **options))
        audio_mask = {"audio_mask": is_audio}
        for by in ({}, audio_mask):  # the placeholders by their embedding, or said
            placeholders = {"inputs_embeds": model.get_input_embeddings()(row["input_ids"]), **audio_inputs(row), **by}
            found = model.generate(**placeholders, attention_mask=mask, **GREEDY, **options)
            assert torch.equal(found, replies(model, row, **options))
    unmasked = model.generate(inputs_embeds=embeddings, attention_mask=mask, **GREEDY)
    assert not torch.equal(unmasked, replies(model, row))


def test_the_towers_run_once_for_a_reply(model, inputs) -> None:
    """Each window once; a tower may take the windows of a batch in groups."""
    windows = {"audio_tower": 0, "emotion_tower": 0}

    def count(name: str):
        def hook(module, arguments, output) -> None:
            windows[name] += len(arguments[0])

        return hook

    hooks = [
        model.model.audio_tower.layer_norm.register_forward_hook(count("audio_tower")),
        model.model.emotion_tower.register_forward_hook(count("emotion_tower")),
    ]
    number = len(inputs["input_features"])
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        replies(model, inputs, **options)
        assert windows == {"audio_tower": number, "emotion_tower": number}
        windows.update(audio_tower=0, emotion_tower=0)
    for hook in hooks:
        hook.remove()


def test_a_reply_ends_at_the_end_of_turn_token(model, alone) -> None:
    row = alone[1]
    first = replies(model, row)[0]
    ended = model.generate(**row, max_new_tokens=8, do_sample=False, eos_token_id=int(first[3]), pad_token_id=0)
    reply = ended[0, row["input_ids"].shape[1] :]
    stop = first.tolist().index(int(first[3])) + 1
    assert reply.tolist() == first[:stop].tolist()


def test_output_scores_and_prefill_logits_are_those_of_forward(model, alone) -> None:
    row = alone[0]
    result = model.generate(**row, **GREEDY, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        expected = model(**row).logits[:, -1]
    torch.testing.assert_close(result.logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", ["concat", "token", "none"])
@pytest.mark.parametrize("scope", ["audio", "text", "global"])
def test_every_fusion_and_scope_replies_as_a_loop_without_a_cache(fusion: str, scope: str) -> None:
    config = tiny_config(layers=2, fusion=fusion, lora_scope=scope)
    model = tiny_model(config)
    row = conversation_inputs(tiny_processor(config), CONVERSATIONS[0])
    assert torch.equal(replies(model, row), greedy_by_hand(model, row))
