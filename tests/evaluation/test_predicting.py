"""What a system is asked and how its answer is read: against loops that score every sequence apart, and a bare LLM."""

import pytest
import torch
from chat_templates import save_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import clip, tiny_config, tiny_llm, tiny_model, tiny_processor, tiny_tokenizer
from transformers import AutoConfig

from relllm import ReLLMForConditionalGeneration
from relllm.evaluation.asking import (
    Questions,
    answer_tokens,
    encode_prompts,
    number,
    parse_emotion,
)
from relllm.evaluation.predicting import SpeechPredictor, TextPredictor, resolve_system
from relllm.inference.replies import generate_answers, score_answers
from relllm.labels import EMOTIONS, FURTHER_EMOTIONS
from relllm.processing.prompts_relllm import RECOGNITION_PROMPT, recognition_prompt
from relllm.processing.turns_relllm import build_chat_template

ALL = EMOTIONS + FURTHER_EMOTIONS
QUESTIONS = Questions(("ser", "dimensions", "empathy"), EMOTIONS, max_new_tokens=6)
TEMPLATE = build_chat_template(tiny_tokenizer())
ROWS = [{"id": f"c{i}", "audio": clip(0.4 + 0.3 * i, seed=i), "text": "so sorry " * (i + 1)} for i in range(3)]


def test_with_the_originals_five_the_prompt_is_the_frozen_one():
    assert recognition_prompt(EMOTIONS) == RECOGNITION_PROMPT
    assert "options: neutral, sad, angry, or happy.\n" in recognition_prompt(EMOTIONS[:4])
    assert "surprise, fear, disgust, contempt, frustrated, or excited.\n" in recognition_prompt(ALL)
    with pytest.raises(ValueError, match="at least two"):
        recognition_prompt(["sad"])


@pytest.mark.parametrize(
    ("answer", "emotion"),
    [
        ("happy", "happy"),
        ("Happy.", "happy"),
        ("  ANGRY!!", "angry"),
        ("The emotion is anger.", "angry"),
        ("The speaker sounds sad, very sad", "sad"),
        ("**Surprised**", "surprise"),
        ("Joy", "happy"),
        ("It is not happy, but sad.", "sad"),
        ("She isn\u2019t angry. Neutral", "neutral"),
        ("angry, not sad", "angry"),
        ("not happy or angry", None),
        ("neither happy nor sad", None),
        ("I don't know, maybe happy", "happy"),
        ("happy or sad", None),
        ("neutral, sad, angry, happy, or surprise", None),
        ("excited", None),
        ("frustrated and angry", None),
        ("a s n", None),
        ("no agreement", None),
        ("unhappy", None),
        ("", None),
    ],
)
def test_an_answer_is_read_by_the_stated_rules(answer: str, emotion: str | None):
    assert parse_emotion(answer, EMOTIONS) == emotion


@given(st.text(alphabet=st.characters(), max_size=80), st.sampled_from(EMOTIONS))
def test_no_answer_raises_and_case_does_not_matter(answer: str, emotion: str):
    assert parse_emotion(answer, EMOTIONS) in (*EMOTIONS, None)
    assert parse_emotion(f"{emotion.title()}\u2026", EMOTIONS) == emotion


@torch.no_grad()
def naive_scores(model, rows: list[dict], answers: list[list[int]]) -> torch.Tensor:
    """Every prompt with every answer behind it in a forward pass of its own, without padding or cache."""
    scores = []
    for row in rows:
        for answer in answers:
            ids = torch.cat([row["input_ids"], torch.tensor([answer])], dim=1)
            given = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            log_probs = model(**given, use_cache=False).logits[0].double().log_softmax(-1)
            first = ids.shape[1] - len(answer) - 1
            scores.append(sum(log_probs[first + i, token].item() for i, token in enumerate(answer)))
    return torch.tensor(scores).reshape(len(rows), len(answers))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("scope", ["audio", "text"])
