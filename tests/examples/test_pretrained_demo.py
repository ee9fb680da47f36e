"""The parts of the demo on pretrained towers, on tiny ones: its corpus, joining, going on, what is understood."""

import io
import itertools
import math

import pytest
import soundfile
import torch
from datasets import Dataset
from joining import RESERVED, grow_stage1, join_towers, tokenizer_with_audio
from pretrained_demo import AUDIO_MODEL, TEXT_MODEL, app, find_models
from rich.console import Console
from safetensors import safe_open
from sentences import plan_sentence, plan_sentences
from tiny_models import clip, tiny_emotion_tower, tiny_llm, tiny_speech_tower, tiny_tokenizer
from transformers import AutoModel
from typer.testing import CliRunner
from understanding import _log_likelihood, _other_places, _turns, measure_understanding, word_errors

from relllm import ReLLMProcessor
from relllm.demo.steps import claim_folder, once
from relllm.demo.synthetic import SPLITS, VOICES
from relllm.labels import EMOTIONS

pytest.importorskip("jiwer", reason="the demo's word error rates need `pip install relllm[demo]`")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    tiny_speech_tower("whisper").save_pretrained(folder / "speech")
    tiny_emotion_tower().save_pretrained(folder / "emotion")
    tiny_llm(tied=True).save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    return folder


