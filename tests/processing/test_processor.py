"""The processor: every way audio comes in, the placeholder's length, the labels' mask, and what is refused."""

import functools
import http.server
import io
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import (
    RATE,
    audio_inputs,
    audio_part,
    clip,
    conversation_inputs,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    user_turn,
)
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, WhisperFeatureExtractor

from relllm import ReLLMConfig, ReLLMFeatureExtractor, ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.modeling.audio_tower_relllm import count_frames
from relllm.modeling.projector_relllm import count_projected
from relllm.processing import audio_relllm

# WavLM's own attention, on a padded batch
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
AUDIO = "<|audio|>"


def wav_bytes(samples: np.ndarray, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, subtype="FLOAT", format="WAV")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    (path / "clip.wav").write_bytes(wav_bytes(clip(0.5)))
    return path


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/clip.wav"
    server.shutdown()
    thread.join()
    server.server_close()


def same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# --- where audio comes from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "source"),
    [("audio", source) for source in ("array", "tensor", "path", "Path", "url", "bytes", "file", "row")]
    + [("path", "path"), ("path", "Path"), ("url", "url"), ("bytes", "bytes")],
)
def test_every_source_gives_the_inputs_of_the_array(
    key: str, source: str, processor: ReLLMProcessor, folder: Path, url: str
) -> None:
    path = folder / "clip.wav"
    sources = {
        "array": clip(0.5),
        "tensor": torch.from_numpy(clip(0.5)),
        "path": str(path),
        "Path": path,
        "url": url,
        "bytes": path.read_bytes(),
        "file": io.BytesIO(path.read_bytes()),
        "row": {"array": clip(0.5), "sampling_rate": RATE},
    }
    part = {"type": "audio", key: sources[source]}
    found = conversation_inputs(processor, [user_turn("Listen: ", part)])
    assert same(found, conversation_inputs(processor, [user_turn("Listen: ", clip(0.5))]))


def test_keys_that_are_none_as_in_arrow_structs_count_as_absent(processor: ReLLMProcessor, folder: Path) -> None:
    nothing = {"audio": None, "url": None, "bytes": None, "text": None, "sampling_rate": None}
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "text", **nothing, "path": None, "text": "Listen: "},
                {"type": "audio", **nothing, "path": str(folder / "clip.wav")},
            ],
        }
    ]
    found = conversation_inputs(processor, conversation)
    assert same(found, conversation_inputs(processor, [user_turn("Listen: ", clip(0.5))]))


def test_an_audio_part_without_a_source_or_with_two_names_the_keys(processor: ReLLMProcessor) -> None:
    for part in ({"type": "audio"}, {"type": "audio", "path": "a.wav", "url": "http://127.0.0.1/a.wav"}):
        with pytest.raises(ValueError, match="exactly one of the keys.*'audio'.*'url'.*'path'"):
            conversation_inputs(processor, [user_turn(part)])


def test_arrays_of_another_rate_are_resampled_once_they_say_so(processor: ReLLMProcessor) -> None:
    slow = clip(0.5, rate=8_000)
    found = conversation_inputs(processor, [user_turn(audio_part(slow, sampling_rate=8_000))])
    row = conversation_inputs(processor, [user_turn(audio_part({"array": slow, "sampling_rate": 8_000}))])
    text = processor.apply_chat_template([user_turn(slow)], add_generation_prompt=True)
    called = processor(text=text, audio=slow, sampling_rate=8_000)
    assert found["input_values_mask"].sum() == 8_000
    assert same(found, row) and same(found, called)
    unsaid = conversation_inputs(processor, [user_turn(slow)])
    assert unsaid["input_values_mask"].sum() == 4_000


def test_calling_the_processor_equals_the_chat_template(processor: ReLLMProcessor) -> None:
    clips = [clip(0.5), clip(2.7), clip(0.9)]
    conversations = [[user_turn("a ", clips[0], " b ", clips[1])], [user_turn(clips[2])]]
    texts = [processor.apply_chat_template(turns, add_generation_prompt=True) for turns in conversations]
    expected = conversation_inputs(processor, conversations)
    assert texts[0].count(AUDIO) == 2
    assert same(processor(text=texts, audio=clips), expected)
    assert same(processor(text=texts, audio=[clips[:2], clips[2:]]), expected)