def test_the_likelihood_of_an_answer_is_that_of_its_sequence_scored_apart(family: str, scope: str):
    model, processor = tiny_model(text=family, lora_scope=scope), tiny_processor()
    answers = [answer_tokens(processor.tokenizer, TEMPLATE, name) for name in EMOTIONS]
    assert len({len(answer) for answer in answers}) > 1  # the shorter ones are padded
    alone = [dict(processor.apply_request(row["audio"], system_prompt="")) for row in ROWS]
    batch = dict(processor.apply_request([row["audio"] for row in ROWS], system_prompt=""))
    text = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
    audio = model.get_audio_features(**batch, return_dict=True)
    found = score_answers(model, text, answers, audio=audio)
    torch.testing.assert_close(found, naive_scores(model, alone, answers), rtol=1e-4, atol=1e-4, check_dtype=False)


def test_an_answer_goes_up_to_the_end_of_the_turn():
    tokenizer = tiny_tokenizer()
    tokens = answer_tokens(tokenizer, TEMPLATE, "sad")
    assert tokenizer.decode(tokens) == "sad<|im_end|>" and tokens[-1] == tokenizer.eos_token_id
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert answer_tokens(tokenizer, plain, "sad") == tokens
    with pytest.raises(ValueError, match="behind a prompt"):
        answer_tokens(tokenizer, "{% for m in messages %}{{ m.content | upper }}{% endfor %}", "sad")
    with pytest.raises(ValueError, match="at least one token"):
        score_answers(tiny_llm(), encode_prompts(tokenizer, ["x"], "cpu"), [[1], []])


def test_a_measured_answer_is_greedy_whatever_the_checkpoints_settings_say():
    model, processor = tiny_model(), tiny_processor()
    row = processor.apply_request(ROWS[0]["audio"])
    expected = generate_answers(model, dict(row), max_new_tokens=8, pad_token_id=0)
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=5.0, top_k=7)
    assert torch.equal(generate_answers(model, dict(row), max_new_tokens=8, pad_token_id=0), expected)


def test_a_batch_is_answered_as_its_clips_one_by_one():
    predictor = SpeechPredictor(tiny_model(), tiny_processor(), QUESTIONS)
    together = predictor.predict(ROWS)
    for row, found in zip(ROWS, together, strict=True):
        (alone,) = predictor.predict([row])
        assert found["reply"] == alone["reply"] and found["duration_s"] == alone["duration_s"]
        assert found["recognition"]["generated"] == alone["recognition"]["generated"]
        for way in ("likelihood", "head"):
            assert found["recognition"][way] == pytest.approx(alone["recognition"][way], abs=1e-5)
        assert found["dimensions"] == pytest.approx(alone["dimensions"], rel=1e-5, abs=1e-5)


def test_every_part_is_what_the_model_says_and_the_towers_run_once():
    model, processor = tiny_model(), tiny_processor()
    calls: list[int] = []
    hook = model.model.audio_tower.layer_norm.register_forward_hook(lambda *_: calls.append(1))
    (found,) = SpeechPredictor(model, processor, QUESTIONS).predict(ROWS[:1])
    assert len(calls) == 1
    hook.remove()
    asked = processor.apply_request(ROWS[0]["audio"], instruction=RECOGNITION_PROMPT, system_prompt="")
    answers = [answer_tokens(processor.tokenizer, TEMPLATE, name) for name in EMOTIONS]
    expected = naive_scores(model, [dict(asked)], answers)[0].softmax(-1).tolist()
    assert list(found["recognition"]["likelihood"].values()) == pytest.approx(expected, abs=2e-5)
    with torch.no_grad():
        outputs = model(**asked)
    head = outputs.emotion_logits[0].softmax(-1).tolist()
    assert list(found["recognition"]["head"].values()) == pytest.approx(head, abs=2e-6)
    assert list(found["dimensions"].values()) == pytest.approx(outputs.dimensions[0].tolist(), abs=2e-6)
    request = processor.apply_request(ROWS[0]["audio"])
    reply = model.generate(**request, max_new_tokens=6, do_sample=False)[0, request["input_ids"].shape[1] :]
    assert found["reply"] == processor.tokenizer.decode(reply, skip_special_tokens=True).strip()


