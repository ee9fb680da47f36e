"""Settings of `relllm train`: of the trainer, and of the model and the rows. Architecture is `ReLLMConfig`."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from relllm.data.mixing import DataSource, parse_sources
from relllm.data.survey import TASKS
from relllm.modeling.places_relllm import check_place
from relllm.setting import check_limits, check_settings, setting

from .augmentation import AugmentationSettings

TOWERS = ("audio_tower", "emotion_tower", "text_model")
OF_A_NEW_MODEL: dict[str, Any] = {  # where nothing is set; a checkpoint has its own
    **{"emotion_fusion": "concat", "projector_inner_dim": 512, "full_window": True, "max_duration_s": 600.0},
    **{"lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "lora_scope": "audio"},
}
AUTO = "auto"  # a value of these two, for the trainer to choose by the device's memory
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # Transformers renames it
ROWS_PER_UPDATE = 16  # paper: 2 x 8


if TYPE_CHECKING:
    Settings: TypeAlias = TrainingArguments
else:
    Settings = object  # fields of a base that comes first would win over those of TRL's


class OfThisMachine(Settings):
    """What all settings of a trainer do here: without a GPU in float32, and never saved with a token."""

    def __post_init__(self) -> None:
        bf16: bool | None = self.bf16  # type: ignore[has-type]
        if bf16 is None and not torch.cuda.is_available():
            self.bf16 = False  # TRL's default is True, which on a CPU is several times slower than float32
        super().__post_init__()

    def __getstate__(self) -> dict[str, object]:
        """Without the token: the trainer pickles its settings to `training_args.bin`, which a push sends along."""
        return {**self.__dict__, "hub_token": None}


@dataclass
class PaperConfig(OfThisMachine, SFTConfig):
    """`trl.SFTConfig` with the paper's optimisation."""

    learning_rate: float = setting(2e-5, "Peak learning rate (paper: 2e-5).")
    weight_decay: float = setting(0.05, "AdamW's weight decay (paper: 0.05).")
    warmup_steps: float = setting(200, "Warm-up steps (paper: 200).")
    num_train_epochs: float = setting(3.0, "Epochs (paper: 3).")
    per_device_train_batch_size: int = setting(2, "Rows a device and step (paper: 2).")
    gradient_accumulation_steps: int = setting(8, "Steps an update (paper: 8).")
    loss_type: str = setting("nll", "Of the response; TRL before 1.16 defaults to another.")


@dataclass
class TowerCacheSettings:
    """The setting of the cache of the towers' outputs, which is off by default."""

    tower_cache_dir: str | None = setting(None, "Folder for the frozen towers' outputs.", aliases=["--cache-dir"])