@pytest.fixture(scope="module")
def joined(towers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined") / "joined"
    torch.manual_seed(0)
    join_towers(str(towers / "speech"), str(towers / "llm"), folder)
    return folder


@pytest.fixture(scope="module")
def wide(towers, joined, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide") / "wide"
    grow_stage1(joined, towers / "emotion", folder)
    return folder


# --- the corpus


def test_no_sentence_and_no_voice_is_in_two_splits():
    plans = {split: [clip.row for clip in plan_sentences(split, 60, seed=0)] for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {row["text"] for row in plans[one]} & {row["text"] for row in plans[other]}
        assert not {row["speaker"] for row in plans[one]} & {row["speaker"] for row in plans[other]}
    assert {row["speaker"] for row in plans["test"]} <= set(VOICES["test"])


def test_five_test_clips_in_a_row_differ_in_the_emotion_alone():
    rows = [plan_sentence("test", number, seed=3).row for number in range(10)]
    for turn in (rows[:5], rows[5:]):
        assert [row["emotion"] for row in turn] == list(EMOTIONS)
        assert len({(row["text"], row["speaker"]) for row in turn}) == 1
    assert rows[0]["text"] != rows[5]["text"]


def test_training_clips_say_many_sentences_and_the_reply_names_their_topic():
    rows = [clip.row for clip in plan_sentences("train", 100, seed=0)]
    assert len({row["text"] for row in rows}) > 450
    for row in rows:
        topic = row["text"].split(" the ")[1].split(" ")[0]
        assert f"the {topic}" in row["response"]


def test_a_clip_depends_on_its_place_and_the_seed_alone():
    few, many = (list(plan_sentences("train", count, seed=1)) for count in (3, 9))
    assert many[:15] == few
    assert list(plan_sentences("train", 3, seed=2)) != few


# --- joining


def test_the_emotion_tower_changes_nothing_before_it_is_trained(joined, wide):
    one, other = (AutoModel.from_pretrained(folder).eval() for folder in (joined, wide))
    assert other.config.emotion_fusion == "concat" and other.model.emotion_tower is not None
    clips = [clip(0.4), clip(1.3, seed=1)]
    hidden = []
    for model, folder in ((one, joined), (other, wide)):
        inputs = ReLLMProcessor.from_pretrained(folder).feature_extractor(clips)
        inputs.pop("num_audio_tokens")
        with torch.no_grad():
            hidden.append(model.get_audio_features(**inputs).pooler_output)
    torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-5)


def test_the_emotion_tower_can_be_learned_from_where_it_starts(joined, wide):
    model = AutoModel.from_pretrained(wide)
    inputs = ReLLMProcessor.from_pretrained(wide).feature_extractor([clip(1.0)])
    inputs.pop("num_audio_tokens")
    model.get_audio_features(**inputs).emotion_logits.sum().backward()
    width = AutoModel.from_pretrained(joined).model.multi_modal_projector.conv_layers[0].in_channels
    gradient = model.model.multi_modal_projector.conv_layers[0].weight.grad
    assert gradient[:, width:].abs().sum() > 0


def test_a_joined_checkpoint_holds_what_is_fresh_and_nothing_of_the_towers(joined):
    with safe_open(joined / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert names and all(any(part in name for part in ("projector", "head", "lora_")) for name in names)
    assert ReLLMProcessor.from_pretrained(joined).feature_extractor.full_window is False


def test_a_reserved_token_becomes_the_one_for_audio_and_no_row_is_added(tmp_path):
    tokenizer = tiny_tokenizer(audio_token=False)
    tokenizer.add_tokens([RESERVED], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    renamed = tokenizer_with_audio(str(tmp_path))
    assert len(renamed) == len(tokenizer) and RESERVED not in renamed.get_vocab()
    assert renamed.get_vocab()["<|audio|>"] == tokenizer.get_vocab()[RESERVED]
    assert renamed.eos_token == tokenizer.eos_token and renamed.pad_token == tokenizer.pad_token
    text = "<|im_start|>user\nTell me more.<|im_end|>"
    assert renamed(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_without_a_reserved_token_stays(tmp_path):
    tiny_tokenizer(audio_token=False).save_pretrained(tmp_path)
    assert "<|audio|>" not in tokenizer_with_audio(str(tmp_path)).get_vocab()


# --- going on


def test_a_step_that_goes_on_finds_what_was_left_and_another_does_not(tmp_path):
    for goes_on, expected in ((True, ["checkpoint-1"]), (False, [])):
        path = tmp_path / f"step-{goes_on}"
        left = path.with_name(path.name + ".partial") / "checkpoint-1"
        left.mkdir(parents=True)
        found = []

        def make(to, found=found):
            found += [entry.name for entry in to.glob("*")] if to.exists() else []
            to.mkdir(exist_ok=True)

        once(path, "a step", make, quiet(), goes_on=goes_on)
        assert found == expected and path.is_dir() and not left.exists()
        once(path, "a step", lambda to: pytest.fail("made again"), quiet(), goes_on=goes_on)


def test_a_folder_of_the_other_demo_is_refused(tmp_path):
    claim_folder(tmp_path, {"seed": 0})
    claim_folder(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="Choose another --out"):
        claim_folder(tmp_path, {"seed": 0, "backbone": "small"})


# --- where the models are


def test_models_are_where_they_are_said_to_be_else_in_the_folder_else_on_the_hub(tmp_path):
    assert find_models(None) == (AUDIO_MODEL, TEXT_MODEL)
    assert find_models(None, "org/whisper", "llm") == ("org/whisper", "llm")
    for name in ("whisper-tiny.en", "SmolLM2-135M-Instruct"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert find_models(tmp_path) == (str(tmp_path / "whisper-tiny.en"), str(tmp_path / "SmolLM2-135M-Instruct"))
    assert find_models(tmp_path, text="org/llm")[1] == "org/llm"


def test_a_folder_without_the_models_is_named(tmp_path):
    result = CliRunner().invoke(app, ["--real-models", str(tmp_path)])
    assert result.exit_code == 2 and "whisper-tiny.en/config.json" in " ".join(result.output.split())


# --- understanding


def test_word_errors_ignore_case_and_punctuation():
    assert word_errors(["The cat sat."], ["the cat sat"]) == 0
    assert word_errors(["The cat sat."], ["the dog sat"]) == pytest.approx(1 / 3)
    assert word_errors(["The cat sat."], [""]) == 1


def test_another_clip_has_other_words():
    assert _other_places(["a", "a", "b", "c"]) == [2, 2, 3, 0]


def test_the_likelihood_is_that_of_the_answers_tokens(joined):
    model, processor = AutoModel.from_pretrained(joined).eval(), ReLLMProcessor.from_pretrained(joined)
    answer = "Tell me more."
    asked = [_turns({"type": "audio", "audio": clip(0.5)}, "Listen: ")]
    found = _log_likelihood(model, processor, asked, [answer])
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True, add_generation_prompt=True)
    tokens = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    total = 0.0
    for token in tokens:
        with torch.no_grad():
            total += float(model(**inputs).logits[0, -1].log_softmax(-1)[token])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert found == pytest.approx(total / len(tokens), abs=1e-4)


def test_understanding_is_measured_of_speech_transcript_and_nothing(joined, tmp_path):
    model, processor = AutoModel.from_pretrained(joined).eval(), ReLLMProcessor.from_pretrained(joined)
    rows = []
    for index, text in enumerate(("Tell me more.", "Tell me more.", "I am so sorry.")):
        soundfile.write(tmp_path / f"{index}.wav", clip(0.5, seed=index), 16_000)
        rows.append({"audio": str(tmp_path / f"{index}.wav"), "text": text})
    found = measure_understanding(model, processor, Dataset.from_list(rows))
    assert set(found.word_error_rate) == {"speech", "transcript", "other words"}
    assert set(found.log_likelihood) == {"transcript", "speech", "another clip's speech", "nothing"}
    assert all(math.isfinite(value) and value < 0 for value in found.log_likelihood.values())
    assert [said for said, _ in found.repeated] == [row["text"] for row in rows]
