"""`relllm chat`, driven by piped lines, and the systems that answer beside RE-LLM."""

import json
import os
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import (
    RATE,
    clip,
    tiny_audio_config,
    tiny_config,
    tiny_llm,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Processor
from typer.testing import CliRunner

from relllm.cli import app
from relllm.cli.chatting import Chat, complete_line
from relllm.inference.conversation import Conversation
from relllm.inference.replies import Reply
from relllm.inference.text_conversation import NoWordsError, TextConversation, Transcriber
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.processing.prompts_relllm import SPEECH_PROMPT
from relllm.processing.turns_relllm import build_chat_template


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, processor) -> str:
    folder = tmp_path_factory.mktemp("re-llm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def speech_only(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("speech-only")
    config = tiny_config(fusion="none")
    tiny_model(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory) -> str:
    """A CTC checkpoint that hears letters in noise."""
    folder = tmp_path_factory.mktemp("recogniser")
    letters = ["<pad>", "|", *"abcdefghijklmnopqrstuvwxyz", "<s>", "</s>", "<unk>", "'"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer).save_pretrained(folder)
    torch.manual_seed(3)
    Wav2Vec2ForCTC(tiny_audio_config("wav2vec2")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def wav(tmp_path) -> str:
    path = tmp_path / "a question.wav"
    soundfile.write(path, clip(0.6), RATE)
    return str(path)


def chat(checkpoint: str, *lines: str, options: tuple[str, ...] = ()) -> str:
    command = ["chat", checkpoint, "--device", "cpu", "--max-new-tokens", "4", *options]
    result = CliRunner().invoke(app, command, input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    return result.output


def replies(model, processor, *turns: tuple) -> list[str]:
    conversation = Conversation(model, processor)
    return [conversation.say(audio, text, max_new_tokens=4).text for audio, text in turns]


def test_typed_and_spoken_lines_are_one_conversation(checkpoint, model, processor, wav) -> None:
    output = chat(checkpoint, "Hello.", f"/wav {wav}", "And you?", "/quit", "not read")
    expected = replies(model, processor, (None, "Hello."), (wav, None), (None, "And you?"))
    at = 0
    for reply in expected:
        at = output.index(reply, at) + len(reply)
    assert output.count("arousal") == output.count("valence") == 1
    assert "not read" not in output


def test_the_end_of_the_input_ends_the_chat(checkpoint) -> None:
    assert "you: Hello." in chat(checkpoint, "Hello.")


def test_text_behind_a_file_is_said_with_it(checkpoint, model, processor, tmp_path) -> None:
    soundfile.write(tmp_path / "x.wav", clip(0.6), RATE)
    output = chat(checkpoint, f"/wav {tmp_path / 'x.wav'} What is it?")
    assert replies(model, processor, (str(tmp_path / "x.wav"), "What is it?"))[0] in output


def test_a_bad_file_is_named_and_the_conversation_goes_on(checkpoint, model, processor, tmp_path) -> None:
    (tmp_path / "bad.wav").write_text("this is no audio")
    output = chat(checkpoint, "Hello.", f"/wav {tmp_path / 'bad.wav'}", "/wav gone.wav", "/wav", "And you?")
    assert output.count("not read:") == 2
    assert "bad.wav" in output and "gone.wav" in output and "/wav needs a file" in output
    assert replies(model, processor, (None, "Hello."), (None, "And you?"))[1] in output


def test_a_long_text_behind_a_file_and_a_path_that_cannot_be_are_no_end_of_the_chat(
    checkpoint, model, processor, tmp_path
) -> None:
    soundfile.write(tmp_path / "x.wav", clip(0.6), RATE)
    text = "What do you hear in it? " * 20
    output = chat(checkpoint, f"/wav {tmp_path / 'x.wav'} {text}", f"/save {'x' * 300}.md", "/wav ~nobody-here/a.wav")
    assert replies(model, processor, (str(tmp_path / "x.wav"), text.strip()))[0] in output
    assert "not saved: " in output and "not read: No such audio file: ~nobody-here/a.wav" in output


def test_a_channel_of_a_file_is_heard(checkpoint, model, processor, tmp_path) -> None:
    call = str(tmp_path / "call.wav")
    soundfile.write(call, np.stack([clip(0.6), clip(0.6, seed=1)], axis=1), RATE)
    output = chat(checkpoint, f"/wav {call}", options=("--channel", "right"))
    right = soundfile.read(call, dtype="float32")[0][:, 1]
    assert str(Conversation(model, processor).say(right, max_new_tokens=1).heard) in output


def test_reset_begins_anew(checkpoint, model, processor) -> None:
    output = chat(checkpoint, "Hello.", "/reset", "Hello.")
    assert output.count(replies(model, processor, (None, "Hello."))[0]) == 2


def test_help_lists_the_commands_and_an_unknown_one_is_named(checkpoint) -> None:
    output = chat(checkpoint, "/help", "/sing")
    assert all(command in output for command in ("/wav", "/record", "/reset", "/quit"))
    assert "No such command: /sing" in output

    def fails() -> None:
        raise ValueError("no fault of a file")

    with pytest.raises(ValueError, match="no fault of a file"):
        Chat({"RE-LLM": types.SimpleNamespace(reset=fails)}, None).handle("/reset")


@pytest.mark.parametrize("line", ["Never mind.", "/record"])
def test_ctrl_c_forgets_the_turn_and_the_chat_goes_on(checkpoint, model, processor, monkeypatch, line) -> None:
    say = Conversation.say
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return say(self, *args, **kwargs)

    monkeypatch.setattr(Conversation, "say", interrupted)
    monkeypatch.setattr("relllm.cli.chatting.record", lambda until: clip(0.3))
    output = chat(checkpoint, "Hello.", line, "And you?")
    monkeypatch.undo()
    assert "Stopped: this turn is forgotten.\n" in output and output.count("forgotten") == 1
    assert replies(model, processor, (None, "Hello."), (None, "And you?"))[1] in output


def test_ctrl_c_says_what_was_forgotten_and_nothing_else(monkeypatch, capsys) -> None:
    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    says = (lambda *_, **options: Reply("Yes.", None), interrupted)
    systems = [types.SimpleNamespace(tokenizer=None, say=say) for say in says]
    chat = Chat(dict(zip(("RE-LLM", "speech only"), systems, strict=True)), types.SimpleNamespace(max_new_tokens=4))
    assert chat.handle("Hello.") and list(chat.turns[0]["replies"]) == ["RE-LLM"]
    assert capsys.readouterr().out.endswith("Stopped: this turn is forgotten by speech only.\n")
    monkeypatch.setattr(Chat, "_save", interrupted)
    assert chat.handle("/save talk.md") and capsys.readouterr().out == "\nStopped.\n"


def test_a_recording_is_said(checkpoint, model, processor, monkeypatch) -> None:
    """A stand-in for sounddevice that records one clip in two blocks."""
    waveform = clip(0.6)

    class InputStream:
        def __init__(self, callback, samplerate, **_: object):
            assert samplerate == RATE
            self.callback = callback

        def __enter__(self) -> None:
            for block in np.array_split(waveform, 2):
                self.callback(block[:, None], len(block), None, None)

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

    module = types.SimpleNamespace(
        InputStream=InputStream,
        PortAudioError=RuntimeError,
        query_devices=lambda kind: {"default_samplerate": float(RATE)},
    )
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    output = chat(checkpoint, "/record", "", "/quit")
    assert replies(model, processor, (waveform, None))[0] in output and "arousal" in output


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt, EOFError])
def test_what_ends_a_recording_does_not_end_the_chat(checkpoint, model, processor, monkeypatch, ended_by) -> None:
    def interrupted(until: object) -> None:
        raise ended_by

    monkeypatch.setattr("relllm.cli.chatting.record", interrupted)
    output = chat(checkpoint, "/record", "Hello.")
    assert "this recording is forgotten" in output and replies(model, processor, (None, "Hello."))[0] in output


def test_what_interrupts_the_reading_of_a_file_forgets_that_turn_alone(
    checkpoint, model, processor, wav, monkeypatch
) -> None:
    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReLLMFeatureExtractor, "read_clip", interrupted)
    output = chat(checkpoint, f"/wav {wav}", "Hello.")
    assert "this turn is forgotten" in output and replies(model, processor, (None, "Hello."))[0] in output


