"""`/v1/chat/completions` and `/v1/emotion` through OpenAI's own client, against the model run by itself."""

import re
from pathlib import Path

import numpy as np
import pytest
from served import NAME, as_read, audio_file, clip, clip_part, own_conversation, reply_alone, serving, user
from tiny_models import conversation_inputs

from relllm.inference.conversation import Conversation
from relllm.inference.replies import hear
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT

CLIPS = [clip(0.6), clip(2.7, seed=1), clip(0.4, seed=2)]
CONVERSATIONS = {
    "one clip": ([user(CLIPS[0])], CLIPS[:1]),
    "text only": ([{"role": "user", "content": "How are you?"}], []),
    "several clips and turns": (
        [
            {"role": "system", "content": "You are kind."},
            user("Listen: ", CLIPS[0], " and ", CLIPS[1]),
            {"role": "assistant", "content": "That sounds hard."},
            user(CLIPS[2]),
        ],
        CLIPS,
    ),
}


@pytest.fixture(scope="module")
def server(model, processor):
    with serving(model, processor) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def ask(client, messages, **options):
    return client.chat.completions.create(model=NAME, messages=messages, **{"max_tokens": 8, **options})


def text_of(completion) -> str:
    return completion.choices[0].message.content


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_answer_is_what_generate_gives(client, model, processor, kind: str) -> None:
    messages, waveforms = CONVERSATIONS[kind]
    assert text_of(ask(client, messages)) == reply_alone(model, processor, messages, waveforms)


def test_a_request_in_the_words_of_the_training_gets_the_reply_of_relllm_reply(client, model, processor) -> None:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, user(SPEECH_PROMPT, CLIPS[0])]
    assert (
        text_of(ask(client, messages)).strip()
        == Conversation(model, processor).say(as_read(CLIPS[0]), max_new_tokens=8).text
    )


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_stream_is_the_answer_in_pieces(client, kind: str) -> None:
    messages, _ = CONVERSATIONS[kind]
    whole = ask(client, messages)
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text_of(whole)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[0].emotion == whole.emotion
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_ends_with_the_reason(client) -> None:
    chunks = list(ask(client, CONVERSATIONS["one clip"][0], stream=True))
    assert chunks[-1].choices[0].finish_reason == "length" and all(chunk.usage is None for chunk in chunks)


def test_usage_counts_the_prompt_and_its_audio(client, model, processor) -> None:
    messages, waveforms = CONVERSATIONS["several clips and turns"]
    usage = ask(client, messages, max_tokens=5).usage
    ids = conversation_inputs(processor, own_conversation(messages, waveforms))["input_ids"]
    assert usage.prompt_tokens == ids.shape[1] and usage.completion_tokens == 5
    assert usage.total_tokens == ids.shape[1] + 5
    assert usage.prompt_tokens_details.audio_tokens == (ids == model.config.audio_token_id).sum()


def test_the_emotion_of_every_clip_comes_with_its_message(client, model, processor) -> None:
    messages, waveforms = CONVERSATIONS["several clips and turns"]
    found = ask(client, messages).emotion
    assert [heard["message"] for heard in found] == [1, 1, 3]
    for heard, expected in zip(found, hear(model, processor, [as_read(each) for each in waveforms]), strict=True):
        assert heard["emotion"] == expected.emotion
        assert heard["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        assert heard["dimensions"] == pytest.approx(expected.dimensions, abs=1e-5)


def test_emotion_alone_is_what_hear_gives(client, model, processor) -> None:
    body = {"model": NAME, "input": [clip_part(waveform) for waveform in CLIPS]}
    answer = client.post("/emotion", body=body, cast_to=object)
    for heard, expected in zip(answer["data"], hear(model, processor, [as_read(each) for each in CLIPS]), strict=True):
        assert heard["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        assert heard["dimensions"] == pytest.approx(expected.dimensions, abs=1e-5)
        assert heard["emotion"] == expected.emotion
    assert answer["usage"]["audio_seconds"] == pytest.approx(sum(map(len, CLIPS)) / 16_000, abs=1e-3)


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_other_containers_are_read(client, processor, model, kind: str) -> None:
    data = audio_file(CLIPS[0], kind=kind)
    found = ask(client, [{"role": "user", "content": [clip_part(data, kind.lower())]}])
    [expected] = hear(model, processor, [data])
    assert found.emotion[0]["dimensions"] == pytest.approx(expected.dimensions, abs=1e-5)


def test_another_sampling_rate_and_stereo_are_read(client, model, processor) -> None:
    stereo = np.stack([clip(0.5, rate=44_100), clip(0.5, seed=3, rate=44_100)], axis=1)
    data = audio_file(stereo, rate=44_100)
    found = ask(client, [{"role": "user", "content": [clip_part(data)]}])
    [expected] = hear(model, processor, [data])
    assert found.emotion[0]["dimensions"] == pytest.approx(expected.dimensions, abs=1e-5)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_a_draw_with_a_seed_is_that_of_generate(client, model, processor, settings: dict) -> None:
    messages, waveforms = CONVERSATIONS["one clip"]
    expected = reply_alone(model, processor, messages, waveforms, seed=11, **settings)
    first, again = (text_of(ask(client, messages, seed=11, **settings)) for _ in range(2))
    assert first == again == expected
    assert text_of(ask(client, messages, seed=12, **settings)) != first


def test_draws_without_a_seed_differ(client) -> None:
    messages = CONVERSATIONS["one clip"][0]
    assert len({text_of(ask(client, messages, temperature=2.0, max_tokens=16)) for _ in range(3)}) == 3


def test_a_reply_ends_at_the_end_of_its_turn(client, processor, model, monkeypatch) -> None:
    messages, waveforms = CONVERSATIONS["one clip"]
    inputs = conversation_inputs(processor, own_conversation(messages, waveforms))
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[3])
    with serving(model, processor) as running, running.client() as other:
        completion = ask(other, messages)
    end = tokens.index(tokens[3])
    assert completion.choices[0].finish_reason == "stop" and completion.usage.completion_tokens == end + 1
    assert text_of(completion) == processor.tokenizer.decode(tokens[:end])


def test_max_completion_tokens_is_max_tokens(client) -> None:
    messages = CONVERSATIONS["text only"][0]
    assert ask(client, messages, max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_an_answer_can_be_sent_back_as_a_turn(client) -> None:
    messages = CONVERSATIONS["one clip"][0]
    answer = ask(client, messages).choices[0].message.model_dump()
    assert text_of(ask(client, [*messages, answer, user("And then?")]))


def test_the_models_are_listed(client) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME


def test_the_python_of_the_documentation_runs(server, tmp_path, monkeypatch, capsys) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    stand_ins = {"http://127.0.0.1:8000": server.url, '"re-llm"': f'"{NAME}"', "max_tokens=128": "max_tokens=8"}
    for written, stand_in in stand_ins.items():
        assert written in block
        block = block.replace(written, stand_in)
    monkeypatch.chdir(tmp_path)
    Path("question.wav").write_bytes(audio_file(CLIPS[0]))
    names: dict = {}
    exec(compile(block, "serving.md", "exec"), names)
    names["client"].close()
    assert "probabilities" in capsys.readouterr().out