def test_apply_request_is_a_system_turn_an_instruction_and_the_audio(processor: ReLLMProcessor) -> None:
    words = {"instruction": "How do I feel? ", "system_prompt": "Listen well."}
    conversations = [
        [{"role": "system", "content": "Listen well."}, user_turn("How do I feel? ", clip(duration))]
        for duration in (0.5, 0.9)
    ]
    found = processor.apply_request(clip(0.5), **words)
    assert same(found, conversation_inputs(processor, conversations[0]))
    found = processor.apply_request([clip(0.5), clip(0.9)], **words)
    assert same(found, conversation_inputs(processor, conversations))
    bare = processor.apply_request(clip(0.5), instruction="", system_prompt="")
    assert same(bare, conversation_inputs(processor, [user_turn(clip(0.5))]))


# --- one reader ------------------------------------------------------------------------------------------------------

WAYS = ("call", "call, keyword", "request", "chat template", "chat template, keyword", "chat template, audio_kwargs")
SOURCES = ("path", "bytes", "array", "tensor")


def second_of_audio(processor: ReLLMProcessor, way: str, source: str, rate: int, folder: Path) -> dict:
    """Inputs of one second at `rate`; an array's rate is said beside it, where this way has a keyword for it."""
    samples = clip(1.0, rate=rate)
    content = wav_bytes(samples, rate)
    path = folder / f"{rate}.wav"
    path.write_bytes(content)
    audio = {"path": path, "bytes": content, "array": samples, "tensor": torch.from_numpy(samples)}[source]
    said = {"sampling_rate": rate}
    if way in ("call", "request") and source in ("array", "tensor"):
        audio = {"array": audio, **said}
    if way == "request":
        return processor.apply_request(audio, instruction="", system_prompt="")
    if way in ("call", "call, keyword"):
        text = processor.apply_chat_template([user_turn(clip(1.0))], add_generation_prompt=True)
        return processor(text=text, audio=audio, **(said if way == "call, keyword" else {}))
    if way == "chat template":
        return conversation_inputs(processor, [user_turn(audio_part(audio, **said))])
    keyword = said if way == "chat template, keyword" else {"processor_kwargs": {"audio_kwargs": said}}
    return conversation_inputs(processor, [user_turn(audio_part(audio))], **keyword)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_a_second_takes_as_many_positions_whatever_its_rate_and_the_way_it_comes(
    rate: int, processor: ReLLMProcessor, tmp_path: Path
) -> None:
    expected = processor.feature_extractor.count_tokens(RATE)
    reference = processor(text=AUDIO, audio=clip(1.0, rate=rate), sampling_rate=rate)
    for way in WAYS:
        for source in SOURCES:
            found = second_of_audio(processor, way, source, rate, tmp_path)
            assert int((found["input_ids"] == processor.audio_token_id).sum()) == expected, (way, source)
            assert int(found["input_values_mask"].sum()) == RATE, (way, source)
            torch.testing.assert_close(found["input_values"], reference["input_values"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("way", WAYS)
def test_a_clip_is_decoded_resampled_and_checked_once(
    way: str, source: str, processor: ReLLMProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        function = getattr(audio_relllm, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(audio_relllm, name, counted)

    for name in ("_decode", "resample", "_check_samples"):
        count(name)
    second_of_audio(processor, way, source, 48_000, tmp_path)
    decoded = int(source in ("path", "bytes"))
    assert calls == Counter(_decode=decoded, resample=1, _check_samples=1)


def test_what_was_read_is_taken_as_it_is_and_nothing_else_passes_for_it(processor: ReLLMProcessor) -> None:
    waveform = processor.feature_extractor.read_clip(clip(0.5))
    expected = conversation_inputs(processor, [user_turn(clip(0.5))])
    part = {"type": "audio", "waveform": waveform}
    assert same(conversation_inputs(processor, [user_turn(part)], sampling_rate=44_100), expected)
    assert part == {"type": "audio", "waveform": waveform}  # the caller's own is untouched
    read = processor.read_audio([user_turn(clip(0.5))])
    assert read[0]["content"][0].keys() == {"type", "waveform"}
    assert same(conversation_inputs(processor, read), expected)
    for wrong in (waveform.astype(np.float64), waveform[None]):
        with pytest.raises(TypeError, match="Clip 0: expected float32 of shape .samples,."):
            conversation_inputs(processor, [user_turn({"type": "audio", "waveform": wrong})])


# --- turns, batches, masks -------------------------------------------------------------------------------------------


def test_the_rendered_text_is_chatml_with_one_placeholder_a_clip(processor: ReLLMProcessor) -> None:
    conversation = [
        {"role": "system", "content": "Be kind."},
        user_turn("Hear: ", clip(0.5), " and ", clip(0.3)),
        {"role": "assistant", "content": "I see."},
        user_turn(clip(0.4)),
    ]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        f"<|im_start|>user\nHear: {AUDIO} and {AUDIO}<|im_end|>\n"
        "<|im_start|>assistant\nI see.<|im_end|>\n"
        f"<|im_start|>user\n{AUDIO}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_several_turns_and_clips_expand_in_order(processor: ReLLMProcessor) -> None:
    durations_s = (0.5, 0.3, 2.7)
    clips = [clip(duration, seed=index) for index, duration in enumerate(durations_s)]
    conversation = [
        user_turn("Hear: ", clips[0], " and ", clips[1]),
        {"role": "assistant", "content": "I see."},
        user_turn(clips[2]),
    ]
    inputs = conversation_inputs(processor, conversation)
    runs = run_lengths((inputs["input_ids"][0] == processor.audio_token_id).tolist())
    assert runs == [processor.feature_extractor.count_tokens(round(RATE * s)) for s in durations_s[:2]] + [
        2 * processor.feature_extractor.count_tokens(round(RATE * 1.35))
    ]
    assert inputs["audio_num_windows"].tolist() == [1, 1, 2]
    for window, samples in zip(inputs["input_values_mask"].sum(-1)[:2], clips[:2], strict=True):
        assert int(window) == len(samples)


def run_lengths(flags: list[bool]) -> list[int]:
    text = "".join("x" if flag else " " for flag in flags)
    return [len(run) for run in text.split()]


def test_a_ragged_batch_is_padded_on_the_left_and_each_clip_as_alone(processor: ReLLMProcessor) -> None:
    clips = [clip(0.9), clip(0.3, seed=1)]
    batch = conversation_inputs(processor, [[user_turn("A longer instruction: ", clips[0])], [user_turn(clips[1])]])
    alone = conversation_inputs(processor, [user_turn(clips[1])])
    length = alone["input_ids"].shape[1]
    assert batch["attention_mask"][1].tolist() == [0] * (batch["input_ids"].shape[1] - length) + [1] * length
    assert torch.equal(batch["input_ids"][1, -length:], alone["input_ids"][0])
    samples, frames = len(clips[1]), alone["input_features"].shape[-1]
    torch.testing.assert_close(batch["input_values"][1, :samples], alone["input_values"][0])
    assert not batch["input_values"][1, samples:].any()
    torch.testing.assert_close(batch["input_features"][1, :, :frames], alone["input_features"][0], rtol=0, atol=1e-5)


def test_the_assistant_mask_covers_exactly_the_replies_and_their_end_tokens(processor: ReLLMProcessor) -> None:
    replies = ["I am so sorry, what happened?", "Ünïcode too. <3"]
    conversation = [
        {"role": "system", "content": "Be kind."},
        user_turn("Hear: ", clip(0.5), " and ", clip(2.7)),
        {"role": "assistant", "content": replies[0]},
        user_turn(clip(0.3)),
        {"role": "assistant", "content": [{"type": "text", "text": replies[1]}]},
    ]
    for batch in ([conversation], [conversation, conversation[1:3]]):
        inputs = processor.apply_chat_template(
            batch, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        masks = torch.as_tensor(inputs["assistant_masks"]).bool()
        found = [processor.tokenizer.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        assert found[0] == f"{replies[0]}<|im_end|>{replies[1]}<|im_end|>"
        assert found[1:] == [f"{replies[0]}<|im_end|>"] * (len(batch) - 1)


# --- the token-count rule --------------------------------------------------------------------------------------------


def lengths_s() -> np.ndarray:
    """0.05 to 40 s in uneven steps, and the edges of frames and windows."""
    edges = [0.05, 0.0599375, 0.06, 0.0600625, 29.99, 29.9999375, 30.0, 30.0000625, 30.01, 39.99]
    return np.unique(np.concatenate([np.arange(0.05, 40.0, 0.0937), edges, [40.0]]))


@pytest.mark.parametrize("fusion", ["concat", "token"])
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "hubert-group", "wavlm"])
def test_processor_and_model_count_the_same_tokens_from_50_ms_to_40_s(kind: str, fusion: str) -> None:
    config = tiny_config(audio=kind, fusion=fusion, window_s=30.0)
    extractor = tiny_processor(config).feature_extractor
    for duration_s in lengths_s():
        windows = [len(window) for window in extractor.cut_windows(np.zeros(round(duration_s * RATE), np.float32))]
        assert sum(windows) == round(duration_s * RATE) and max(windows) <= 30 * RATE
        assert len(windows) == (1 if duration_s <= 30 else 2)
        lengths = torch.tensor(windows)
        frames = count_frames(config.audio_config, -(-lengths // 160) if kind == "whisper" else lengths)
        model_side = count_projected(config, frames) + (fusion == "token")
        assert model_side.tolist() == [extractor.count_tokens(window) for window in windows]
        assert int(model_side.sum()) == extractor.count_clip(round(duration_s * RATE))


@torch.no_grad()
@pytest.mark.parametrize("full_window", [False, True], ids=["cut", "full-window"])
@pytest.mark.parametrize("kind", ["whisper", "wav2vec2", "wav2vec2-group", "hubert", "wavlm"])
def test_the_model_makes_as_many_positions_as_the_processor_left_room_for(kind: str, full_window: bool) -> None:
    config = tiny_config(audio=kind, window_s=30.0)
    model, processor = tiny_model(config), tiny_processor(config, full_window=full_window)
    for duration_s in (0.05, 0.06, 0.33, 1.0, 7.77, 29.99, 30.0, 30.01, 40.0):
        inputs = processor(text=AUDIO, audio=clip(duration_s))
        audio = model.get_audio_features(**audio_inputs(inputs))
        assert len(audio.pooler_output) == inputs["input_ids"].shape[1]
        assert inputs["audio_num_windows"].tolist() == [1 if duration_s <= 30 else 2]
        if kind == "whisper" and full_window:
            assert inputs["input_features"].shape[-1] == 3000


@torch.no_grad()
@pytest.mark.parametrize("seconds", [(0.5,), (3.2, 5.0), (29.95, 1.0), (29.98,), (30.0,)])
def test_a_full_window_is_whispers_to_the_bit_and_its_silence_is_not_computed(
    seconds: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor, transform = (
        ReLLMFeatureExtractor(full_window=True),
        WhisperFeatureExtractor._torch_extract_fbank_features,
    )
    clips = [clip(length, seed=seed) for seed, length in enumerate(seconds)]
    expected = WhisperFeatureExtractor()(clips, sampling_rate=16_000, return_tensors="pt")["input_features"]
    computed = []

    def count(self: WhisperFeatureExtractor, samples: np.ndarray, *args: str) -> np.ndarray:
        computed.append(samples.shape[1])
        return transform(self, samples, *args)

    monkeypatch.setattr(WhisperFeatureExtractor, "_torch_extract_fbank_features", count)
    assert torch.equal(extractor.extract(clips)["input_features"], expected)
    assert computed[0] <= (max(seconds) + 0.1) * 16_000
    silence = [np.zeros(8000, dtype=np.float32)]
    expected = WhisperFeatureExtractor()(silence, sampling_rate=16_000, return_tensors="pt")["input_features"]
    assert torch.equal(extractor._speech_inputs(silence)["input_features"], expected)


@pytest.mark.parametrize(("kind", "duration_s"), [("whisper", 5.3), ("hubert", 61.0)])
def test_a_long_clip_is_its_windows_one_after_the_other_each_with_its_own_emotion(
    kind: str, duration_s: float
) -> None:
    config = tiny_config(audio=kind)
    model, processor = tiny_model(config), tiny_processor(config)
    waveform = clip(duration_s)  # three windows, of at most 2 s for the tiny Whisper and 30 s for the others

    def hear(audio: list[np.ndarray]):
        inputs = processor(text=AUDIO * len(audio), audio=audio)
        return model.get_audio_features(**audio_inputs(inputs))

    windows = processor.feature_extractor.cut_windows(waveform)
    assert len(windows) == 3 and np.array_equal(np.concatenate(windows), waveform)
    whole, parts = hear([waveform]), [hear([window]) for window in windows]
    expected = torch.cat([part.pooler_output for part in parts])
    torch.testing.assert_close(whole.pooler_output, expected, rtol=0, atol=1e-4)
    embeddings = torch.cat([part.emotion_embedding for part in parts])
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3
    together = hear(windows)
    torch.testing.assert_close(together.emotion_embedding, embeddings, rtol=0, atol=1e-4)
    assert whole.emotion_logits.shape == (1, 5) and together.emotion_logits.shape == (3, 5)


# --- what a model needs, and Transformers' ways ----------------------------------------------------------------------


@pytest.mark.parametrize("speech", ["whisper", "wav2vec2", "hubert-group"])
def test_the_shortest_clip_is_what_the_towers_on_disk_need_for_a_frame(speech: str, tmp_path: Path) -> None:
    config, wide = tiny_config(audio=speech), tiny_config(audio=speech)
    wide.emotion_config.encoder_config.conv_kernel = [10, 8, 4]  # 10 + 7 * 40 + 3 * 160 samples
    tiny_model(wide).save_pretrained(tmp_path)
    tiny_processor(wide).save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    features = processor.feature_extractor
    assert tiny_processor(config).feature_extractor.min_duration_s == 0.025
    read = {"waveform": clip(1.0)[:769]}

    def in_a_turn(source: object) -> None:
        conversation_inputs(processor, [user_turn(audio_part(source))])

    for ask in (features, processor.apply_request, in_a_turn):
        for source in (clip(1.0)[:769], read):
            with pytest.raises(ValueError, match=r"769 samples at 16000 Hz \(48.06 ms\); at least 48.12 ms"):
                ask(source)
    heard = model.get_audio_features(**features([clip(1.0)[:770], clip(1.0)]))
    assert heard.dimensions.isfinite().all() and min(heard.lengths) == 1


def test_text_and_audio_may_come_by_position_and_pictures_are_refused(processor: ReLLMProcessor) -> None:
    assert processor("hello")["input_ids"].tolist() == [processor.tokenizer("hello")["input_ids"]]
    assert same(processor(AUDIO, clip(0.5)), processor(text=AUDIO, audio=clip(0.5)))
    with pytest.raises(ValueError, match="reads text and audio"):
        processor("hello", images=np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match="Pass clips as `audio=`"):
        processor(clip(0.5))


def test_rows_of_one_array_are_clips_or_channels_and_it_has_to_be_said(processor: ReLLMProcessor) -> None:
    extract, rows = processor.feature_extractor, np.stack([clip(0.5), clip(0.5, seed=1)])
    for stack in (rows, torch.from_numpy(rows)):
        for ask in (extract, functools.partial(processor, AUDIO)):
            with pytest.raises(ValueError, match=r"\(2, 8000\) is either 2 clips or one clip of 2 channels.*list"):
                ask(stack)
    assert same(extract(list(rows)), extract([clip(0.5), clip(0.5, seed=1)]))
    for mixed in (extract([rows]), extract(rows.T), extract((torch.from_numpy(rows).T, RATE))):
        assert same(mixed, extract(rows.mean(0)))


def test_a_clip_with_its_rate_and_channel_is_read_wherever_it_is_given(processor: ReLLMProcessor) -> None:
    sides = [clip(0.5, rate=8_000), clip(0.5, seed=1, rate=8_000)]
    call = (np.stack(sides), 8_000)
    left, right = (processor.feature_extractor((side, 8_000)) for side in sides)
    both = processor.feature_extractor([(side, 8_000) for side in sides])
    for found, expected in (
        (processor.feature_extractor(call, channel="left"), left),
        (processor.feature_extractor([call], channel="right"), right),
        (processor.feature_extractor(call, channel="each"), both),
        (processor(AUDIO, call, channel="left"), processor(AUDIO, (sides[0], 8_000))),
        (processor(AUDIO * 2, call, channel="each"), processor(AUDIO * 2, [(side, 8_000) for side in sides])),
        (processor.apply_request(call, channel="each"), processor.apply_request([(side, 8_000) for side in sides])),
        (
            conversation_inputs(processor, [user_turn(audio_part(call, channel="right"))]),
            conversation_inputs(processor, [user_turn(audio_part(sides[1], sampling_rate=8_000))]),
        ),
    ):
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))
    with pytest.raises(ValueError, match="several clips of one part"):
        conversation_inputs(processor, [user_turn(audio_part(call, channel="each"))])


@pytest.mark.parametrize("options", [{"pad_to_multiple_of": 64}, {"text_kwargs": {"pad_to_multiple_of": 64}}])
def test_padding_to_a_multiple_leaves_the_reply_and_the_callers_options_alone(options, processor) -> None:
    model, given = tiny_model(), {"processor_kwargs": {**options}}
    conversation = [user_turn("Hear: ", clip(0.5)), {"role": "assistant", "content": "I see."}, user_turn(clip(0.3))]
    plain, form = conversation_inputs(processor, conversation), {"return_assistant_tokens_mask": True}
    marked = conversation_inputs(processor, conversation, **given, **form)
    assert marked["input_ids"].shape[1] % 64 == 0 and given == {"processor_kwargs": options}
    own = conversation_inputs(processor, conversation, **form)["assistant_masks"]
    assert np.trim_zeros(np.ravel(marked["assistant_masks"])).tolist() == np.trim_zeros(np.ravel(own)).tolist()
    replies = [
        model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
        for inputs in (plain, conversation_inputs(processor, conversation, **given))
    ]
    assert torch.equal(*replies)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("placeholders", "clips"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_a_mismatch_of_placeholders_and_clips_names_both_counts(
    placeholders: int, clips: int, processor: ReLLMProcessor
) -> None:
    audio = [clip(0.5) for _ in range(clips)] or None
    with pytest.raises(ValueError) as error:
        processor(text="Hear: " + AUDIO * placeholders, audio=audio)
    assert str(placeholders) in str(error.value) and str(clips) in str(error.value)


def test_the_model_names_both_counts_as_well() -> None:
    model, inputs = tiny_model(), dict(tiny_processor()(text="a" + AUDIO, audio=clip(0.5)))
    count = int((inputs["input_ids"] == model.config.audio_token_id).sum())
    with pytest.raises(ValueError, match=f"{count - 1} audio placeholder.*{count} positions"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, :-1], "attention_mask": None})
    with pytest.raises(ValueError, match=f"{count} audio placeholder.*0 positions"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=f"0 audio placeholder.*{count} positions"):
        model(**{**inputs, "input_ids": torch.full_like(inputs["input_ids"], 40)})


def test_a_clip_over_the_limit_is_named_with_the_limit(tmp_path: Path) -> None:
    processor = tiny_processor(max_duration_s=1.5)
    (tmp_path / "long.wav").write_bytes(wav_bytes(clip(2.0)))
    with pytest.raises(ValueError, match=r"long\.wav.*2\.0 s.*limit is 1\.5 s"):
        conversation_inputs(processor, [user_turn(audio_part(str(tmp_path / "long.wav")))])
    in_turns = functools.partial(conversation_inputs, processor, [user_turn(clip(0.5)), user_turn(clip(2.0))])
    in_a_call = functools.partial(processor, text=AUDIO * 2, audio=[clip(0.5), clip(2.0)])
    for run in (in_turns, in_a_call):
        with pytest.raises(ValueError, match=r"audio 1 of shape \(32000,\).*2\.0 s.*limit is 1\.5 s"):
            run()


def test_an_unknown_content_type_is_an_error(processor: ReLLMProcessor) -> None:
    with pytest.raises(Exception, match="'image'"):
        processor.apply_chat_template([user_turn({"type": "image"})])


def test_a_tokenizer_with_another_audio_token_id_is_refused() -> None:
    config = tiny_config()
    config.audio_token_id = 7
    with pytest.raises(ValueError, match="is token 300 in the tokenizer and 7 in the"):
        ReLLMProcessor.from_config(config, tiny_tokenizer())
    tokenizer = tiny_tokenizer(audio_token=False)
    with pytest.raises(ValueError, match="does not know '<|audio|>'"):
        ReLLMProcessor(tiny_processor().feature_extractor, tokenizer)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_saved_processor_comes_back_with_every_setting(processor: ReLLMProcessor, tmp_path: Path) -> None:
    special = tiny_processor(
        tiny_config(audio="hubert", fusion="token"), speech_do_normalize=False, max_duration_s=9.0
    )
    conversation = [user_turn("Hear: ", clip(0.5))]
    for index, saved in enumerate((processor, special)):
        saved.save_pretrained(tmp_path / str(index))
        loaded = ReLLMProcessor.from_pretrained(tmp_path / str(index))
        assert loaded.feature_extractor.to_dict() == saved.feature_extractor.to_dict()
        assert same(conversation_inputs(loaded, conversation), conversation_inputs(saved, conversation))
    with pytest.raises(ValueError, match=r"limit is 9\.0 s"):
        conversation_inputs(loaded, [user_turn(clip(9.5))])


def test_the_auto_classes_know_the_processor_and_its_parts(processor: ReLLMProcessor, tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is ReLLMProcessor
    assert type(AutoConfig.from_pretrained(tmp_path)) is ReLLMConfig
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
    assert AutoModel._model_mapping[ReLLMConfig] is ReLLMForConditionalGeneration


@pytest.mark.parametrize("how", ["used in training", "loaded so"])
def test_prompts_are_padded_on_the_left_whatever_side_the_tokenizer_came_with(how, tmp_path):
    processor = tiny_processor()
    if how == "used in training":  # a saved tokenizer remembers the side of its last batch
        processor.tokenizer(["a", "a longer text"], padding=True, padding_side="right", pad_to_multiple_of=64)
    else:
        processor.tokenizer.padding_side = "right"
        processor.tokenizer.init_kwargs["padding_side"] = "right"
    processor.save_pretrained(tmp_path)
    loaded = ReLLMProcessor.from_pretrained(tmp_path)
    mask = loaded.apply_request([clip(0.3), clip(1.2)])["attention_mask"]
    assert mask[0, 0] == 0 and mask[1, 0] == 1 and mask[:, -1].tolist() == [1, 1]
    assert loaded.tokenizer.padding_side == "left"
    from_scratch = ReLLMProcessor(loaded.feature_extractor, AutoTokenizer.from_pretrained(tmp_path))
    assert from_scratch.apply_request([clip(0.3), clip(1.2)])["attention_mask"][:, -1].tolist() == [1, 1]
