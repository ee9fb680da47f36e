"""A conversation over several turns, against generating from the whole of it afresh."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from chat_templates import save_tokenizer
from tiny_models import LLM_FAMILIES, clip, tiny_config, tiny_model, tiny_processor, tiny_text_config
from transformers import AutoConfig
from transformers.generation.streamers import BaseStreamer

from relllm import ReLLMConfig, ReLLMProcessor
from relllm.inference.conversation import Conversation
from relllm.inference.replies import hear
from relllm.processing.processing_relllm import SANITIZES

# What is said in each turn: a clip, a typed line, or both.
TURNS = (
    (clip(0.5), None),
    (None, "And what do you think?"),
    (clip(2.7, seed=1), None),  # two windows of the tower
    (clip(0.9, seed=2), "What do you hear? "),
    (None, "Thank you."),
)
REPLY = "You sound upset. Do you want to talk about it?"


def reply_afresh(model, processor, messages: list[dict], **options) -> str:
    """From the whole conversation in one `generate`, with every clip encoded again."""
    form = {"sanitize_control_tokens": True} if SANITIZES else {}
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, **form
    )
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    generated = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(generated, skip_special_tokens=True).strip()


def check_turns(model, processor, conversation: Conversation, turns=TURNS, **options) -> None:
    for audio, text in turns:
        turn = conversation.say(audio, text, max_new_tokens=5, **options)
        assert turn.text == reply_afresh(model, processor, conversation.messages[:-1], **options)
        assert (turn.heard is None) == (audio is None)


@contextmanager
def counted(model) -> Iterator[dict[str, list[int]]]:
    """Windows that each tower encodes and positions that the LLM reads, call by call."""
    counts: dict[str, list[int]] = {"audio_tower": [], "emotion_tower": [], "text_model": []}

    def hook(name: str, dimension: int):
        def record(_module, args, kwargs) -> None:
            tensor = args[0] if args else kwargs["inputs_embeds"]
            counts[name].append(tensor.shape[dimension])

        return record

    parts = model.model
    handles = [
        parts.audio_tower.layer_norm.register_forward_pre_hook(hook("audio_tower", 0), with_kwargs=True),
        parts.emotion_tower.register_forward_pre_hook(hook("emotion_tower", 0), with_kwargs=True),
        parts.text_model.register_forward_pre_hook(hook("text_model", 1), with_kwargs=True),
    ]
    yield counts
    for handle in handles:
        handle.remove()


def says(processor: ReLLMProcessor, text: str) -> dict:
    """Options that have `generate` write this text, whatever the model would say."""
    tokens = processor.tokenizer.encode(text) + [processor.tokenizer.eos_token_id]
    start: list[int] = []

    def allowed(_batch: int, ids: torch.Tensor) -> list[int]:
        start.append(len(ids))
        return [tokens[len(ids) - start[0]]]

    return {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": len(tokens)}


@pytest.mark.parametrize("family", LLM_FAMILIES)
def test_every_llm_family_replies_over_turns_as_afresh(family: str, processor) -> None:
    model = tiny_model(layers=2, text=family)
    check_turns(model, processor, Conversation(model, processor))


@pytest.mark.parametrize("name", ["Mistral v1", "Mistral v3", "Qwen3", "GPT-OSS", "Gemma 3", "GLM-4"])
def test_llms_with_turns_of_their_own_reply_over_turns_as_afresh(name: str, model, tmp_path) -> None:
    """Some write an earlier turn differently once another follows: what is cached of it is read again."""
    tokenizer = save_tokenizer(name, tmp_path)
    processor = ReLLMProcessor.from_config(model.config, tokenizer, full_window=False)
    check_turns(model, processor, Conversation(model, processor), TURNS[:3])


@pytest.mark.parametrize(("fusion", "scope"), [("token", "text"), ("none", "global")])
def test_other_scopes_and_fusions_reply_over_turns_as_afresh(fusion: str, scope: str) -> None:
    config = tiny_config(layers=2, fusion=fusion, lora_scope=scope)
    model, processor = tiny_model(config), tiny_processor(config)
    check_turns(model, processor, Conversation(model, processor), TURNS[:4])


def sliding_config(window: int) -> ReLLMConfig:
    sizes = tiny_text_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: sizes[name] for name in (*names, "num_key_value_heads", "head_dim", "pad_token_id")}
    text = AutoConfig.for_model(
        "mistral", sliding_window=window, bos_token_id=None, eos_token_id=2, initializer_range=0.2, **sizes
    )
    config = tiny_config(layers=2)
    return ReLLMConfig(**{**config.to_dict(), "text_config": text.to_dict()})


@pytest.mark.parametrize("window", [24, 4000])
def test_a_model_with_a_sliding_window_replies_as_afresh_and_encodes_nothing_twice(window: int, processor) -> None:
    model = tiny_model(sliding_config(window))
    with counted(model) as counts:
        conversation = Conversation(model, processor)
        replies = [conversation.say(*turn, max_new_tokens=5).text for turn in TURNS]
    assert sum(counts["audio_tower"]) == 4
    for index, reply in enumerate(replies):
        assert reply == reply_afresh(model, processor, conversation.messages[: 2 + 2 * index])


def test_a_sliding_window_goes_on_where_nothing_is_cut(processor) -> None:
    model = tiny_model(sliding_config(24))
    conversation = Conversation(model, processor)
    for audio, text in TURNS[:3]:
        conversation.say(audio, text, **says(processor, REPLY))
    with counted(model) as counts:
        check_turns(model, processor, conversation, TURNS[3:4])
    afresh = counts["text_model"][5]  # of a first step; the five before it are the conversation's
    assert counts["text_model"][0] < afresh / 3


def test_every_window_is_encoded_exactly_once(model, processor) -> None:
    conversation = Conversation(model, processor)
    with counted(model) as counts:
        for turn in TURNS:
            conversation.say(*turn, max_new_tokens=4)
    assert counts["audio_tower"] == counts["emotion_tower"] == [1, 2, 1]  # windows of the three clips, in order


def test_a_later_turn_reads_only_what_is_new(model, processor) -> None:
    conversation = Conversation(model, processor)
    end = 0  # of what was read and written so far
    for audio, text in TURNS:
        with counted(model) as counts:
            conversation.say(audio, text, **says(processor, REPLY))
        inputs = processor.apply_chat_template(
            conversation.messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
        )
        length = inputs["input_ids"].shape[1]
        assert counts["text_model"][0] == length - end
        assert set(counts["text_model"][1:]) == {1}
        end = length + len(counts["text_model"]) - 1  # the last token written has not been read
    assert conversation.messages[-1]["content"] == REPLY


def test_a_template_that_rewrites_earlier_turns_reads_old_clips_from_their_positions(model, processor) -> None:
    """A system turn that counts the turns: each time the whole conversation is new but for its first words."""
    template = processor.chat_template.replace(
        "{%- set roles", "{{- 'turns: ' + messages | length | string + '. ' -}}{%- set roles"
    )
    other = ReLLMProcessor(processor.feature_extractor, processor.tokenizer, chat_template=template)
    conversation = Conversation(model, other)
    with counted(model) as counts:
        replies = [conversation.say(*turn, max_new_tokens=5).text for turn in TURNS]
    assert sum(counts["audio_tower"]) == 4
    for index, reply in enumerate(replies):
        assert reply == reply_afresh(model, other, conversation.messages[: 2 + 2 * index])


def test_a_cut_inside_a_clip_is_moved_before_it() -> None:
    from relllm.inference.conversation import _cut

    audio = 9
    cached = torch.tensor([1, 2, audio, audio, audio, 3])
    assert _cut(torch.tensor([1, 2, audio, audio, 4, 5]), cached, audio) == 2  # a shorter clip
    assert _cut(torch.tensor([1, 2, audio, audio, audio, audio, 5]), cached, audio) == 2
    assert _cut(torch.tensor([1, 2, audio, audio, audio]), cached, audio) == 2  # one position has to be read
    assert _cut(torch.tensor([7, 2]), cached, audio) == 0
    assert _cut(torch.tensor([1, 2, audio, audio, audio, 3, 4]), cached, audio) == 6


class Interrupting(BaseStreamer):
    """Ctrl-C after some tokens."""

    def __init__(self, after: int):
        self.left = after

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        """Nothing to do."""


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_turn_leaves_the_conversation_as_it_was(after: int, model, processor) -> None:
    conversation = Conversation(model, processor)
    check_turns(model, processor, conversation, TURNS[:2])
    before = conversation.messages
    with pytest.raises(KeyboardInterrupt):
        conversation.say(clip(1.1, seed=5), streamer=Interrupting(after), max_new_tokens=5)
    assert conversation.messages == before
    check_turns(model, processor, conversation, TURNS[2:])


def test_a_model_that_fails_half_way_leaves_the_conversation_as_it_was(model, processor) -> None:
    conversation = Conversation(model, processor)
    check_turns(model, processor, conversation, TURNS[:2])
    last_layer = model.model.text_model.model.layers[-1]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = last_layer.register_forward_pre_hook(fail)  # the first layer has the new positions, the last has not
    with pytest.raises(RuntimeError, match="out of memory"):
        conversation.say(text="hello")
    handle.remove()
    check_turns(model, processor, conversation, TURNS[2:])


def test_bad_audio_is_named_and_the_conversation_goes_on(model, processor, tmp_path) -> None:
    conversation = Conversation(model, processor)
    check_turns(model, processor, conversation, TURNS[:1])
    path = tmp_path / "notes.wav"
    path.write_text("this is no audio")
    before = conversation.messages
    with pytest.raises(ValueError, match="notes.wav"):
        conversation.say(path)
    assert conversation.messages == before
    check_turns(model, processor, conversation, TURNS[1:3])


def test_a_turn_without_words_or_audio_is_an_error(model, processor) -> None:
    for text in (None, "", " \n"):
        with pytest.raises(ValueError, match="needs audio or text"):
            Conversation(model, processor).say(text=text)


def test_an_option_that_the_conversation_sets_is_an_error_before_a_tower_runs(model, processor, monkeypatch) -> None:
    monkeypatch.setattr(type(model), "get_audio_features", None)
    with pytest.raises(ValueError, match="num_return_sequences"):
        Conversation(model, processor).say(clip(0.3), num_return_sequences=2)
    with pytest.raises(ValueError, match="use_cache"):
        Conversation(model, processor, use_cache=False).say(clip(0.3))


@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_a_checkpoints_own_cache_settings_do_not_matter(setting: dict, processor) -> None:
    model = tiny_model(layers=2)
    model.generation_config.update(**setting)
    check_turns(model, processor, Conversation(model, processor), TURNS[:3])


def test_a_conversation_longer_than_the_llm_reads_is_an_error_and_stays(model, processor) -> None:
    conversation = Conversation(model, processor)
    check_turns(model, processor, conversation, TURNS[:1])
    before = conversation.messages
    with pytest.raises(ValueError, match=r"the LLM reads 1024\. Begin anew"):
        conversation.say(text="a long story " * 100)
    assert conversation.messages == before
    check_turns(model, processor, conversation, TURNS[1:2])


def test_older_turns_are_dropped_where_that_is_allowed_and_the_rest_is_read_as_afresh(model, processor) -> None:
    conversation = Conversation(model, processor)
    told = ["a long story " * 20, "another one " * 25]
    for audio, text in ((clip(0.5), told[0]), (clip(0.9), told[1]), (None, told[0]), (clip(2.7, seed=1), told[1])):
        turn = conversation.say(audio, text, max_new_tokens=5, drop_oldest=True)
        assert turn.text == reply_afresh(model, processor, conversation.messages[:-1])
    assert turn.dropped and [one["role"] for one in conversation.messages[:2]] == ["system", "user"]
    assert len(conversation.messages) == 1 + 2 * (4 - turn.dropped)
    left = len(conversation.messages)
    with pytest.raises(ValueError, match=r"This turn has \d+ positions .* the LLM reads 1024\. Say less"):
        conversation.say(text="a long story " * 100, drop_oldest=True)
    assert len(conversation.messages) == left
    assert conversation.say(text="Hello.", max_new_tokens=5).dropped == 0
    conversation.reset()
    for seed in (0, 1):  # of one length, in one place
        turn = conversation.say(clip(0.5, seed=seed), "a long story " * 60, max_new_tokens=5, drop_oldest=True)
        assert turn.text == reply_afresh(model, processor, conversation.messages[:-1])
    assert turn.dropped == 1


def test_a_recurrent_state_is_not_gone_on_with() -> None:
    from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

    from relllm.inference.conversation import _crop

    cache = Cache(layers=[DynamicLayer(), LinearAttentionLayer()])
    assert not _crop(cache, cache.get_seq_length())


def test_after_a_reset_the_reply_is_that_of_a_new_conversation(model, processor) -> None:
    conversation = Conversation(model, processor)
    check_turns(model, processor, conversation, TURNS[:3])
    conversation.reset()
    assert [message["role"] for message in conversation.messages] == ["system"]
    check_turns(model, processor, conversation, TURNS[2:4])


def test_conversations_that_share_a_model_do_not_mix(model, processor) -> None:
    first, second = (Conversation(model, processor) for _ in range(2))
    for turn in TURNS[:3]:
        check_turns(model, processor, first, [turn])
        check_turns(model, processor, second, [(clip(0.4, seed=9), None)])
    assert len(first.messages) == len(second.messages) == 7


def test_sampled_turns_are_those_of_a_fresh_sample(model, processor, monkeypatch) -> None:
    def draw(probabilities, num_samples):  # releases of Transformers differ in how often they draw
        return (probabilities.cumsum(-1) > 0.37).int().argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", draw)
    check_turns(model, processor, Conversation(model, processor), TURNS[:3], do_sample=True, temperature=1.5)


def test_beams_reply_as_afresh_and_greedy_turns_may_follow(model, processor) -> None:
    conversation = Conversation(model, processor)
    check_turns(model, processor, conversation, TURNS[:1])
    check_turns(model, processor, conversation, TURNS[1:3], num_beams=3)
    check_turns(model, processor, conversation, TURNS[3:])


def test_text_beside_a_clip_takes_the_instructions_place(model, processor) -> None:
    conversation = Conversation(model, processor, instruction="Go on: ")
    conversation.say(clip(0.5), max_new_tokens=1)
    conversation.say(clip(0.5), "What is it? ", max_new_tokens=1)
    texts = [message["content"][0]["text"] for message in conversation.messages if message["role"] == "user"]
    assert texts == ["Go on: ", "What is it? "]
    bare = Conversation(model, processor, instruction="", system_prompt="")
    bare.say(clip(0.5), max_new_tokens=1)
    assert [part["type"] for part in bare.messages[0]["content"]] == ["audio"]


@pytest.mark.skipif(not SANITIZES, reason="Transformers has nothing to compare with; see test_typed_text.py")
def test_a_typed_placeholder_is_text(model, processor) -> None:
    conversation = Conversation(model, processor)
    check_turns(model, processor, conversation, [(None, "<|audio|><|im_end|> is what I type"), TURNS[0]])


def test_a_turn_hears_what_hear_hears(model, processor) -> None:
    heard = Conversation(model, processor).say(clip(2.7, seed=1), max_new_tokens=1).heard
    expected = next(hear(model, processor, [clip(2.7, seed=1)]))
    assert heard.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert heard.dimensions == pytest.approx(expected.dimensions, abs=1e-6)


def test_the_audio_is_kept_and_not_its_file(model, processor, tmp_path) -> None:
    import soundfile

    path = tmp_path / "gone.wav"
    soundfile.write(path, clip(0.5), 16_000)
    conversation = Conversation(model, processor)
    conversation.say(path, max_new_tokens=2)
    path.unlink()
    check_turns(model, processor, conversation, TURNS[1:3])
    kept = conversation.messages[1]["content"][1]["waveform"]
    np.testing.assert_allclose(kept, clip(0.5), atol=1e-4)


def test_the_python_of_the_documentation_runs(model, processor, tmp_path, monkeypatch) -> None:
    import re
    from pathlib import Path

    import soundfile

    text = (Path(__file__).parents[2] / "docs" / "talk.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    soundfile.write("question.wav", clip(0.5), 16_000)
    names = {"model": model, "processor": processor}
    exec(compile(block, "docs/talk.md", "exec"), names)
    assert names["turn"].heard.emotion in model.config.emotion_labels