def test_a_file_is_as_long_as_the_checkpoint_takes(model, processor, wav, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["feature_extractor"]["max_duration_s"] = 0.2
    path.write_text(json.dumps(settings))
    assert "the limit is 0.2 s" in chat(str(tmp_path), f"/wav {wav}")


def test_without_sounddevice_or_a_microphone_the_chat_says_what_is_missing(checkpoint, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert "relllm[mic]" in chat(checkpoint, "/record", "Hello.")

    def no_device(kind: str) -> dict:
        raise RuntimeError("no such device")

    module = types.SimpleNamespace(PortAudioError=RuntimeError, query_devices=no_device)
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    assert "The microphone does not open" in chat(checkpoint, "/record", "Hello.")


def test_the_baselines_answer_each_turn_too(checkpoint, speech_only, recogniser, model, processor, wav) -> None:
    options = ("--speech-only", speech_only, "--text-only", "own", "--transcriber", recogniser)
    output = chat(checkpoint, "Hello.", f"/wav {wav}", options=options)
    for name in ("RE-LLM", "speech only", "text only"):
        assert output.count(f"{name}\n") == 2
    bare = TextConversation.inside(model, processor, transcriber=Transcriber(recogniser))
    assert bare.say(None, "Hello.", max_new_tokens=4).text in output
    assert bare.say(wav, None, max_new_tokens=4).text in output
    assert "not answered" not in output


def test_a_text_only_llm_without_a_transcriber_says_that_it_has_no_words(checkpoint, wav) -> None:
    output = chat(checkpoint, f"/wav {wav}", "Hello.", options=("--text-only", "own"))
    assert "has no words to read" in output and output.count("not answered:") == 1


def test_a_transcriber_without_a_reader_is_an_error(checkpoint) -> None:
    result = CliRunner().invoke(app, ["chat", checkpoint, "--transcriber", "x"])
    assert result.exit_code == 2 and "--text-only" in result.output


def test_the_llm_inside_replies_as_the_bare_llm_does(model, processor) -> None:
    """Against a bare LLM that has the same weights and never had a LoRA."""
    bare = tiny_llm(layers=2)
    inside = model.model.text_model.state_dict()
    weights = {name.replace(".base_layer.", "."): value for name, value in inside.items() if "lora_" not in name}
    bare.load_state_dict(weights)
    given = model.generation_config
    options = {"eos_token_id": given.eos_token_id, "suppress_tokens": given.suppress_tokens}
    own = TextConversation.inside(model, processor)
    other = TextConversation(bare, processor.tokenizer, **options)
    for text in ("Hello.", "And you?"):
        assert own.say(text=text, max_new_tokens=6).text == other.say(text=text, max_new_tokens=6).text
    assert own.messages == other.messages and len(own.messages) == 5


def test_a_spoken_turn_is_read_as_instruction_and_transcript(recogniser) -> None:
    words = Transcriber(recogniser)(clip(0.6))
    assert words
    conversation = TextConversation(tiny_llm(), tiny_tokenizer(), transcriber=Transcriber(recogniser))
    conversation.say(clip(0.6), max_new_tokens=2)
    assert conversation.messages[1]["content"] == SPEECH_PROMPT + words
    tokenizer = tiny_tokenizer()
    assert conversation.chat_template == build_chat_template(tokenizer)


def test_a_turn_that_fails_is_not_in_the_text_conversation() -> None:
    conversation = TextConversation(tiny_llm(), tiny_tokenizer(), transcriber=lambda audio: "")
    before = list(conversation.messages)
    with pytest.raises(NoWordsError, match="found no words"):
        conversation.say(clip(0.6))
    with pytest.raises(ValueError, match="needs audio or text"):
        conversation.say(text=" ")
    assert conversation.messages == before


def test_a_bare_llm_reads_no_more_than_it_can_and_older_turns_may_be_dropped() -> None:
    llm = tiny_llm()
    llm.config.max_position_embeddings = 200
    conversation = TextConversation(llm, tiny_tokenizer())
    conversation.say(text="Hello.", max_new_tokens=4)
    with pytest.raises(ValueError, match=r"the LLM reads 200\."):
        conversation.say(text="a long story " * 9, max_new_tokens=100)
    turn = conversation.say(text="a long story", max_new_tokens=90, drop_oldest=True)
    alone = TextConversation(llm, conversation.tokenizer)
    assert turn.dropped == 1 and turn.text == alone.say(text="a long story", max_new_tokens=90).text
    assert conversation.messages == alone.messages


def test_the_chat_says_that_older_turns_were_dropped(checkpoint) -> None:
    output = chat(checkpoint, *["a long story " * 60] * 2)
    assert output.count("RE-LLM: older turns were dropped (1).") == 1 and "not answered" not in output


def test_a_line_that_is_not_utf8_is_said_and_named(checkpoint) -> None:
    lines = b"caf\xe9\nAnd you?\n"
    result = CliRunner().invoke(app, ["chat", checkpoint, "--device", "cpu", "--max-new-tokens", "4"], input=lines)
    assert result.exit_code == 0 and "what is not UTF-8" in result.output and "you: And you?" in result.output


def test_a_file_in_quotes_and_a_name_with_brackets_are_said_as_they_are(
    checkpoint, model, processor, tmp_path
) -> None:
    name = str(tmp_path / "take[1] [x] :cat:.wav")
    soundfile.write(name, clip(0.6), RATE)
    output = chat(checkpoint, f'/wav "{name}" What is it?', f"/wav {name}.gone", "[/x] [bold]")
    assert replies(model, processor, (name, "What is it?"))[0] in output and f'you: /wav "{name}"' in output
    assert "No such audio file" in output and "you: [/x] [bold]\n" in output


def test_a_conversation_is_saved_as_json_and_markdown(checkpoint, model, processor, wav, tmp_path) -> None:
    saved, page = tmp_path / "talk.json", tmp_path / "my talk.md"
    (tmp_path / "there.md").write_text("Mine.")
    lines = ("Hello.", f"/wav {wav}", f"/save {saved}", f'/save "{page}"', f"/save {tmp_path / 'there.md'}", "/save x")
    output = chat(checkpoint, *lines, f"/save {saved}")
    talk = json.loads(saved.read_text())
    expected = replies(model, processor, (None, "Hello."), (wav, None))
    assert [turn["replies"]["RE-LLM"]["reply"] for turn in talk["turns"]] == expected
    assert talk["turns"][1]["audio"] == wav and sum(
        talk["turns"][1]["replies"]["RE-LLM"]["probabilities"].values()
    ) == pytest.approx(1)
    assert "**you:** Hello." in page.read_text() and "*heard: " in page.read_text()
    assert (tmp_path / "there.md").read_text() == "Mine." and output.count("is there already") == 1
    assert ".json or .md" in output and output.count("2 turns in") == 3


def test_a_save_that_fails_leaves_the_one_before(checkpoint, tmp_path, monkeypatch) -> None:
    saved, calls = tmp_path / "talk.json", []
    write = os.fsync

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError("No space left on device")
        write(file)

    monkeypatch.setattr("os.fsync", full)
    output = chat(checkpoint, "Hello.", f"/save {saved}", "And you?", f"/save {saved}")
    assert "not saved: No space left" in output and len(json.loads(saved.read_text())["turns"]) == 1


def test_tab_completes_commands_and_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.wav").touch()
    (tmp_path / "ab.wav").touch()
    (tmp_path / "sub").mkdir()
    assert complete_line("/w") == ["/wav "] and complete_line("Hello") == []
    assert complete_line("/wav a") == ['/wav "a b.wav"', "/wav ab.wav"]
    assert complete_line('/wav "a ') == ['/wav "a b.wav"'] and complete_line("/save su") == ["/save sub/"]


def test_draws_are_those_of_the_seed_and_the_default_is_greedy(checkpoint, wav) -> None:
    drawn = [chat(checkpoint, "Hello.", options=("--temperature", "2", "--seed", seed)) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2] and chat(checkpoint, "Hello.") not in drawn
    for wrong, message in ((["--seed", "1"], "--temperature above 0"), (["--temperature", "0.001"], "at least 0.01")):
        result = CliRunner().invoke(app, ["reply", checkpoint, wav, *wrong])
        assert result.exit_code == 2 and message in result.stderr


def test_reply_as_json_is_a_line_a_clip_with_every_reading(checkpoint, model, processor, tmp_path) -> None:
    call = str(tmp_path / "call.wav")
    soundfile.write(call, np.stack([clip(0.6), clip(0.6, seed=1)], axis=1), RATE)
    options = ["--json", "--channel", "each", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, ["reply", checkpoint, call, "gone.wav", *options])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["clip"], line.get("channel")) for line in lines] == [
        (call, "left"),
        (call, "right"),
        ("gone.wav", None),
    ]
    assert result.exit_code == 1 and "No such audio file" in lines[2]["error"]
    samples = soundfile.read(call, dtype="float32")[0][:, 1]
    turn = Conversation(model, processor).say(samples, max_new_tokens=4)
    assert lines[1]["reply"] == turn.text and lines[1]["dimensions"] == pytest.approx(turn.heard.dimensions, abs=1e-5)
    assert lines[1]["tower_dimensions"].keys() == {"arousal", "dominance", "valence"}
