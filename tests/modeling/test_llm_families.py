"""Each family of causal LMs as the LLM of a ReLLM with a scoped LoRA, from checkpoints on disk in bfloat16."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from llm_families import FAMILIES, REFUSED, family_config, family_table
from tiny_models import (
    LORA,
    audio_inputs,
    clip,
    conversation_inputs,
    fill_lora,
    tiny_config,
    tiny_processor,
    tiny_speech_tower,
    tiny_tokenizer,
    user_turn,
)
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from trl.trainer import add_fused_lm_head

from relllm import ReLLMConfig, ReLLMForConditionalGeneration, ReLLMModel
from relllm.inference.replies import score_answers
from relllm.modeling.outputs_relllm import ReLLMAudioOutput

TEXT_IDS = torch.tensor([[1, 40, 41, 42, 43, 2, 9, 88]])
ANSWERS = ([51, 2], [70, 61, 33, 2])
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
CONVERSATIONS = ([user_turn("Listen: ", clip(0.5), " and so on and on")], [user_turn(clip(0.9, seed=1))])
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@dataclass
class Built:
    """A ReLLM from towers on disk, and the LLM alone, read from the same folder."""

    model: ReLLMForConditionalGeneration
    llm: PreTrainedModel


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    tiny_speech_tower("whisper").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return dict(conversation_inputs(tiny_processor(tiny_config(fusion="none")), list(CONVERSATIONS)))


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    processor = tiny_processor(tiny_config(fusion="none"))
    return [dict(conversation_inputs(processor, conversation)) for conversation in CONVERSATIONS]


def save_llm(model: PreTrainedModel, folder: Path) -> Path:
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def build(speech: Path, llm: Path | PreTrainedModel, **options) -> ReLLMForConditionalGeneration:
    torch.manual_seed(0)
    options = {"lora": LORA, "projector_inner_dim": 16, "initializer_range": 0.2, **options}
    model = ReLLMForConditionalGeneration.from_towers(speech, llm, dtype=torch.float32, **options).eval()
    fill_lora(model)
    return model


def build_family(family: str, speech: Path, folder: Path) -> Built:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {family}")
    torch.manual_seed(4)
    fresh = AutoModelForCausalLM.from_config(family_config(family))
    fresh.get_input_embeddings().weight.data[0].normal_(std=0.2)  # of padding: Gemma 3n has no gradient beside zeros
    for weight in fresh.parameters():
        if not weight.any():  # a scale or bias that is trained away from zero
            weight.data.normal_(std=0.2)
    save_llm(fresh, folder)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Built(build(speech, folder), llm)


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_family(request.param, speech, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
@torch.no_grad()
def test_text_alone_is_read_and_answered_as_by_the_bare_llm(built: Built) -> None:
    assert torch.equal(built.model(input_ids=TEXT_IDS).logits, built.llm(TEXT_IDS).logits)
    forbidden = {"suppress_tokens": built.model.generation_config.suppress_tokens}
    expected = built.llm.generate(TEXT_IDS, **GREEDY, **forbidden)
    assert torch.equal(built.model.generate(input_ids=TEXT_IDS, **GREEDY), expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_batch_padded_on_either_side_is_read_as_its_rows_alone(built: Built, batch, alone) -> None:
    processor = tiny_processor(tiny_config(fusion="none"))
    padding = {"text_kwargs": {"padding_side": "right", "padding": True}}
    right = conversation_inputs(processor, list(CONVERSATIONS), processor_kwargs=padding)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    on_right, on_left = built.model(**right).logits, built.model(**batch, position_ids=positions).logits
    for index, row in enumerate(alone):
        length, expected = row["input_ids"].shape[1], built.model(**row).logits[0]
        torch.testing.assert_close(on_right[index, :length], expected, **CLOSE)
        torch.testing.assert_close(on_left[index, -length:], expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_batch_replies_as_its_rows_alone_and_as_without_a_cache(built: Built, batch, alone, num_beams: int) -> None:
    def replies(inputs: dict[str, Tensor], **options) -> Tensor:
        reply = built.model.generate(**inputs, **GREEDY, num_beams=num_beams, **options)
        return reply[:, inputs["input_ids"].shape[1] :]

    together = replies(batch)
    assert torch.equal(together, torch.cat([replies(row) for row in alone]))
    assert torch.equal(together, replies(batch, use_cache=False))


@pytest.mark.slow
def test_each_matrix_of_the_lora_trains_and_trl_has_the_same_loss(built: Built, batch) -> None:
    model, ids = built.model, batch["input_ids"]
    unread = (batch["attention_mask"] == 0) | (ids == model.config.audio_token_id)
    labels = ids.masked_fill(unread, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    lora = {name: weight.grad for name, weight in model.named_parameters() if ".relllm." in name}
    assert lora and [name for name, grad in lora.items() if grad is None or not grad.any()] == []
    model.zero_grad()
    forward = model.forward
    add_fused_lm_head(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, labels=labels, fused_lm_head=True).loss, loss.detach(), **CLOSE)
    model.forward = forward


@pytest.mark.slow
@torch.no_grad()
def test_a_saved_model_loads_to_the_same_logits(built: Built, batch, tmp_path: Path) -> None:
    try:
        type(built.llm.config)(**built.llm.config.to_dict())
    except ValueError as error:
        pytest.skip(f"this release of Transformers does not read this configuration as it writes it: {error}")
    built.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, built.model(**batch).logits)


@torch.no_grad()
def naive_scores(model: PreTrainedModel, rows: list[dict[str, Tensor]]) -> Tensor:
    """Each prompt with each answer behind it in a forward pass of its own, without padding or cache."""
    scores = []
    for row in rows:
        for answer in ANSWERS:
            ids = torch.cat([row["input_ids"], torch.tensor([answer])], dim=1)
            given = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            log_probs = model(**given, use_cache=False).logits[0].log_softmax(-1)
            behind = log_probs[-len(answer) - 1 : -1]
            scores.append(behind.gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(scores).reshape(len(rows), len(ANSWERS))


def assert_scores(built: Built, batch: dict[str, Tensor], alone: list[dict[str, Tensor]]) -> None:
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    audio = built.model.get_audio_features(**audio_inputs(batch))
    found = score_answers(built.model, text, ANSWERS, audio=audio)
    torch.testing.assert_close(found, naive_scores(built.model, alone), rtol=1e-3, atol=1e-3)
    rows = [{name: row[name] for name in text} for row in (batch, *alone)]
    for row in rows:  # a bare LLM is asked without placeholders: Gemma 3n's first layers know none
        row["input_ids"] = row["input_ids"].masked_fill(row["input_ids"] == built.model.config.audio_token_id, 5)
    text, *read = rows
    found = score_answers(built.llm, text, ANSWERS)
    torch.testing.assert_close(found, naive_scores(built.llm, read), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_answers_are_scored_as_each_alone_also_by_the_bare_llm(built: Built, batch, alone) -> None:
    assert_scores(built, batch, alone)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "jamba"])
def test_hybrids_score_answers_as_each_alone(family: str, speech: Path, tmp_path: Path, batch, alone) -> None:
    """Their states are repeated with the cache, and go on token by token only."""
    assert_scores(build_family(family, speech, tmp_path), batch, alone)


@pytest.mark.parametrize("family", ["dbrx", "gpt_oss", "jetmoe"])
def test_the_loss_of_the_routers_is_weighed_as_by_the_bare_llm(family: str, speech: Path, tmp_path: Path) -> None:
    """Its weight is in DBRX's `ffn_config`, and called otherwise in JetMoE."""
    built = build_family(family, speech, tmp_path)
    options = {"labels": TEXT_IDS, "output_router_logits": True}
    found, expected = built.model(input_ids=TEXT_IDS, **options), built.llm(TEXT_IDS, **options)
    torch.testing.assert_close(found.loss, expected.loss)
    assert expected.aux_loss > 0 and not torch.isclose(
        found.loss, built.model(input_ids=TEXT_IDS, labels=TEXT_IDS).loss
    )


