"""Turn formats: a ReLLM prompts its LLM as the LLM's own chat template does, and learns replies with their end."""

import datetime
from pathlib import Path

import pytest
import torch
import trl
from chat_templates import CHATML, PUBLISHED, save_tokenizer
from jinja2 import TemplateError
from tiny_models import BOS, clip, tiny_config, tiny_processor, tiny_tokenizer, user_turn
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from relllm import ReLLMProcessor
from relllm.inference.typed_text import encode_conversation
from relllm.modeling.checkpoint_relllm import TURN_ENDS, find_ends
from relllm.processing.turns_relllm import _TOKENS, build_chat_template, close_thought

SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "It rained.\nAll day!"},
    {"role": "assistant", "content": "How was that?"},
    {"role": "user", "content": "Wet."},
    {"role": "assistant", "content": "I am sorry."},
]


def set_date(monkeypatch: pytest.MonkeyPatch, year: int, month: int, day: int) -> None:
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(year, month, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


@pytest.fixture(autouse=True)
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the LLMs' own templates write the date that ours keep."""
    set_date(monkeypatch, 2024, 7, 26)


def make_processor(tokenizer: PreTrainedTokenizerBase) -> ReLLMProcessor:
    return ReLLMProcessor.from_config(tiny_config(), tokenizer, full_window=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_prompt_is_the_llms_own_to_the_token(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    tokenizer = save_tokenizer(name, tmp_path / "llm")
    processor = make_processor(tokenizer)
    form = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    for count in (1, 3):
        for turns in (TURNS[:count], [SYSTEM, *TURNS[:count]]):
            if name == "Gemma 2" and turns[0] is SYSTEM:  # refuses it: as in Gemma 3
                joined = {"role": "user", "content": f"{SYSTEM['content']}\n\n{TURNS[0]['content']}"}
                own = tokenizer.apply_chat_template([joined, *turns[2:]], enable_thinking=False, **form)
            else:
                own = tokenizer.apply_chat_template(turns, enable_thinking=False, **form)
            added = tokenizer(published.added, add_special_tokens=False)["input_ids"]
            found = processor.apply_chat_template(turns, **form)["input_ids"][0].tolist()
            assert processor.decode(found) == processor.decode(own["input_ids"] + added)
            assert found == own["input_ids"] + added


@pytest.mark.parametrize("name", PUBLISHED)
def test_labels_are_the_replies_and_their_ends_which_end_the_generation(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    processor = make_processor(save_tokenizer(name, tmp_path / "llm"))
    inputs = processor.apply_chat_template(
        [SYSTEM, *TURNS], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = torch.as_tensor(inputs["assistant_masks"]).bool()[0]
    labels = inputs["input_ids"][0][mask]
    past_end = published.end if published.past_end is None else published.past_end
    said = (
        processor.decode(labels).replace(" How", "How").replace(" I am", "I am").replace("\n", "")
    )  # some learn a blank
    assert said == f"How was that?{past_end}I am sorry.{published.end}"
    settings = type("Settings", (), {"eos_token_id": 5})()
    end = processor.tokenizer.convert_tokens_to_ids(published.end.strip())
    assert labels[-1] == end
    for template in (None, processor.chat_template):
        assert find_ends(settings, processor.tokenizer, template) == [5, end]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_template_is_saved_and_a_format_derived_from_it_is_the_same(name: str, tmp_path: Path) -> None:
    processor = make_processor(save_tokenizer(name, tmp_path / "llm"))
    processor.save_pretrained(tmp_path / "processor")
    loaded = ReLLMProcessor.from_pretrained(tmp_path / "processor")
    assert loaded.chat_template == processor.chat_template
    loaded.tokenizer.chat_template = processor.chat_template
    again = make_processor(loaded.tokenizer)
    for turns, asks in ((TURNS[:3], True), ([SYSTEM, *TURNS], False), ([SYSTEM, *TURNS[:1]], True)):
        for one in (again, loaded):
            expected = processor.apply_chat_template(turns, add_generation_prompt=asks)
            assert one.apply_chat_template(turns, add_generation_prompt=asks) == expected


def test_a_date_in_the_llms_template_is_the_same_every_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = save_tokenizer("Llama 3.2", tmp_path)
    before = build_chat_template(tokenizer)
    set_date(monkeypatch, 2031, 1, 1)
    assert build_chat_template(tokenizer) == before and "26 Jul 2024" in before


@pytest.mark.slow
def test_whole_templates_as_they_were_published_are_derived() -> None:
    """Those that TRL ships: of LLMs that read a plain text as a turn's content."""
    paths = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    images = ("idefics", "llava", "smolvlm")  # want a list of parts
    paths = [path for path in paths if not path.stem.startswith(images) and not path.stem.endswith("_training")]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    for path in paths:
        tokenizer.chat_template = path.read_text()
        ours = build_chat_template(tokenizer)
        form = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        own = close_thought(tokenizer.apply_chat_template(TURNS[:3], **form))
        found = tokenizer.apply_chat_template(TURNS[:3], chat_template=ours, **form)
        assert found.removeprefix(own) in ("", "<|channel|>final<|message|>", " to=user<|message|>"), path.stem
        assert "{%- generation -%}" in ours


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["<|im_start|>"], "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        (
            ["<|start_header_id|>"],
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (["<start_of_turn>"], "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"),
        ([], "user: hi</s>\nassistant: "),
    ],
    ids=["chatml", "llama-3", "gemma", "plain"],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_llm_without_a_template_gets_ours_in_the_turns_of_its_tokens(
    adds_bos: bool, tokens: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "get_vocab", lambda: dict.fromkeys(tokens, 0))
        tokenizer.chat_template = build_chat_template(tokenizer)
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert found == (BOS if adds_bos else "") + expected


def test_a_rendered_conversation_begins_with_one_bos_and_plain_text_as_the_tokenizer_has_it() -> None:
    processor = tiny_processor(adds_bos=True)
    bos = processor.tokenizer.bos_token_id
    asked = processor.apply_request([clip(0.3), clip(1.2)])
    answered = processor.apply_chat_template(
        processor.build_conversation(clip(0.3), response="Oh."),
        tokenize=True,
        return_dict=True,
        processor_kwargs={"text_kwargs": {"padding_side": "right"}},
    )
    for inputs in (asked, answered):
        starts = (inputs["input_ids"] == bos).sum(1)
        assert starts.tolist() == [1] * len(starts)
        assert (inputs["input_ids"].gather(1, inputs["attention_mask"].argmax(1, keepdim=True)) == bos).all()
    typed = encode_conversation(processor.tokenizer, [{"role": "user", "content": f"{BOS}?"}], processor.chat_template)
    assert typed[0] == bos and typed.count(bos) == 1
    assert processor(text="Hello.")["input_ids"][0].tolist() == processor.tokenizer("Hello.")["input_ids"]


def test_a_role_that_no_format_has_is_named() -> None:
    for processor in (tiny_processor(), make_processor(_with_template(CHATML))):
        for role in ("tool", "developer"):
            with pytest.raises(TemplateError, match=f"Role '{role}'"):
                processor.apply_chat_template([{"role": role, "content": "?"}, user_turn("hi")])


def test_turns_in_an_order_that_the_llm_refuses_are_an_error_that_says_which(tmp_path: Path) -> None:
    processor = make_processor(save_tokenizer("Mistral v7", tmp_path))
    with pytest.raises(TemplateError, match="no place for 'user' behind 'user'"):
        processor.apply_chat_template([TURNS[0], TURNS[2]])
    with pytest.raises(TemplateError, match="no place for a reply behind 'assistant'"):
        processor.apply_chat_template(TURNS, add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.role + loop.index | string + ': ' + m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.role + m.content | upper }}{% endfor %}",
    ],
)
def test_a_template_that_cannot_be_derived_is_an_error_with_the_remedy(template: str) -> None:
    with pytest.raises(ValueError, match="cannot be derived.*Pass chat_template="):
        make_processor(_with_template(template))
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    processor = ReLLMProcessor.from_config(tiny_config(), _with_template(template), chat_template=own)
    assert processor.chat_template == own


def _with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_the_model_ends_a_turn_as_the_processor_writes_it() -> None:
    """They may not import each other."""
    assert {token: end for token, (_, end, _, _) in _TOKENS.items()} == TURN_ENDS
