"""Pretrained Whisper tiny.en and SmolLM2 on recorded human speech: what the cheap mode costs in words, time, memory.

    RELLM_REAL_MODELS=DIR RELLM_REAL_SPEECH=DIR python benchmarks/real_models.py

RELLM_REAL_MODELS holds `whisper-tiny.en` and `SmolLM2-135M-Instruct`; RELLM_REAL_SPEECH is `test/data` of the source
archive of PyPI's `pocketsphinx` (13 clips, 16 kHz). The prompts of Debian's `asterisk-core-sounds-en-wav` and their
transcripts (`asterisk-core-sounds-en`) are found where Debian installs them, or beneath RELLM_ASTERISK. Nothing is
measured without the models.

The speech tower is ours, with Whisper's own decoder behind it. It reads the clip's frames of three encodings: the
whole 30 s window, as Whisper is made to; the window cut to the clip, which is what a projector gets with
`full_window=True`; the clip alone, with `full_window=False`. The decoder has never seen frames that end with the clip,
so the last two are compared with each other. It runs on where no silence follows: what it writes is also counted up
to as many words as were said. A token's log-likelihood of the true words does not depend on how they are searched for.
"""

import gzip
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import figure, read_clock, report, reset_peak, resident_mib
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from relllm import ReLLMForConditionalGeneration, ReLLMProcessor
from relllm.modeling.audio_tower_relllm import encode_audio
from relllm.processing.audio_relllm import load_audio
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor

MODES = ("whole window", "window cut to the clip", "clip alone (cheap)")
ASTERISK = Path("/")
PROMPTS = "usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
NUM_PROMPTS, MIN_WORDS = 40, 5
PLAIN = EnglishTextNormalizer({})


@dataclass
class Speech:
    """Recordings with their words: `clips` are mono at 16 kHz."""

    name: str
    clips: list[np.ndarray]
    texts: list[str]


def model_folder(name: str) -> Path | None:
    """A folder of RELLM_REAL_MODELS, if it is there."""
    root = os.environ.get("RELLM_REAL_MODELS")
    return Path(root).absolute() / name if root and (Path(root) / name / "config.json").is_file() else None


def find_speech() -> list[Speech]:
    """What recorded speech this machine has."""
    found = []
    root = os.environ.get("RELLM_REAL_SPEECH")
    if root and (Path(root) / "librivox").is_dir():
        found.append(_pocketsphinx(Path(root)))
    base = Path(os.environ.get("RELLM_ASTERISK", ASTERISK))
    if (base / PROMPTS).is_dir() and (base / TRANSCRIPTS).is_file():
        found.append(_asterisk(base))
    return found


def _pocketsphinx(root: Path) -> Speech:
    clips, texts = [], []
    for folder, listing in (("librivox", "transcription"), ("cards", "cards.transcription")):
        for line in (root / folder / listing).read_text(encoding="utf-8").splitlines():
            words = re.search(r"<s>(.*)</s>\s*\((.*)\)", line)
            if words:
                clips.append(load_audio(str(root / folder / f"{words[2]}.wav")))
                texts.append(words[1].strip())
    return Speech("pocketsphinx", clips, texts)


def _asterisk(base: Path) -> Speech:
    """The first prompts of several words, in the order of their names."""
    clips, texts = [], []
    lines = gzip.decompress((base / TRANSCRIPTS).read_bytes()).decode("utf-8", errors="replace").splitlines()
    for line in sorted(lines):
        name, _, text = line.partition(": ")
        path = base / PROMPTS / f"{name}.wav"
        if len(clips) < NUM_PROMPTS and "[" not in text and len(text.split()) >= MIN_WORDS and path.is_file():
            clips.append(load_audio(str(path)))
            texts.append(text)
    return Speech("asterisk prompts", clips, texts)


@torch.no_grad()
def encode(model: WhisperForConditionalGeneration, clip: np.ndarray, mode: str) -> torch.Tensor:
    """Frames `(1, T, width)` of our speech tower in one of [`MODES`]."""
    extractor = ReLLMFeatureExtractor(full_window=mode != MODES[2], emotion_values=False)
    features = extractor([clip])
    tower = model.get_encoder()
    if mode == MODES[0]:
        frames: torch.Tensor = tower(features["input_features"]).last_hidden_state
        return frames
    output, _ = encode_audio(tower, features["input_features"], features["input_features_mask"])
    return output.last_hidden_state


@torch.no_grad()
def transcribe(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, clips: Sequence[np.ndarray], mode: str
) -> list[str]:
    """What Whisper's decoder makes of the frames."""
    texts = []
    for clip in clips:
        frames = BaseModelOutput(last_hidden_state=encode(model, clip, mode))
        tokens = model.generate(encoder_outputs=frames, max_new_tokens=40, no_repeat_ngram_size=4)
        texts.append(processor.batch_decode(tokens, skip_special_tokens=True)[0])
    return texts


