"""Configuration of RE-LLM's architecture; what a training run chooses is in `ReLLMSFTConfig`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

DIMENSIONS = ("arousal", "dominance", "valence")
EMOTIONS = ("neutral", "happy", "angry", "sad", "surprise")
WAVEFORM_TOWERS = ("wav2vec2", "hubert", "wavlm")
AUDIO_TOWERS = ("whisper", *WAVEFORM_TOWERS)


@strict
class ReLLMEmotionConfig(PreTrainedConfig):
    """Configuration of [`ReLLMEmotionModel`], the tower that reads arousal, dominance and valence from a waveform.

    Where `id2label` names emotions instead, the tower was taught by these categories: it reads no dimension.

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*, defaults to wav2vec2): Or `hubert`, or `wavlm`.
        final_dropout (`float`, *optional*, defaults to 0.1): Dropout around the head's hidden layer, in [0, 1).
        trained_dimensions (`list[str]`, *optional*, defaults to all three):
            Those that the head was trained to; what it gives for another means nothing, and is NaN. None of a tower
            that was taught by categories.
    """

    model_type = "relllm_emotion"
    base_config_key = "emotion_config"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: PreTrainedConfig | dict | None = None
    final_dropout: float = 0.1
    trained_dimensions: list[str] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: object) -> None:
        self.encoder_config = _build_config(self.encoder_config, "wav2vec2")
        labels: dict = self.id2label or dict(enumerate(DIMENSIONS))  # type: ignore[has-type]
        self.id2label = {int(index): name for index, name in labels.items()}  # JSON's keys are strings
        self.label2id = {name: index for index, name in self.id2label.items()}
        kwargs.setdefault("num_labels", len(self.id2label))
        super().__post_init__(**kwargs)
        _check_tower("encoder_config", self.encoder_config, WAVEFORM_TOWERS)
        names = [self.id2label[index] for index in sorted(self.id2label)]
        known = () if self.emotion_labels else DIMENSIONS
        if len(set(names)) < len(names) or (
            self.emotion_labels and {name.lower() for name in names} & set(DIMENSIONS)
        ):
            raise ValueError(
                f"The emotion tower's outputs must be {DIMENSIONS} in this order, or emotions, each by a name of its "
                f"own; got {self.id2label}."
            )
        trained = list(known) if self.trained_dimensions is None else self.trained_dimensions
        if bool(trained) != bool(known) or not set(trained) <= set(known):
            raise ValueError(f"trained_dimensions must be some of {known}, got {trained}.")
        self.trained_dimensions = trained

    @classmethod
    def from_encoder_config(cls, config: PreTrainedConfig) -> "ReLLMEmotionConfig":
        """Return the configuration of a checkpoint of audEERING's layout: an encoder's, with a head's labels in it."""
        cls(encoder_config=config)  # refuses what is no waveform encoder
        labels = {int(index): name for index, name in (config.to_dict().get("id2label") or {}).items()}
        unnamed = set(labels.values()) == {f"LABEL_{index}" for index in labels}  # the layout's own order is ours
        return cls(encoder_config=config, final_dropout=config.final_dropout, id2label=None if unnamed else labels)

    @property
    def emotion_labels(self) -> list[str]:
        """Return the categories that the tower's head tells apart; none where it reads dimensions."""
        names = [self.id2label[index] for index in sorted(self.id2label)]
        return [] if tuple(names) == DIMENSIONS else names

    @property
    def hidden_size(self) -> int:
        """Return the width of the utterance embedding, d_e."""
        return self.encoder_config.hidden_size