@dataclass
class ReLLMSettings(TowerCacheSettings, AugmentationSettings, OfThisMachine):
    """What all trainers of a ReLLM take beside TRL's settings, whatever loss its replies have."""

    projector_learning_rate: float | None = setting(None, "Peak of the projector's; by default learning_rate.")
    heads_learning_rate: float | None = setting(None, "Peak of the emotion and dimension heads'; likewise.")
    max_length: int | None = setting(None, "Must stay unset: a cut would go through audio.")
    response_loss_weight: float = setting(1.0, "Weight of the loss of what is said, in every task.")
    emotion_loss_weight: float = setting(1.0, "Weight of the emotion cross-entropy; 0: the loss is not computed.")
    dimension_loss_weight: float = setting(1.0, "Weight of the dimension loss.")
    dimension_loss: Literal["mse", "ccc"] = setting("mse", "mse (paper), or ccc: 1 - concordance of the micro-batch.")
    emotion_class_weights: list[str] | None = setting(None, "One for each emotion class, or `balanced`.")
    emotion_targets: Literal["majority", "votes"] = setting(
        "majority", "majority (paper): the column emotion; votes: the shares of emotion_votes, where a row has them."
    )
    light_checkpoints: bool = setting(True, "Save what trains, and the frozen towers by name.")
    instruction: str | None = setting(None, "Text before the audio in a row without messages; kept by the processor.")
    system_prompt: str | None = setting(None, "System turn of such a row; empty for none; kept by the processor.")
    unfreeze: list[str] = setting([], "Of audio_tower, emotion_tower, text_model: what trains as well.")
    log_completions: int = setting(4, "Rows of each evaluation that are replied to, printed and logged; 0 for none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("response_loss_weight", "emotion_loss_weight", "dimension_loss_weight")
        rates = ("projector_learning_rate", "heads_learning_rate")
        check_limits(self, dict.fromkeys((*weights, *rates, "log_completions"), "[0, inf)"))
        if self.heads_learning_rate is not None and self.emotion_loss_weight == self.dimension_loss_weight == 0:
            raise ValueError("heads_learning_rate is set, and no head trains: their losses have weight 0.")
        for weight in self.emotion_class_weights or []:
            if self.emotion_class_weights != ["balanced"] and not _is_weight(weight):
                raise ValueError(f"emotion_class_weights takes numbers >= 0, or `balanced`, got {weight!r}.")
        check_settings(self)
        if unknown := sorted(set(self.unfreeze) - set(TOWERS)):
            raise ValueError(f"unfreeze has {unknown}; it takes any of {TOWERS}.")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True knows LLMs by their kind, and not one in a ReLLM. Leave it off.")
        if self.max_length is not None:
            raise ValueError(f"max_length={self.max_length} would cut through audio. Leave it unset; shorten clips.")
        self.check_augmentation()
        if self.tower_cache_dir is not None:
            if towers := sorted(set(self.unfreeze) & {"audio_tower", "emotion_tower"}):
                raise ValueError(f"tower_cache_dir is for frozen towers, and unfreeze has {towers}. Leave one out.")
            if self.augments:
                raise ValueError("tower_cache_dir is set, and augmented clips are never heard twice. Leave one out.")
            if self.bf16_full_eval or self.fp16_full_eval:
                name = "bf16_full_eval" if self.bf16_full_eval else "fp16_full_eval"
                raise ValueError(f"tower_cache_dir is set, and {name} gives the towers another precision. Choose.")
        self.remove_unused_columns = False  # our collator reads them
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches:
            raise ValueError(
                "dispatch_batches=True in accelerator_config would cut batches by rows, and clips and positions are "
                "not as many: leave it out, and each process reads its own rows."
            )
        accelerator.dispatch_batches = False  # of a stream Accelerate's default is True

    @property
    def own_loss_weights(self) -> dict[str, float]:
        """Return the weight of each loss that labels and replies of rows feed, by the name of its setting."""
        return {
            "response_loss_weight": self.response_loss_weight,
            "emotion_loss_weight": self.emotion_loss_weight,
            "dimension_loss_weight": self.dimension_loss_weight,
            "response_kl_weight": getattr(self, "response_kl_weight", 0.0),
        }

    @property
    def task_shares(self) -> dict[str, float]:
        """Return the weight of each task that clips are taught as."""
        tasks = getattr(self, "tasks", None)
        return tasks if isinstance(tasks, dict) else {"reply": 1.0}

    @property
    def reply_metrics(self) -> tuple[str, ...]:
        """Name what an evaluation measures on replies, first their loss."""
        return ("response_loss", "entropy", "mean_token_accuracy")

    @property
    def unused_heads(self) -> tuple[str, ...]:
        """Name the heads that no loss reaches."""
        weights = {"emotion_head": self.emotion_loss_weight, "dimension_head": self.dimension_loss_weight}
        return tuple(name for name, weight in weights.items() if weight == 0)


@dataclass
class ReLLMSFTConfig(ReLLMSettings, PaperConfig):
    """`trl.SFTConfig` with RE-LLM's losses; the defaults that differ from TRL's are the paper's recipe."""

    per_device_train_batch_size: int = setting(2, "Rows a device and step (paper: 2); auto: as many as fit.")
    rows_per_update: int | None = setting(None, "Rows an update, of all devices together; with auto 16 (paper).")
    tasks: dict[str, float] | str | None = setting(
        None, "What clips are taught as, with shares: reply=1,recognition=0.5,transcription=0.25; by default reply."
    )
    recognition_options: Literal["fixed", "drawn"] = setting(
        "fixed", "Order of the emotions in the question: the frozen prompt's, or one for each row and epoch."
    )
    response_kl_weight: float = setting(0.0, "Weight of KL(text || speech) over the reply (BLSP-Emo); rows need text.")
    kl_temperature: float = setting(2.0, "Divides the logits of both branches of the KL (BLSP-Emo: 2).")
    kl_shifted: bool = setting(True, "False: the positions of the original code, one late.")

    def __post_init__(self) -> None:
        limits = {"rows_per_update": "[1, inf)", "kl_temperature": "(0, inf)", "response_kl_weight": "[0, inf)"}
        check_limits(self, limits)
        self._share_update()
        super().__post_init__()
        if self.label_smoothing_factor > 0 and self.response_kl_weight > 0:
            raise ValueError("label_smoothing_factor > 0 and a KL loss exclude each other. Set one of them to 0.")
        if self.tasks is not None:
            self.tasks = parse_shares(self.tasks, "tasks")
            if unknown := sorted(set(self.tasks) - set(TASKS)):
                raise ValueError(f"tasks has {unknown}; it takes any of {', '.join(TASKS)}.")
            if self.response_loss_weight == 0 and set(self.tasks) != {"reply"}:
                raise ValueError(f"tasks has {sorted(self.tasks)}, and response_loss_weight=0 teaches none of them.")
            if self.response_kl_weight > 0 and "reply" not in self.tasks:
                raise ValueError("response_kl_weight > 0 compares replies, and tasks has none. Add reply.")
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(f"{name}=True would join rows, and audio belongs to its row. Leave it off.")
        dataset_kwargs: dict | None = self.dataset_kwargs  # type: ignore[has-type]
        self.dataset_kwargs = {**(dataset_kwargs or {}), "skip_prepare_dataset": True}

    def _share_update(self) -> None:
        """Put in the place of `auto` what holds until the trainer has measured: the paper's, 2 rows at once."""
        names = ("per_device_train_batch_size", *CHECKPOINTING)
        self.automatic = frozenset(name for name in names if getattr(self, name, None) == AUTO)
        for name in self.automatic.intersection(CHECKPOINTING):
            setattr(self, name, True)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if names[0] in self.automatic:
            if self.dimension_loss == "ccc":
                raise ValueError("dimension_loss=ccc is of the rows that go through at once: give a number, not auto.")
            if self.gradient_accumulation_steps != type(self).gradient_accumulation_steps:
                raise ValueError("gradient_accumulation_steps follows from rows_per_update where the batch is auto.")
            self.rows_per_update = self.rows_per_update or ROWS_PER_UPDATE
            self.per_device_train_batch_size = 1 if self.rows_per_update % (2 * processes) else 2
            self.gradient_accumulation_steps = self.rows_per_update // (self.per_device_train_batch_size * processes)
        factors = (self.per_device_train_batch_size, self.gradient_accumulation_steps, processes)
        if self.rows_per_update not in (None, math.prod(factors)):
            raise ValueError(
                f"rows_per_update is {self.rows_per_update}, and {' × '.join(map(str, factors))} processes are "
                f"{math.prod(factors)}. Take per_device_train_batch_size: auto with a multiple of {processes}, or "
                "numbers whose product it is."
            )


OF_ANY_METHOD = list(ReLLMSettings.__annotations__)
OWN_SETTINGS = [*PaperConfig.__annotations__, *OF_ANY_METHOD, *ReLLMSFTConfig.__annotations__]  # with defaults of ours


def check_places(script: "RowsSettings", *, data: bool = True) -> None:
    """Raise a [`PlaceError`] for a checkpoint, or data, that is not where a run's settings say."""
    given = getattr(script, "model_name_or_path", None)  # which wins over the towers
    fusion = getattr(script, "emotion_fusion", None)
    unread = {"audio_tower", "text_model"} if given else set()
    unread |= {"emotion_tower"} if fusion == "none" or (given and fusion is None) else set()
    for name in ("model_name_or_path", *TOWERS):
        if name not in unread and (place := getattr(script, name, None)):
            check_place(place, holds="config.json")
    places = [source.name for source in script.sources] + [getattr(script, "eval_data", None)]
    for place in filter(None, places if data else ()):
        check_place(place, repo_type="dataset")


def check_selection(script: "RowsSettings", args: TrainingArguments) -> dict[str, bool]:
    """Return what a run's record says of a checkpoint that the test split chooses; `ValueError` unless it is meant."""
    splits = [getattr(script, "eval_split", None), *(source.eval_split for source in script.sources)]
    if not (args.load_best_model_at_end and "test" in splits):
        return {}
    if not script.select_on_test:
        raise ValueError(
            "eval_split='test' with load_best_model_at_end would choose the checkpoint by the rows that measure it. "
            "Evaluate on a development split (--held_out makes one: validation:session=Ses04); --select_on_test true "
            "does it all the same, and the card says so."
        )
    return {"selected_on_test": True}


def parse_shares(given: Mapping[str, Any] | str, name: str) -> dict[str, float]:
    """Return `{"a": 1.0, "b": 0.5}` of itself or of `"a=1,b=0.5"`; without a number it is 1, and 0 is left out."""
    pairs = list(given.items()) if isinstance(given, Mapping) else []
    if isinstance(given, str):
        pairs = [(key.strip(), value or 1) for key, _, value in (part.partition("=") for part in given.split(","))]
    shares = {key: float(value) for key, value in pairs if _is_weight(value) and key}
    if len(shares) < len(pairs) or not any(shares.values()):
        raise ValueError(f"{name} is {given!r}, expected each name once with a share >= 0, such as a=1,b=0.5.")
    return {key: share for key, share in shares.items() if share > 0}


def _is_weight(value: object) -> bool:
    try:
        return float(value) >= 0  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


@dataclass
class RowsSettings:
    """Which rows a run reads, and whether it goes on with what its folder holds."""

    data: list[Any] | str | None = setting(
        None, "Prepared corpus, .jsonl/.csv/.parquet, save_to_disk folder or Hub id; several by shares: a=1,b=0.5."
    )
    train_split: str = setting("train", "Split to train on; empty for all rows.")
    held_out: str | None = setting(None, "Splits by columns: session=Ses05;validation:session=Ses04; empty: its own.")
    select_on_test: bool = setting(False, "Choose the checkpoint by the test split all the same; its card says so.")
    resume: str = setting("auto", "auto: from the last complete checkpoint if any; true: demand it; false: refuse.")

    def __post_init__(self) -> None:
        self.resume = str(self.resume).lower()  # YAML reads `true` as a bool
        if self.resume not in ("auto", "true", "false"):
            raise ValueError(f"resume must be one of 'auto', 'true', 'false', got {self.resume!r}.")
        if self.data is not None:
            sources = self.sources
            self.data = sources[0].name if sources == [DataSource(sources[0].name)] else list(map(asdict, sources))

    @property
    def sources(self) -> list[DataSource]:
        """Return the data sets that `data` names."""
        return parse_sources(self.data) if self.data is not None else []


@dataclass
class SplitSettings(RowsSettings):
    """Which rows measure a run while it trains."""

    eval_split: str | None = setting(None, "Split to evaluate on, as eval_strategy says.")
    eval_data: str | None = setting(None, "Where eval_split is, if not in data.")


@dataclass
class LoraSettings(SplitSettings):
    """The rows, and the LoRA of an LLM; what a checkpoint does not say has the paper's value."""

    lora_r: int | None = setting(None, "Rank of the LLM's LoRA (default; paper: 16); 0 for no LoRA.")
    lora_alpha: int | None = setting(None, "LoRA's alpha (default; paper: 16).")
    lora_dropout: float | None = setting(None, "LoRA's dropout (default; paper: 0.05).")
    lora_target_modules: list[str] | None = setting(None, "Layers by name, or one pattern; by default all linear.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self, {"lora_r": "[0, inf)", "lora_dropout": "[0, 1)"})
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be > 0, got {self.lora_alpha}. For no LoRA set lora_r to 0.")

    @property
    def lora(self) -> dict | None:
        """Return the arguments of `peft.LoraConfig`, or `None`."""
        if not self.lora_r:
            return None
        lora = {"r": self.lora_r}
        for name in ("lora_alpha", "lora_dropout"):
            lora[name] = OF_A_NEW_MODEL[name] if getattr(self, name) is None else getattr(self, name)
        named: list[str] | str | None = self.lora_target_modules
        if named is not None and len(named) == 1 and not re.fullmatch(r"[\w.]+", named[0]):
            named = named[0]
        return lora if named is None else lora | {"target_modules": named}


@dataclass
class ReLLMScriptArguments(LoraSettings):
    """What `relllm train` takes beside [`ReLLMSFTConfig`]: the model to start from, its LoRA, and the data.

    A new model has the paper's architecture where nothing is set. A ReLLM checkpoint has its own: what is set must be
    the same, but for a LoRA or an emotion tower (`emotion_fusion` and `emotion_tower`) that it lacks.
    """

    method: str = setting("sft", "What trains the replies: sft, dpo by pairs, grpo by rewards; each has own settings.")
    model_name_or_path: str | None = setting(None, "A ReLLM to go on with: directory or Hub id. Wins over the towers.")
    revision: str = setting("main", "Branch, tag or commit of that checkpoint on the Hub.")
    audio_tower: str | None = setting(None, "Whisper, wav2vec2, HuBERT, WavLM: id or path.")
    emotion_tower: str | None = setting(None, "Arousal, dominance, valence: id or path.")
    text_model: str | None = setting(None, "Any causal LM: id or path.")
    emotion_fusion: Literal["concat", "token", "none"] | None = setting(
        None, "How emotion joins speech: concat (default; paper), token, none (the baseline, without emotion tower)."
    )
    projector_inner_dim: int | None = setting(None, "Width of the bottleneck (default, and original: 512).")
    lora_scope: Literal["audio", "text", "global"] | None = setting(None, "Where LoRA acts; by default audio (paper).")
    emotion_labels: list[str] | None = setting(None, "Classes of a new model's head; by default those of the data.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "Of frozen weights; by default the LLM's.")
    attn_implementation: str | None = setting(None, "sdpa, flash_attention_2 or eager.")
    load_in_4bit: bool = setting(False, "QLoRA: the LLM alone in 4 bit (bitsandbytes).")
    full_window: bool | None = setting(None, "Whisper over its whole 30 s, as it was trained (default: true).")
    max_duration_s: float | None = setting(None, "Longest clip accepted, in seconds (default: 600).")
    streaming: bool = setting(False, "Read rows as they are needed; needs max_steps.")
    early_stopping_patience: int | None = setting(None, "Stop after so many evaluations without a better metric.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        if self.data is None:
            raise ValueError("data is missing: where the rows are. Give --data, or a line `data: …` in the recipe.")
        if self.model_name_or_path is None:
            for name, default in OF_A_NEW_MODEL.items():
                if getattr(self, name) is None:
                    setattr(self, name, default)
            if self.audio_tower is None or self.text_model is None:
                raise ValueError("Nothing to start from: give model_name_or_path, or audio_tower and text_model.")
            if self.emotion_fusion != "none" and self.emotion_tower is None:
                raise ValueError(
                    f"emotion_fusion={self.emotion_fusion!r} needs an emotion_tower. Give one, or "
                    "emotion_fusion='none' for the speech-LLM baseline."
                )
        counts = dict.fromkeys(("projector_inner_dim", "early_stopping_patience"), "[1, inf)")
        check_limits(self, {**counts, "max_duration_s": "(0, inf]"})
