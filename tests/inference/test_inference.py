"""`relllm.inference.replies` and the `relllm` command."""

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import clip, tiny_config, tiny_processor
from transformers import TextStreamer
from typer.testing import CliRunner

from relllm.cli import app
from relllm.inference.conversation import Conversation
from relllm.inference.replies import hear


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, processor):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_reply_is_what_generate_gives_and_the_emotion_what_forward_gives(model, processor):
    answer = Conversation(model, processor).say(clip(0.7), max_new_tokens=8)
    inputs = processor.apply_request(clip(0.7))
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.text == text.strip()
    outputs = model(**inputs)
    probabilities = list(answer.heard.probabilities.values())
    np.testing.assert_allclose(probabilities, outputs.emotion_logits[0].softmax(-1).tolist(), atol=1e-6)
    assert list(answer.heard.probabilities) == model.config.emotion_labels
    assert answer.heard.emotion == model.config.emotion_labels[int(outputs.emotion_logits[0].argmax())]
    np.testing.assert_allclose(list(answer.heard.dimensions.values()), outputs.dimensions[0].tolist(), atol=1e-6)


def test_the_audio_is_encoded_once_for_reply_and_emotion(model, processor):
    calls = []
    handle = model.model.audio_tower.layer_norm.register_forward_hook(lambda *_: calls.append(1))
    Conversation(model, processor).say(clip(0.5), max_new_tokens=4)
    handle.remove()
    assert len(calls) == 1


def test_a_streamer_gets_the_reply(model, processor, capsys):
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = Conversation(model, processor).say(clip(0.5), streamer=streamer, max_new_tokens=6)
    assert capsys.readouterr().out.strip() == answer.text


def test_hearing_many_clips_is_hearing_each(model, processor):
    clips = [clip(0.3 + 0.2 * index, seed=index) for index in range(5)]
    together = list(hear(model, processor, clips, batch_size=2))
    for waveform, heard in zip(clips, together, strict=True):
        with torch.no_grad():
            outputs = model(**processor.apply_request(waveform))
        np.testing.assert_allclose(list(heard.dimensions.values()), outputs.dimensions[0].tolist(), atol=1e-5)
        np.testing.assert_allclose(
            list(heard.probabilities.values()), outputs.emotion_logits[0].softmax(-1).tolist(), atol=1e-5
        )


def test_the_command_answers_files_and_says_what_it_heard(checkpoint, tmp_path):
    paths = [tmp_path / "first.wav", tmp_path / "second.flac"]
    for seed, path in enumerate(paths):
        soundfile.write(path, clip(0.5, seed=seed), 16_000)
    command = ["reply", str(checkpoint), *map(str, paths), "--max-new-tokens", "4", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    output = result.output.replace("\n", "")
    assert all(path.name in output for path in paths)
    assert output.count("arousal") == output.count("valence") == 2


def test_each_side_of_a_call_is_heard_and_answered_as_if_alone(checkpoint, model, processor, tmp_path):
    sides = [clip(0.5, seed=seed) for seed in (0, 1)]
    soundfile.write(tmp_path / "call.wav", np.stack(sides, axis=1), 16_000, subtype="FLOAT")
    call = str(tmp_path / "call.wav")
    command = ["reply", str(checkpoint), call, "--max-new-tokens", "4", "--device", "cpu", "--channel"]
    said = {way: CliRunner().invoke(app, [*command, way]).output for way in ("each", "left", "right", "mix")}
    heard = {
        side: str(Conversation(model, processor).say(own, max_new_tokens=4).heard)
        for side, own in zip("lr", sides, strict=True)
    }
    assert [heard[side] in said["each"] for side in "lr"] == [True, True]
    assert [heard["l"] in said[way] for way in ("left", "right", "mix")] == [True, False, False]
    assert heard["r"] in said["right"] and said["each"].count("arousal") == 2


def test_the_command_names_a_bad_file_and_answers_the_others(checkpoint, tmp_path):
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, clip(0.5), 16_000)
    bad.write_text("this is no audio")
    command = ["reply", str(checkpoint), str(bad), str(good), "--max-new-tokens", "4", "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "not answered" in result.output and result.output.count("arousal") == 1


def test_the_command_refuses_a_checkpoint_of_another_kind(tmp_path):
    from tiny_models import tiny_emotion_tower

    folder = tmp_path / "tower"
    tiny_emotion_tower().save_pretrained(folder)
    tiny_processor(tiny_config()).save_pretrained(folder)
    result = CliRunner().invoke(app, ["reply", str(folder), "any.wav", "--device", "cpu"])
    assert result.exit_code != 0 and "not a ReLLM" in result.output.replace("\n", " ")
