"""LLMs whose tokenizer puts a BOS before every text: one BOS in each prompt, from checkpoints on disk."""

from pathlib import Path

import pytest
import torch
from tiny_models import (
    LORA,
    clip,
    fill_lora,
    tiny_emotion_tower,
    tiny_llm,
    tiny_speech_tower,
    tiny_tokenizer,
)
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.data.data_settings import Sampling
from relllm.data.replies.writers import LocalWriter, Request
from relllm.evaluation.asking import Questions, encode_prompts
from relllm.evaluation.evaluation_settings import EvaluationSettings
from relllm.evaluation.predicting import load_predictor
from relllm.inference.conversation import Conversation
from relllm.inference.text_conversation import TextConversation
from relllm.labels import EMOTIONS
from relllm.training.collator import ReLLMCollator

END = "<|eot_id|>"
OWN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module", params=["base", "instruct"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Towers, an LLM with or without a chat template, which ends with another token, and a ReLLM of them."""
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny_tokenizer(audio_token=False, adds_bos=True)
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", END], special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "<|end_of_text|>"})
    vocabulary = tokenizer.get_vocab()
    for name in ("<|im_start|>", "<|im_end|>"):
        assert name in vocabulary  # the tiny tokenizer's own; the turns are Llama 3's
    tokenizer.chat_template = OWN if request.param == "instruct" else None
    tokenizer.save_pretrained(path / "llm")
    llm = tiny_llm()
    llm.generation_config.eos_token_id = llm.config.eos_token_id = tokenizer.eos_token_id
    for name, tower in {"audio": tiny_speech_tower("whisper"), "llm": llm, "emotion": tiny_emotion_tower()}.items():
        tower.to(torch.bfloat16).save_pretrained(path / name)
    places = (path / "audio", path / "llm", path / "emotion")
    model = ReLLMForConditionalGeneration.from_towers(
        *places, lora=LORA, dtype=torch.float32, projector_inner_dim=16
    ).eval()
    fill_lora(model)
    model.save_pretrained(path / "re-llm")
    ReLLMProcessor.from_config(model.config, path / "llm", full_window=False).save_pretrained(path / "re-llm")
    return path


def check_start(ids: torch.Tensor, bos: int) -> None:
    assert ids[0] == bos and (ids == bos).sum() == 1


def test_a_conversation_goes_on_over_turns_and_the_llm_beside_it_reads_what_it_reads(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder / "re-llm", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder / "re-llm")
    bos = processor.tokenizer.bos_token_id
    heard = Conversation(model, processor)
    for audio, text in ((clip(0.4), None), (None, "And yours?")):
        reply = heard.say(audio, text, max_new_tokens=4)
        form = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = processor.apply_chat_template(heard.messages[:-1], **form)
        check_start(inputs["input_ids"][0], bos)
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert reply.text == processor.decode(said, skip_special_tokens=True).strip()
    bare = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32)
    read: list[torch.Tensor] = []
    for llm in (bare, model.model.text_model):
        llm.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    alone = TextConversation(bare, AutoTokenizer.from_pretrained(folder / "llm"))
    replies = [talk.say(text="Hello.", max_new_tokens=4).text for talk in (alone, Conversation(model, processor))]
    own = TextConversation.inside(model, processor).say(text="Hello.", max_new_tokens=4)
    prompts = [ids for ids in read if len(ids) > 1]
    assert len(prompts) == 3 and all(torch.equal(ids, prompts[0]) for ids in prompts)
    check_start(prompts[0], bos)
    assert replies == [own.text] * 2


def test_the_end_of_a_turn_ends_replies_beside_the_llms_own_end(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "re-llm")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>" if _is_base(folder) else END)]
    model = AutoModel.from_pretrained(folder / "re-llm", dtype=torch.float32)
    assert model.generation_config.eos_token_id == ends
    bare = AutoModelForCausalLM.from_pretrained(folder / "llm")
    assert TextConversation(bare, tokenizer).generation_options["eos_token_id"] == ends
    for name in ("llm", "re-llm"):
        questions = Questions(("empathy",), EMOTIONS)
        settings = EvaluationSettings(str(folder / name), "rows", folder, dtype="float32")
        predictor = load_predictor(settings, "text-only", questions, "cpu")
        found = predictor.options.get("eos_token_id", predictor.model.generation_config.eos_token_id)
        assert found == ends


def test_what_is_asked_learnt_and_taught_begins_with_one_bos(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder / "re-llm")
    bos = processor.tokenizer.bos_token_id
    questions = Questions(("ser", "empathy"), EMOTIONS)
    settings = EvaluationSettings(str(folder / "re-llm"), "rows", folder, dtype="float32")
    predictor = load_predictor(settings, "re-llm", questions, "cpu")
    for prompt in predictor.prompts.values():
        check_start(encode_prompts(processor.tokenizer, [prompt], "cpu")["input_ids"][0], bos)
    row = {"audio": clip(0.3), "text": "Hello.", "response": "Hi."}
    batch = ReLLMCollator(processor, EMOTIONS, teacher=True)([row])
    for name in ("input_ids", "teacher_input_ids"):
        check_start(batch[name][0], bos)
    if not _is_base(folder):
        llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
        writer = LocalWriter(llm, AutoTokenizer.from_pretrained(folder / "llm"), Sampling(max_new_tokens=2))
        check_start(torch.tensor(writer._prompt(Request("a", "Be kind.", "Hello."))), bos)
        assert writer._ends[-1] == processor.tokenizer.convert_tokens_to_ids(END)


def _is_base(folder: Path) -> bool:
    return AutoTokenizer.from_pretrained(folder / "llm").chat_template is None