@torch.no_grad()
def nats_per_token(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, speech: Speech, mode: str
) -> float:
    """Negative log-likelihood of the true words, a token."""
    total, count = 0.0, 0
    for clip, text in zip(speech.clips, speech.texts, strict=True):
        start = [model.config.decoder_start_token_id, model.generation_config.no_timestamps_token_id]
        words = processor.tokenizer(" " + text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([start + words])
        frames = BaseModelOutput(last_hidden_state=encode(model, clip, mode))
        logits = model(encoder_outputs=frames, decoder_input_ids=tokens).logits[0, len(start) - 1 : -1].float()
        total -= float(logits.log_softmax(-1)[torch.arange(len(words)), torch.tensor(words)].sum())
        count += len(words)
    return total / count


def word_error_rate(said: Sequence[str], heard: Sequence[str], *, cut: bool = False) -> float:
    """Without case, punctuation, and spelling of numbers; `cut` counts no more words than were said."""
    from jiwer import wer

    true = [PLAIN(text) for text in said]
    found = [PLAIN(text) or "-" for text in heard]
    if cut:
        found = [" ".join(text.split()[: len(words.split())]) for text, words in zip(found, true, strict=True)]
    rate: float = wer(true, found)
    return rate


def load_whisper(folder: Path) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """In float32, with its decoder."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, WhisperProcessor.from_pretrained(folder)


def build(audio: Path, text: Path, **options: object) -> tuple[ReLLMForConditionalGeneration, ReLLMProcessor]:
    """Both pretrained towers with a fresh projector and LoRA, without an emotion tower, in float32."""
    model = ReLLMForConditionalGeneration.from_towers(
        audio=audio, text=text, dtype=torch.float32, lora={"r": 16, "lora_alpha": 16}, emotion_fusion="none"
    ).eval()
    return model, ReLLMProcessor.from_config(model.config, text, **options)


def _speech_rows(whisper: Path) -> list[dict[str, object]]:
    model, processor = load_whisper(whisper)
    rows = []
    for speech in find_speech():
        for mode in MODES:
            start = read_clock()
            heard = transcribe(model, processor, speech.clips, mode)
            rows.append(
                {
                    "speech": speech.name,
                    "clips": len(speech.clips),
                    "frames": mode,
                    "word error rate": word_error_rate(speech.texts, heard),
                    "the same, as many words as said": word_error_rate(speech.texts, heard, cut=True),
                    "nats a token": nats_per_token(model, processor, speech, mode),
                    "seconds": read_clock() - start,
                }
            )
    return rows


@torch.no_grad()
def _cost_rows(audio: Path, text: Path) -> list[dict[str, object]]:
    reset_peak()
    start, before = time.perf_counter(), resident_mib()
    model, cheap = build(audio, text, full_window=False)
    rows = [figure("building from the two folders: seconds of wall time", time.perf_counter() - start)]
    rows.append(figure("the same: MiB that stay", resident_mib() - before))
    _, full = build(audio, text, full_window=True)
    clip = 0.1 * np.random.default_rng(0).standard_normal(5 * 16_000).astype(np.float32)
    hear = {"cheap": cheap.feature_extractor([clip]), "full": full.feature_extractor([clip])}
    for features in hear.values():
        features.pop("num_audio_tokens")
    for name, features in hear.items():
        taken = _seconds(lambda f=features: model.get_audio_features(**f))
        rows.append(figure(f"speech tower and projector, 5 s, {name}: s", taken))
    inputs = cheap.apply_request(clip)
    length = inputs["input_ids"].shape[1]
    rows.append(figure(f"prefill of {length} positions: s", _seconds(lambda: model(**inputs))))
    one, many = (
        _seconds(lambda n=tokens: model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False))
        for tokens in (1, 33)
    )
    rows.append(figure("decode step, batch 1: s", (many - one) / 32))
    minutes = np.tile(clip, 60)  # five minutes: ten windows
    reset_peak()
    before = resident_mib()
    inputs = cheap.apply_request(minutes)
    taken = _seconds(lambda: model(**inputs), rounds=1)
    rows.append(figure(f"prefill of 300 s of audio, {inputs['input_ids'].shape[1]} positions: s", taken))
    rows.append(figure("the same: MiB at its peak above the weights", resident_mib(peak=True) - before))
    return rows


def _seconds(run: Callable[[], object], *, rounds: int = 3) -> float:
    """The least of some rounds."""
    taken = []
    for _ in range(rounds):
        start = read_clock()
        run()
        taken.append(read_clock() - start)
    return min(taken)


def main() -> None:
    whisper, llm = model_folder("whisper-tiny.en"), model_folder("SmolLM2-135M-Instruct")
    if whisper is None or llm is None:
        print("Not measured: RELLM_REAL_MODELS names no folder with whisper-tiny.en and SmolLM2-135M-Instruct.")
        return
    if rows := _speech_rows(whisper):
        report("real_speech", rows, about="Whisper tiny.en on recorded human speech, float32")
    report("real_models", _cost_rows(whisper, llm), about="Whisper tiny.en and SmolLM2-135M, float32, least of 3")


if __name__ == "__main__":
    main()
