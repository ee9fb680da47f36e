"""Every room that takes a clip from a user reads it once: decoded once, resampled once, checked once."""

import base64
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import soundfile
from tiny_models import clip, tiny_config, tiny_model, tiny_processor

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.evaluation.asking import Questions
from relllm.evaluation.predicting import SpeechPredictor
from relllm.inference.conversation import Conversation
from relllm.inference.inference_settings import RequestLimits
from relllm.inference.replies import hear
from relllm.inference.server.prompts import PromptReader
from relllm.inference.server.schema import ChatRequest
from relllm.inference.web import EMPTY, Session
from relllm.processing import audio_relllm
from relllm.training.augmentation import Augmentation, AugmentationSettings
from relllm.training.collator import ReLLMCollator

GAIN = AugmentationSettings(augment_gain_db=[-6.0, 3.0], augment_probability=1.0)
DIMENSIONS_ALONE = Questions(("dimensions",), ("sad", "happy"))
STEPS = ("_decode", "resample", "_check_samples")


@pytest.fixture(scope="module")
def system() -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    config = tiny_config()
    return tiny_model(config), tiny_processor(config)


def server(model, processor: ReLLMProcessor, path: Path) -> None:
    data = base64.b64encode(path.read_bytes()).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    request = ChatRequest.model_validate({"model": "tiny", "messages": [{"role": "user", "content": [part]}]})
    prompt = PromptReader(processor, RequestLimits()).read_chat(request)
    processor.feature_extractor.extract(prompt.waveforms)


def collator(model, processor: ReLLMProcessor, path: Path, augmentation: Augmentation | None = None) -> None:
    row = {"id": "a", "audio": str(path), "response": "I see."}
    ReLLMCollator(processor, model.config.emotion_labels, augmentation=augmentation)([row])


def web(model, processor: ReLLMProcessor, path: Path) -> None:
    systems = {name: partial(Conversation, model, processor) for name in ("ours", "baseline")}
    session = Session(systems, threading.Lock(), max_new_tokens=1)
    list(session.talk(str(path), None))
    assert session.status == EMPTY and len(session.shown["baseline"]) == 2


WAYS: dict[str, Callable] = {
    "hear": lambda model, processor, path: list(hear(model, processor, [path])),
    "conversation": lambda model, processor, path: Conversation(model, processor).say(path, max_new_tokens=1),
    "evaluation": lambda model, processor, path: SpeechPredictor(model, processor, DIMENSIONS_ALONE).predict(
        [{"audio": str(path)}]
    ),
    "server": server,
    "web": web,
    "training": collator,
    "training, augmented": lambda model, processor, path: collator(model, processor, path, Augmentation(GAIN, seed=0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_clip_is_read_once(way: str, system, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.wav"
    soundfile.write(path, clip(0.5, rate=24_000), 24_000)
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        function = getattr(audio_relllm, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(audio_relllm, name, counted)

    for name in STEPS:
        count(name)
    WAYS[way](*system, path)
    assert calls == Counter(dict.fromkeys(STEPS, 1))
