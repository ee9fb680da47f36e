"""Clips in, tensors of both towers out: log-mel (or waveform) for the speech tower, waveform for the other.

`read_clip` is where a clip is read, resampled and checked; `extract` takes nothing but what it returned. Also here:
how many positions a clip takes in the LLM's sequence, the rule that processor and model share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedConfig, WhisperFeatureExtractor

from .audio_relllm import (
    MAX_DURATION_S,
    MIN_DURATION_S,
    NUMBERS,
    SAMPLING_RATE,
    AudioSource,
    load_audio,
    states_rate,
)

VARIANCE_FLOOR = 1e-7  # of wav2vec2's feature extractor; the original code's as well


class ReLLMFeatureExtractor(WhisperFeatureExtractor):
    """Prepares audio for both towers of RE-LLM; usually made by [`ReLLMProcessor.from_config`].

    Args:
        speech_input (`str`, *optional*, defaults to `"log_mel"`): Or `"waveform"`, for wav2vec2, HuBERT and WavLM.
        speech_do_normalize (`bool`, *optional*, defaults to `True`): Zero mean and unit variance for such a waveform.
        tower_kernels, tower_strides (`list[int]`, *optional*): Of a waveform tower's convolutions without padding.
        num_projector_convs (`int`, *optional*, defaults to 3): Stride-2 convolutions of the projector.
        num_extra_tokens (`int`, *optional*, defaults to 0): Positions before the speech (`emotion_fusion="token"`: 1).
        emotion_values (`bool`, *optional*, defaults to `True`): Whether there is an emotion tower to feed.
        full_window (`bool`, *optional*, defaults to `True`): Pad the log-mel to the whole window, as Whisper was
            trained; `False` pads to the longest clip of the batch, which is cheaper.
        min_duration_s (`float`, *optional*, defaults to 0.025): Shortest clip accepted, in seconds: what the
            towers need for one frame.
        max_duration_s (`float`, *optional*, defaults to 600): Longest clip accepted, in seconds.
        kwargs: Of Whisper's: `feature_size` (80 mel bins), `sampling_rate` (16,000 Hz, to which others are resampled),
            `hop_length` (160 samples), `n_fft` (400 samples), `chunk_length` (30 s, the speech tower's window).
    """

    model_input_names = ["input_features", "input_features_mask", "input_values", "input_values_mask"]

    def __init__(
        self,
        speech_input: str = "log_mel",
        speech_do_normalize: bool = True,
        tower_kernels: Sequence[int] | None = None,
        tower_strides: Sequence[int] | None = None,
        num_projector_convs: int = 3,
        num_extra_tokens: int = 0,
        emotion_values: bool = True,
        full_window: bool = True,
        min_duration_s: float = MIN_DURATION_S,
        max_duration_s: float = MAX_DURATION_S,
        **kwargs: Any,
    ) -> None:
        # Rows are padded here, so Transformers' side, which pipelines hold against the tokenizer's, means nothing.
        super().__init__(**{**kwargs, "padding_side": None})
        if speech_input not in ("log_mel", "waveform"):
            raise ValueError(f"speech_input must be 'log_mel' or 'waveform', got {speech_input!r}.")
        if speech_input == "waveform" and (not tower_kernels or not tower_strides):
            raise ValueError("speech_input='waveform' needs the tower's tower_kernels and tower_strides.")
        self.n_samples = int(self.chunk_length * self.sampling_rate)  # `chunk_length` may be a fraction here
        self.nb_max_frames = self.n_samples // self.hop_length
        self.speech_input = speech_input
        self.speech_do_normalize = speech_do_normalize
        self.tower_kernels = list(tower_kernels or [])
        self.tower_strides = list(tower_strides or [])
        self.num_projector_convs = num_projector_convs
        self.num_extra_tokens = num_extra_tokens
        self.emotion_values = emotion_values
        self.full_window = full_window
        self.min_duration_s = min_duration_s
        self.max_duration_s = max_duration_s

    def __call__(
        self,
        audio: AudioSource | Sequence[AudioSource],
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        channel: str = "mix",
    ) -> BatchFeature:
        """Read clips and prepare them for the model: [`read_clips`], then [`extract`]."""
        return self.extract(self.read_clips(audio, sampling_rate, channel), return_tensors=return_tensors)

    def fetch_audio(self, audio_url_or_urls: Any, sampling_rate: int | None = None) -> Any:
        """Return what a pipeline was given, as it is: the processor reads it."""
        return audio_url_or_urls

    def read_clips(
        self, audio: AudioSource | Sequence[AudioSource], sampling_rate: int | None = None, channel: str = "mix"
    ) -> list[np.ndarray]:
        """Read one clip or a list of clips, which may be nested by row, each as [`read_clip`] does.

        With `channel="each"`, each channel is a clip. Several rows of samples in one array are a `ValueError`: they
        are the channels of one clip to some, a batch of clips to others.
        """
        if isinstance(audio, (np.ndarray, torch.Tensor)) and audio.ndim == 2 and 1 < len(audio) < audio.shape[1]:
            raise ValueError(
                f"An array of shape {tuple(audio.shape)} is either {len(audio)} clips or one clip of {len(audio)} "
                "channels. Pass list(array) for the first, [array] for the second."
            )
        read = [
            self.read_clip(clip, sampling_rate, index=index, channel=channel)
            for index, clip in enumerate(_flatten(audio))
        ]
        return [waveform for clip in read for waveform in ([clip] if clip.ndim == 1 else clip)]

    def read_clip(
        self,
        audio: AudioSource,
        sampling_rate: int | None = None,
        *,
        index: int = 0,
        channel: str = "mix",
        max_duration_s: float | None = None,
        name: str | None = None,
    ) -> np.ndarray:
        """Read one clip: mono, float32, at the extractor's rate, checked.

        Args:
            audio: What [`load_audio`] takes: a path, URL, bytes, array, tensor, `(array, rate)`, row of `datasets`, ….
            sampling_rate (`int`, *optional*): Rate of an array, in Hz; by default the extractor's.
            index (`int`, *optional*, defaults to 0): What an error calls an array by.
            channel (`str`, *optional*, defaults to `"mix"`): The mean of the channels, `"left"`, `"right"`, or
                `"each"`, which gives `(channels, samples)`.
            max_duration_s (`float`, *optional*): Longest clip accepted, in seconds; by default the extractor's.
            name (`str`, *optional*): What an error calls the clip.

        Raises:
            ValueError, OSError: On bad audio; the message names the clip and the reason.
        """
        if isinstance(audio, (list, tuple)) and not states_rate(audio):
            audio = np.asarray(audio, dtype=np.float32)
        rate = None
        if isinstance(audio, (np.ndarray, torch.Tensor)):  # a file states its own rate and has a name
            name, rate = name or f"audio {index} of shape {tuple(audio.shape)}", sampling_rate
        return load_audio(
            audio,
            sampling_rate=self.sampling_rate,
            source_rate=rate,
            channel=channel,
            min_duration_s=self.min_duration_s,
            max_duration_s=self.max_duration_s if max_duration_s is None else max_duration_s,
            name=name,
        )

    def extract(
        self,
        waveforms: Sequence[np.ndarray],
        *,
        only_counted: Sequence[bool] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prepare clips that [`read_clip`] has read. Nothing is read, resampled or checked here.

        Args:
            waveforms (`list[np.ndarray]`): Each of shape `(samples,)`, float32, at the extractor's rate.
            only_counted (`list[bool]`, *optional*): Clips whose tower outputs are there already: they have windows and
                positions, and no features.
            return_tensors (`str`, *optional*, defaults to `"pt"`): Or `"np"`.

        Returns:
            [`BatchFeature`]: `input_features` `(windows, mels, frames)` or `(windows, samples)` and its mask,
            `input_values` `(windows, samples)` and its mask, `audio_num_windows` `(clips,)`, and `num_audio_tokens`
            `(clips,)`, which is for the processor.
        """
        for index, waveform in enumerate(waveforms):
            if waveform.dtype != np.float32 or waveform.ndim != 1:
                raise TypeError(
                    f"Clip {index}: expected float32 of shape (samples,), got {waveform.dtype} of {waveform.shape}. "
                    "Read it with `read_clip`."
                )
        cut = [self.cut_windows(waveform) for waveform in waveforms]
        known = only_counted or [False] * len(cut)
        outputs: dict[str, torch.Tensor | list[int]] = {}
        if heard := [window for windows, skip in zip(cut, known, strict=True) if not skip for window in windows]:
            outputs |= self._speech_inputs(heard)
            if self.emotion_values:
                outputs["input_values"], outputs["input_values_mask"] = _pad([_normalize(window) for window in heard])
        outputs["audio_num_windows"] = torch.tensor([len(windows) for windows in cut])
        outputs["num_audio_tokens"] = [self.count_clip(len(waveform)) for waveform in waveforms]
        return BatchFeature(outputs, tensor_type=return_tensors)

    def cut_windows(self, waveform: np.ndarray) -> list[np.ndarray]:
        """Cut a clip that is longer than the window into the fewest equal parts (no sliver is left at the end)."""
        parts = -(-len(waveform) // self.n_samples)
        if parts <= 1:
            return [waveform]
        hops = -(-len(waveform) // (parts * self.hop_length))
        return [waveform[i * hops * self.hop_length : (i + 1) * hops * self.hop_length] for i in range(parts)]

    def count_clip(self, num_samples: int) -> int:
        """Count the positions in the LLM's sequence that a clip of so many samples takes, in all its windows."""
        return sum(self.count_tokens(len(window)) for window in self.cut_windows(np.empty(num_samples, np.bool_)))

    def count_tokens(self, num_samples: int) -> int:
        """Count the positions in the LLM's sequence that one window of so many samples takes."""
        if self.speech_input == "log_mel":
            frames = (-(-num_samples // self.hop_length) - 1) // 2 + 1
        else:
            frames = num_samples
            for kernel, stride in zip(self.tower_kernels, self.tower_strides, strict=True):
                frames = (frames - kernel) // stride + 1
        for _ in range(self.num_projector_convs):
            frames = (frames - 1) // 2 + 1
        return frames + self.num_extra_tokens

    def _speech_inputs(self, windows: list[np.ndarray]) -> dict[str, torch.Tensor]:
        if self.speech_input == "waveform":
            features, mask = _pad([_normalize(window) if self.speech_do_normalize else window for window in windows])
            return {"input_features": features, "input_features_mask": mask}
        frames = [-(-len(window) // self.hop_length) for window in windows]
        longest = self.nb_max_frames if self.full_window else max(frames)
        if not self.full_window and longest == self.nb_max_frames:
            longest += 1  # a batch as wide as the window is one in which every clip attends to the whole of it
        # Behind the longest clip all frames of a window are the same: silence, from the third on. They are copied.
        made = min(longest, max(frames) + 3) if self.full_window and not self.dither else longest
        # n_fft zeros more, so that the last frame that is made sees zeros after it, as in a full window
        samples = made * self.hop_length + (self.n_fft if made < self.nb_max_frames or not self.full_window else 0)
        padded = np.zeros((len(windows), samples), dtype=np.float32)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window)] = window
        features = torch.from_numpy(self._torch_extract_fbank_features(padded))[:, :, :made]
        silence = features[:, :, -1:].expand(-1, -1, longest - made)
        features = torch.cat([features, silence], dim=-1).contiguous()
        mask = torch.arange(longest)[None] < torch.tensor(frames)[:, None]
        return {"input_features": features, "input_features_mask": mask.long()}


def _flatten(audio: Any) -> list:
    """Return the clips of one clip, a list of clips, or a list of lists; a list of numbers is one clip."""
    if isinstance(audio, (list, tuple)) and not (states_rate(audio) or (audio and isinstance(audio[0], NUMBERS))):
        return [clip for part in audio for clip in _flatten(part)]
    return [audio]


def _normalize(waveform: np.ndarray) -> np.ndarray:
    """Scale to zero mean and unit (population) variance, as wav2vec2 does it."""
    return (waveform - waveform.mean()) / np.sqrt(waveform.var() + VARIANCE_FLOOR)


def _pad(waveforms: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.from_numpy(waveform) for waveform in waveforms]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)


def extractor_settings(config: PreTrainedConfig, speech_do_normalize: bool = True) -> dict[str, Any]:
    """Return the arguments of [`ReLLMFeatureExtractor`] that follow from a model's configuration (`ReLLMConfig`)."""
    audio = config.audio_config
    waveform_towers = [] if audio.model_type == "whisper" else [audio]
    if config.emotion_config is not None:
        waveform_towers.append(config.emotion_config.encoder_config)
    settings: dict[str, Any] = {
        "min_duration_s": max([MIN_DURATION_S, *map(shortest_clip, waveform_towers)]),
        "num_projector_convs": len(config.projector_kernel_sizes),
        "num_extra_tokens": int(config.emotion_fusion == "token"),
        "emotion_values": config.emotion_config is not None,
    }
    if audio.model_type == "whisper":
        chunk_length = audio.max_source_positions * 2 * 160 / 16_000
        return settings | {"feature_size": audio.num_mel_bins, "chunk_length": chunk_length}
    return settings | {
        "speech_input": "waveform",
        "speech_do_normalize": speech_do_normalize,
        "tower_kernels": list(audio.conv_kernel),
        "tower_strides": list(audio.conv_stride),
    }


def shortest_clip(config: PreTrainedConfig) -> float:
    """Return the seconds that a waveform encoder (wav2vec2, HuBERT, WavLM) needs: a frame's, 25 ms at least."""
    field, hop = 1, 1  # samples that a frame sees; samples from one frame to the next
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        field += (kernel - 1) * hop
        hop *= stride
    return max(MIN_DURATION_S, field / SAMPLING_RATE)
