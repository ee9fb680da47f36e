"""On an accelerator a reply is written with a static cache: here a CPU stands for one, and compiles nothing.

The reference is the same call with a dynamic cache.
"""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny_models import audio_inputs, clip, conversation_inputs, tiny_model, tiny_processor, user_turn
from transformers import GenerationMixin, StaticCache

from relllm.inference import replies
from relllm.inference.conversation import Conversation
from relllm.inference.replies import generate_answers
from relllm.modeling.outputs_relllm import ReLLMAudioOutput
from relllm.modeling.releases_relllm import CACHE

LENGTH = 9


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the static caches that are made."""
    lengths: list[int] = []
    make = StaticCache.__init__

    def count(cache: StaticCache, *args: object, max_cache_len: int, **kwargs: object) -> None:
        lengths.append(max_cache_len)
        make(cache, *args, max_cache_len=max_cache_len, **kwargs)

    monkeypatch.setattr(StaticCache, "__init__", count)
    monkeypatch.setattr(replies, "COMPILES_ON", ("cpu",))
    monkeypatch.setattr(replies, "COMPILING_PAYS", 1)
    monkeypatch.setattr(replies, "CACHE_STEP", 64)
    return lengths


@pytest.mark.parametrize("scope", ["audio", "text"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_answers_to_a_batch_padded_on_the_left_are_those_of_a_dynamic_cache(scope, options, caches):
    model = tiny_model(lora_scope=scope)
    turns = [[user_turn("Listen: ", clip(0.5), " and ", clip(0.3))], [user_turn(clip(0.9))]]
    inputs = dict(conversation_inputs(tiny_processor(), turns))
    with torch.no_grad():
        audio = model.get_audio_features(**audio_inputs(inputs))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    asked = {"audio": audio, "max_new_tokens": LENGTH, "min_new_tokens": LENGTH, **options}
    expected = generate_answers(model, text, **asked)  # the first call, before compiling pays
    assert caches == []
    assert torch.equal(generate_answers(model, text, **asked), expected) and len(caches) == 1
    one = {name: value[1:] for name, value in text.items()}
    count = int((one["input_ids"] == model.config.audio_token_id).sum())
    last = ReLLMAudioOutput(pooler_output=audio.pooler_output[-count:])
    generate_answers(model, one, **{**asked, "audio": last})
    assert len(caches) == 1  # another number of rows


def test_what_was_written_counts_and_not_what_might_have_been(caches, monkeypatch):
    monkeypatch.setattr(replies, "COMPILING_PAYS", 2)
    ends = list(range(tiny_model().config.text_config.vocab_size))  # whatever comes first ends the reply
    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longer = {name: value.repeat(1, 30) for name, value in inputs.items()}  # which is compiled anew, as long after
    asked = (inputs, inputs, inputs, longer, longer, inputs)
    made = [(generate_answers(model, one, eos_token_id=ends), len(caches))[1] for one in asked]
    assert made == [0, 0, 1, 1, 2, 3] and caches[0] < caches[1] == caches[2]
    caches.clear()
    talk(tiny_model(), [0.3] * 3, eos_token_id=ends)
    assert len(caches) == 1


def test_where_transformers_compiles_nothing_the_cache_stays_dynamic(caches):
    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])

    def length(**options) -> int | None:
        return replies.static_length(model, ids, {"max_new_tokens": LENGTH, **options})

    assert length() is None
    replies.count_steps(model, 1)
    assert length() == 64 and length(disable_compile=True) is None
    for part in (model, model.base_model.text_model):  # as bitsandbytes'
        part.hf_quantizer = SimpleNamespace(is_compileable=False)
        assert length() is None
        part.hf_quantizer.is_compileable = True
        assert length() == 64
    model.generation_config.disable_compile = True
    assert length() is None and length(disable_compile=False) == 64


def talk(model, seconds, **options) -> list[str]:
    """The replies to clips of these lengths, one after the other."""
    conversation = Conversation(model, tiny_processor(), **options)
    return [conversation.say(clip(one), max_new_tokens=LENGTH).text for one in seconds]


def test_turns_of_a_conversation_share_the_length_of_their_cache(caches):
    """Each goes on where the last one ended, as with a dynamic cache, also where it leaves what was read."""
    model, dynamic = tiny_model(), tiny_model()
    dynamic.generation_config.cache_implementation = "dynamic"
    seconds = (0.3, 0.5, 0.7)
    expected = talk(dynamic, seconds)
    assert caches == [] and len(set(expected)) > 1
    assert talk(model, seconds[:1]) == expected[:1] and caches == []  # before compiling pays
    assert talk(model, seconds) == expected and len(caches) == 3
    assert [talk(model, [one]) for one in seconds] == [talk(dynamic, [one]) for one in seconds]
    assert len(caches) == 6 and all(length % 64 == 0 for length in caches) and caches == sorted(caches)
    assert caches[3:] == [caches[2]] * 3  # shorter ones again
    with ThreadPoolExecutor(1) as pool:  # as the page's: the graphs that PyTorch captures are one thread's
        assert pool.submit(talk, model, seconds).result() == expected and len(caches) == 6


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"num_beams": 2}], ids=str)
def test_turns_that_a_static_cache_cannot_take_do_without_one(options, caches):
    model = tiny_model()
    assert talk(model, [0.3], **options) == talk(model, [0.3], **options) and caches == []


def test_a_decode_step_does_not_ask_a_static_cache_how_long_it_is(monkeypatch):
    """It is a tensor there, on a card one to wait for at each token; on "meta" it has no value."""
    model = tiny_model()
    monkeypatch.setattr(
        GenerationMixin,
        "prepare_inputs_for_generation",
        lambda *_, is_first_iteration, **__: {"is_first": is_first_iteration, "audio_mask": 1},
    )
    cache = StaticCache(config=model.config.text_config, max_cache_len=8)
    for length, expected in (
        (0, {"is_first": True, "audio_mask": 1}),
        (torch.tensor(3, device="meta"), {"is_first": False}),
    ):
        monkeypatch.setattr(cache, "get_seq_length", lambda length=length: length)
        assert model.prepare_inputs_for_generation(torch.tensor([[5]]), **{CACHE: cache}) == expected