def test_the_head_shares_its_probability_among_the_labels_in_use():
    model, processor = tiny_model(), tiny_processor()
    with torch.no_grad():
        logits = model(**processor.apply_request(ROWS[0]["audio"])).emotion_logits[0]
    (four,) = SpeechPredictor(model, processor, Questions(("ser",), EMOTIONS[:4])).predict(ROWS[:1])
    expected = logits[:4].softmax(-1).tolist()
    assert list(four["recognition"]["head"].values()) == pytest.approx(expected, abs=2e-6)
    (every,) = SpeechPredictor(model, processor, Questions(("ser",), ALL)).predict(ROWS[:1])
    assert every["recognition"]["head"]["fear"] == 0.0 and set(every["recognition"]["likelihood"]) == set(ALL)


@pytest.mark.parametrize("name", ["Mistral v3", "Phi-3", "GPT-OSS", "Qwen3", "GLM-4", "Llama 2"])
def test_an_answer_is_what_training_labels_where_the_llm_has_a_template_of_its_own(name: str, tmp_path):
    tokenizer = save_tokenizer(name, tmp_path)
    template = build_chat_template(tokenizer)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "sad"}]
    form = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    labelled = tokenizer.apply_chat_template(turns, chat_template=template, **form)
    pairs = zip(labelled["input_ids"], labelled["assistant_masks"], strict=True)
    assert answer_tokens(tokenizer, template, "sad") == [token for token, is_label in pairs if is_label]


def test_text_only_is_the_bare_llm_reading_the_transcript():
    llm, tokenizer = tiny_llm(), tiny_tokenizer()
    model = ReLLMForConditionalGeneration.from_towers(
        audio=tiny_model().model.audio_tower, text=llm, lora={"r": 4}, tokenizer=tokenizer, projector_inner_dim=16
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    questions = Questions(("ser", "empathy"), EMOTIONS, 6)
    found = TextPredictor(model.model.text_model, tokenizer, TEMPLATE, questions).predict(ROWS)
    bare = tiny_llm()
    for row, part in zip(ROWS, found, strict=True):
        turn = [{"role": "user", "content": f"{RECOGNITION_PROMPT}{row['text']}"}]
        text = tokenizer.apply_chat_template(turn, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        generated = bare.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert part["recognition"]["generated"]["text"] == answer
        answers = [answer_tokens(tokenizer, TEMPLATE, name) for name in EMOTIONS]
        expected = naive_scores(bare, [dict(inputs)], answers)[0].softmax(-1).tolist()
        assert list(part["recognition"]["likelihood"].values()) == pytest.approx(expected, abs=2e-5)
        assert "head" not in part["recognition"] and "dimensions" not in part


def test_a_row_that_cannot_be_read_is_an_error_and_the_others_go_on(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    predictor = SpeechPredictor(tiny_model(), tiny_processor(), Questions(("dimensions",), EMOTIONS))
    found = predictor.predict([{"id": "bad", "audio": str(tmp_path / "bad.wav")}, *ROWS[:1]])
    assert set(found[0]) == {"error"} and "bad.wav" in found[0]["error"] and "dimensions" in found[1]
    reader = TextPredictor(tiny_llm(), tiny_tokenizer(), TEMPLATE, Questions(("ser",), EMOTIONS))
    assert reader.predict([{"id": "mute", "text": None}, {"id": "blank", "text": " "}]) == [
        {"error": "no transcript"},
        {"error": "no transcript"},
    ]


def test_a_number_that_is_none_is_an_error():
    assert number(0.12345678) == 0.123457
    with pytest.raises(ValueError, match="--dtype float32"):
        number(float("nan"))


def test_a_system_that_contradicts_the_checkpoint_says_what_to_do():
    fused, bare, llm = tiny_config(), tiny_config(fusion="none"), AutoConfig.for_model("llama")
    assert resolve_system(fused, None, "m") == "re-llm" and resolve_system(bare, None, "m") == "speech-only"
    assert resolve_system(llm, None, "m") == resolve_system(fused, "text-only", "m") == "text-only"
    with pytest.raises(ValueError, match="recipes/ablations/no_emotion_fusion.yaml"):
        resolve_system(fused, "speech-only", "m")
    with pytest.raises(ValueError, match="recipes/stage2_emotion.yaml"):
        resolve_system(bare, "re-llm", "m")
    with pytest.raises(ValueError, match="--system text-only"):
        resolve_system(llm, "re-llm", "m")
    with pytest.raises(ValueError, match="expected a ReLLM or a causal LM"):
        resolve_system(AutoConfig.for_model("wav2vec2"), None, "m")