def test_the_table_of_the_docs_is_this_list() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    section = text.split("## Causal LMs that are tested")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")][2:] == family_table()


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_the_llm_is_refused_by_name_before_weights_are_read(
    family: str, speech: Path, tmp_path: Path
) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {family}")
    reason = REFUSED[family][1]
    config = family_config(family)
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'{family}' cannot be the LLM") as refused:
        build(speech, tmp_path)
    assert reason in str(refused.value) and "docs/models.md" in str(refused.value)
    with torch.device("meta"), pytest.raises(ValueError, match=f"'{family}' cannot be the LLM"):
        ReLLMModel(ReLLMConfig(audio_config=tiny_config().audio_config, text_config=config))


def test_embeddings_narrower_than_the_llm_are_refused() -> None:
    """OPT 350m has them."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "ffn_dim": 48}
    config = CONFIG_MAPPING["opt"](word_embed_proj_dim=16, **sizes)
    with torch.device("meta"), pytest.raises(ValueError, match="token embeddings have the width 16, not"):
        ReLLMModel(ReLLMConfig(text_config=config))


def test_assisted_decoding_is_refused_where_the_state_cannot_go_back(speech: Path, tmp_path: Path) -> None:
    model = build_family("qwen3_5_text", speech, tmp_path).model
    with pytest.raises(ValueError, match="stateful"):
        model.generate(input_ids=TEXT_IDS, prompt_lookup_num_tokens=2, **GREEDY)


VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
COMPOSITES = {
    "gemma3": ("gemma3_text", {"vision_config": {**VISION, "image_size": 16, "patch_size": 8}}),
    "gemma4": ("gemma4_text", {"vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 8}}),
    "mistral3": ("mistral", {"vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8}}),
    "qwen3_5": ("qwen3_5_text", {"vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2}}),
    "qwen2_audio": ("qwen2", {"audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2}}),
}


def composite(kind: str, folder: Path) -> PreTrainedModel:
    family, parts = COMPOSITES[kind]
    torch.manual_seed(5)
    config = CONFIG_MAPPING[kind](text_config=family_config(family).to_dict(), **parts)
    save_llm(AutoModelForMultimodalLM.from_config(config), folder)
    return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("given", ["folder", "loaded"])
@pytest.mark.parametrize("kind", COMPOSITES)
def test_the_language_model_of_one_that_also_sees_is_the_llm(
    kind: str, given: str, speech: Path, tmp_path: Path
) -> None:
    whole = composite(kind, tmp_path / "llm")
    llm = tmp_path / "llm" if given == "folder" else whole
    model = build(speech, llm, tokenizer=tmp_path / "llm")
    assert model.config.text_config.model_type == COMPOSITES[kind][0]
    expected = whole(input_ids=TEXT_IDS).logits
    for light in (False, True):
        model.save_pretrained(tmp_path / f"{light}", light=light)
        loaded = AutoModel.from_pretrained(tmp_path / f"{light}")
        for candidate in (model, loaded):
            assert torch.equal(candidate(input_ids=TEXT_IDS).logits, expected)


@torch.no_grad()
def test_gemma_4_reads_the_padding_token_in_each_layer_where_audio_stands_as_it_does_for_images(
    speech: Path, tmp_path: Path
) -> None:
    whole = composite("gemma4", tmp_path)
    if "mm_encoder_outputs" not in inspect.signature(whole.forward).parameters:
        pytest.skip("this release of Transformers takes no encoded images")
    audio_token_id, image_token_id = tiny_tokenizer().convert_tokens_to_ids("<|audio|>"), whole.config.image_token_id
    model = build(speech, tmp_path, lora=None)
    positions = ReLLMAudioOutput(pooler_output=torch.randn(3, 32))
    is_audio = torch.arange(8)[None].eq(torch.tensor([2, 3, 5])[:, None]).any(0)[None]
    seen = {"image": ReLLMAudioOutput(pooler_output=[positions.pooler_output])}  # a list, of one image
    expected = whole(input_ids=TEXT_IDS.masked_fill(is_audio, image_token_id), mm_encoder_outputs=seen).logits
    ids = TEXT_IDS.masked_fill(is_audio, audio_token_id)
    found = model(input_ids=ids, mm_encoder_outputs={"audio": positions}).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="reads token ids in every layer, and got inputs_embeds alone"):
        model(inputs_embeds=torch.randn(1, 3, 32))