@strict
class ReLLMConfig(PreTrainedConfig):
    """Configuration of [`ReLLMForConditionalGeneration`].

    Args:
        audio_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Whisper):
            The speech tower: `whisper` (its encoder half), `wav2vec2`, `hubert` or `wavlm`.
        emotion_config (`dict` or `ReLLMEmotionConfig`, *optional*):
            The emotion tower; there is none by default, and none with `emotion_fusion="none"`.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Llama):
            A causal language model's, or that of a model that also sees, of which it takes the language model's.
        audio_token_id (`int`, *optional*, defaults to 0): The placeholder that projected frames replace.
        emotion_fusion (`str`, *optional*, defaults to `"concat"` with an emotion tower and `"none"` without):
            `"concat"`: the utterance embedding repeated along time beside the speech frames (the paper);
            `"token"`: one projected position before the speech; `"none"`: the speech-LLM baseline.
        projector_kernel_sizes (`list[int]`, *optional*, defaults to `[5, 5, 5]`):
            One stride-2 convolution for each; odd, because the length rule floor((L - 1)/2 + 1) holds for odd only.
        projector_inner_dim (`int`, *optional*, defaults to 512): Width of the bottleneck after the convolutions.
        projector_layers (`int`, *optional*, defaults to 0): Transformer layers in the bottleneck instead of a GELU,
            with `projector_heads` (8) attention heads and a feed-forward width of `projector_ffn_dim` (2048).
        projector_masking (`bool`, *optional*, defaults to `True`):
            Keep padding out of the projector, so that a clip's positions depend on no batch. `False`: as the original.
        emotion_labels (`list[str]`, *optional*): Class names of the emotion head, in the order of its outputs.
        lora_config (`dict`, *optional*):
            Arguments of `peft.LoraConfig` for the LLM; `None` for no LoRA. The paper: r 16, alpha 16, dropout 0.05.
        lora_scope (`str`, *optional*, defaults to `"audio"`):
            Where the LoRA acts: at `"audio"` positions (the paper), at `"text"` positions, or `"global"`.
        towers (`dict`, *optional*):
            Where each tower came from, `{"name": …, "revision": …}` by `"audio_tower"`, `"emotion_tower"` and
            `"text_model"`; in a light checkpoint also the `"dtype"` and the `"fingerprint"` of what was left out.
        tower_dtypes (`dict` of `str` to `str`, *optional*):
            The precision of `"audio_tower"` and `"emotion_tower"` where it is not the LLM's, such as `"float32"` of a
            tower that was trained over an LLM in half precision.
        trained_readings (`list[str]`, *optional*):
            Of `"emotion"` and the three dimensions those that rows have taught the heads; in eval mode the others are
            NaN. `None` in checkpoints that do not say: none is.
        light_checkpoint (`bool`, *optional*, defaults to `False`): Of a `config.json` beside which some weights lack.
    """

    model_type = "relllm"
    sub_configs = {"audio_config": AutoConfig, "emotion_config": ReLLMEmotionConfig, "text_config": AutoConfig}

    audio_config: PreTrainedConfig | dict | None = None
    emotion_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    audio_token_id: int = 0
    emotion_fusion: Literal["concat", "token", "none"] | None = None
    projector_kernel_sizes: list[int] | tuple[int, ...] = (5, 5, 5)
    projector_inner_dim: int = 512
    projector_layers: int = 0
    projector_heads: int = 8
    projector_ffn_dim: int = 2048
    projector_masking: bool = True
    emotion_labels: list[str] | tuple[str, ...] = EMOTIONS
    lora_config: dict | None = None
    lora_scope: Literal["audio", "text", "global"] = "audio"
    towers: dict | None = None
    tower_dtypes: dict[str, str] | None = None
    trained_readings: list[str] | None = None
    light_checkpoint: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: object) -> None:
        self.audio_config = _build_config(self.audio_config, "whisper")
        # of a model that also sees, its language model's
        self.text_config = _build_config(self.text_config, "llama").get_text_config(decoder=True)
        if isinstance(self.emotion_config, dict):
            self.emotion_config = ReLLMEmotionConfig(**self.emotion_config)
        if self.emotion_fusion is None:
            self.emotion_fusion = "none" if self.emotion_config is None else "concat"
        if (projector := kwargs.pop("projector_type", "conv")) != "conv":  # older checkpoints name theirs
            raise ValueError(f"projector_type must be 'conv', the only one there is, got {projector!r}.")
        trained = kwargs.pop("float32_towers", None)  # of older checkpoints
        self.tower_dtypes = dict.fromkeys(trained, "float32") if trained else self.tower_dtypes or {}  # type: ignore
        super().__post_init__(**kwargs)
        self.emotion_labels = list(self.emotion_labels)
        self.projector_kernel_sizes = list(self.projector_kernel_sizes)
        _check_tower("audio_config", self.audio_config, AUDIO_TOWERS)
        if self.emotion_fusion != "none" and self.emotion_config is None:
            raise ValueError(
                f"emotion_fusion={self.emotion_fusion!r} needs an emotion_config. "
                "Pass one, or emotion_fusion='none' for the speech-LLM baseline."
            )
        if self.emotion_fusion == "none" and self.emotion_config is not None:
            raise ValueError("emotion_fusion='none' takes no emotion_config: its tower would never be used.")
        self._check_projector()
        if unknown := set(self.trained_readings or ()) - {"emotion", *DIMENSIONS}:
            raise ValueError(f"trained_readings may name 'emotion' and {DIMENSIONS}, got {sorted(unknown)}.")
        if self.audio_token_id < 0:
            raise ValueError(f"audio_token_id must be a token id (>= 0), got {self.audio_token_id}.")
        if not self.emotion_labels or len(set(self.emotion_labels)) != len(self.emotion_labels):
            raise ValueError(f"emotion_labels must be distinct names, at least one, got {self.emotion_labels}.")
        if self.lora_config is not None and int(self.lora_config.get("r", 8)) < 1:
            raise ValueError(f"lora_config['r'] must be at least 1, got {self.lora_config['r']}.")

    def _check_projector(self) -> None:
        even = [size for size in self.projector_kernel_sizes if size % 2 == 0 or size < 1]
        if even or not self.projector_kernel_sizes:
            raise ValueError(
                f"projector_kernel_sizes must be odd and positive, got {self.projector_kernel_sizes}: the number of "
                "audio tokens, floor((L - 1)/2 + 1) for each convolution, holds for odd kernels only."
            )
        if self.projector_layers and self.projector_inner_dim % self.projector_heads:
            raise ValueError(
                f"projector_inner_dim ({self.projector_inner_dim}) must be a multiple of projector_heads "
                f"({self.projector_heads})."
            )

    @property
    def projector_input_size(self) -> int:
        """Return the width of the projector's input: d_s, and d_e beside it with `emotion_fusion="concat"`."""
        width = self.audio_config.hidden_size
        return width + self.emotion_config.hidden_size if self.emotion_fusion == "concat" else width


@contextlib.contextmanager
def config_fields(config: PreTrainedConfig, fields: Mapping[str, object]) -> Iterator[None]:
    """Give a configuration these fields for the length of a `with` block, as for one save."""
    own: dict[str, object] = config.__dict__
    before = {name: own[name] for name in fields if name in own}
    own.update(fields)
    try:
        yield
    finally:
        for name in fields:
            del own[name]
        own.update(before)


def _build_config(config: dict | PreTrainedConfig | None, model_type: str) -> PreTrainedConfig:
    """Return a sub-configuration as an object; `None` takes the defaults."""
    if config is None:
        return CONFIG_MAPPING[model_type]()
    if isinstance(config, dict):
        return CONFIG_MAPPING[config.get("model_type", model_type)](**config)
    return config


def _check_tower(name: str, config: PreTrainedConfig, allowed: tuple[str, ...]) -> None:
    if config.model_type not in allowed:
        raise ValueError(f"{name} must be of one of the kinds {allowed}, got {config.model_type!r}.")
    if getattr(config, "add_adapter", False):
        raise ValueError(f"{name} has add_adapter=True, which changes the frame count. Use the bare encoder.")
