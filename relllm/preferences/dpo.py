"""Preference training with audio: [`ReLLMDPOTrainer`], TRL's `DPOTrainer` for a model that hears (arXiv 2305.18290).

Frozen towers hear a pair's clips once, for both replies and for the reference; the losses of the heads are over the
clips, once a pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from relllm.modeling.audio_tower_relllm import is_trained
from relllm.modeling.modeling_relllm import FEATURES, ReLLMForConditionalGeneration, ReLLMModel
from relllm.processing.processing_relllm import ReLLMProcessor, audio_parts
from relllm.setting import setting
from relllm.training.alignment import in_eval
from relllm.training.collator import ReLLMCollator
from relllm.training.completions import split_reply
from relllm.training.config import OF_ANY_METHOD, ReLLMScriptArguments, ReLLMSettings
from relllm.training.losses import IGNORE_INDEX
from relllm.training.run import parse_arguments, run_training
from relllm.training.trainer import Recorder, ReLLMTrainerMixin

from .reference import StartingWeights
from .refusals import lacks_audio, refuse_settings, unread_rows

LOSSES = (  # TRL's
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
CANNOT = {  # of TRL's settings, and why
    "precompute_ref_log_probs": "the reference is computed beside each step, from a copy of what trains",
    "sync_ref_model": "the reference is what the run started from, and there is no second model to follow it",
    "padding_free": "it would join rows, and audio belongs to its row",
    "model_init_kwargs": "the model is given loaded",
    "truncation_mode": "nothing is cut: a cut would go through audio",
    "dataset_num_proc": "rows are read as they are, where a batch is made",
    "pad_to_multiple_of": "the processor pads a batch to its longest row",
    "pad_token": "it is the tokenizer's",
    "label_smoothing_factor": "there is no cross-entropy of replies: DPO's own is label_smoothing",
}
METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"),
    *("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"),
)


@dataclass
class ReLLMDPOConfig(ReLLMSettings, DPOConfig):
    """`trl.DPOConfig` with RE-LLM's losses of the emotion, each with a weight."""

    loss_type: list[str] = setting(["sigmoid"], "Of a pair, any of TRL's, several with loss_weights; sigmoid is DPO.")
    learning_rate: float = setting(5e-6, "Peak learning rate: TRL's 1e-6 is for all weights of an LLM.")
    per_device_train_batch_size: int = setting(2, "Pairs a device and step.")
    gradient_accumulation_steps: int = setting(8, "Steps an update.")
    num_train_epochs: float = setting(1.0, "Epochs: a second one mostly learns the pairs by heart.")

    def __post_init__(self) -> None:
        refuse_settings(self, CANNOT, "preference training")
        super().__post_init__()
        if unknown := sorted(set(self.loss_type) - set(LOSSES)):
            raise ValueError(f"loss_type has {unknown}; it takes any of {', '.join(LOSSES)}.")
        if self.response_loss_weight <= 0:
            raise ValueError(f"response_loss_weight must be > 0, got {self.response_loss_weight}.")
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError("train_sampling_strategy=group_by_length does not know the length of a pair. Use random.")

    @property
    def own_loss_weights(self) -> dict[str, float]:
        """Return the weight of each loss that labels of rows feed: of a pair's replies none is the row's own."""
        return {**super().own_loss_weights, "response_loss_weight": 0.0}

    @property
    def reply_metrics(self) -> tuple[str, ...]:
        """Name what an evaluation measures on pairs, first their loss."""
        return ("preference_loss", *METRICS)


OF_TRL = (
    *("beta", "loss_weights", "label_smoothing", "ld_alpha", "use_weighting", "disable_dropout", "weight_decay"),
    *("f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "warmup_steps"),
)
DPO_SETTINGS = [*ReLLMDPOConfig.__annotations__, *OF_ANY_METHOD, *OF_TRL]


@dataclass
class PreferenceCollator(ReLLMCollator):
    """Makes batches of pairs: rows with audio, or with `messages` that have some, and two replies to their last turn,
    `chosen` and `rejected`. A reply that a row itself has is passed over.

    In a batch come first the sequences of the chosen replies, then those of the rejected ones; audio and labels of
    clips are there once. `completion_mask` `(2 * pairs, sequence)` is on the reply and the end of its turn.
    """

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, Any]:
        """Return a batch."""
        batch = super().__call__(rows)
        batch["completion_mask"] = _last_run(batch.pop("labels") != IGNORE_INDEX).long()
        return batch

    def build(self, row: Mapping, task: str) -> list[dict]:
        """Return the conversation with the chosen reply; `ValueError` without audio or replies."""
        if reason := _why_no_pair(row):
            raise ValueError(reason)
        prompt, _ = split_reply(row, self.processor)
        return [*prompt, {"role": "assistant", "content": row["chosen"]}]

    def tokenize(
        self, rows: Sequence[Mapping], conversations: list[list[dict]], only_counted: list[bool] | None
    ) -> dict[str, Tensor]:
        """Do as the others, once with each reply: the clips of the second half, which are those of the first, have
        positions alone.
        """
        heard: Any = self.processor.read_audio(conversations)
        others = [
            [*conversation[:-1], {"role": "assistant", "content": row["rejected"]}]
            for row, conversation in zip(rows, heard, strict=True)
        ]
        clips = len(audio_parts(heard))
        known = [*(only_counted or [False] * clips), *[True] * clips]
        batch = super().tokenize(rows, [*heard, *others], known)
        batch["audio_num_windows"] = batch["audio_num_windows"][:clips]
        return batch


class _WithoutSecondModel(DPOTrainer):
    """TRL's, which loads no reference, and leaves the rows to the collator as it does those of models that see."""

    def __init__(self, model: Any, args: ReLLMDPOConfig, **kwargs: Any) -> None:
        nothing = nn.Identity()
        nothing.config = model.config
        super().__init__(model=model, args=args, ref_model=nothing, **kwargs)
        self.ref_model, self.precompute_ref_logps = None, True  # a batch gets them where its loss is computed
        self._is_vision_dataset = True

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


class ReLLMDPOTrainer(ReLLMTrainerMixin, _WithoutSecondModel):
    """Trains the projector, the heads and the LoRA of a [`ReLLMForConditionalGeneration`] by pairs of replies.

    Rows are as [`PreferenceCollator`] takes them; metrics have TRL's names. The reference is the model with the
    weights that it has here, of which those that train are copied: a run that goes on from a checkpoint has it too.
    See [`ReLLMTrainerMixin`] for the rest.
    """

    _tag_names = ["relllm", "trl", "dpo"]
    loss_is_scaled_for_ga = True  # the loss is divided here, by the pairs of an update

    def __init__(
        self, model: ReLLMForConditionalGeneration, args: ReLLMDPOConfig | None = None, *rows: Any, **kwargs: Any
    ) -> None:
        for name in ("ref_model", "compute_metrics"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name}: the reference is what the model starts from, and metrics are TRL's.")
        super().__init__(model, args if args is not None else ReLLMDPOConfig(), *rows, **kwargs)
        self.model_accepts_loss_kwargs = True  # which says the same to older releases
        self.reference = StartingWeights(self.model)
        self.model.base_model.register_forward_pre_hook(_hear_once, with_kwargs=True)

    @classmethod
    def check_rows(cls, rows: object, args: ReLLMSettings) -> None:
        """Raise a `ValueError` where a row is no pair of replies to a clip; a stream's are checked when read."""
        if not isinstance(rows, Dataset):
            return
        said = [_why_no_pair(row) for row in unread_rows(rows, "chosen", "rejected")]
        if reasons := list(filter(None, said)):
            raise ValueError(
                f"{len(reasons)} of {len(rows)} rows are no pairs: {reasons[0]} The columns are {rows.column_names}. "
                "`relllm score-replies` writes pairs."
            )

    def make_collator(
        self, processor: ReLLMProcessor, labels: Sequence[str], args: ReLLMSettings
    ) -> PreferenceCollator:
        """Return the collator of pairs."""
        return PreferenceCollator(processor, labels, votes=args.emotion_targets == "votes")

    def get_batch_samples(self, *args: Any) -> tuple[list, Tensor]:
        """Count the pairs of the whole accumulated batch, and what the losses of the heads are over."""
        batches, _ = super().get_batch_samples(*args)
        pairs = torch.tensor(sum(len(batch["clips_per_row"]) for batch in batches), device=self.args.device)
        return batches, self.accelerator.reduce(pairs, reduction="sum")

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Do as the others, for the loss alone: of pairs there is nothing to predict."""
        return super().prediction_step(model, inputs, True)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return TRL's loss of the pairs, and those of the heads on the outputs of the same forward pass."""
        counts = self.objective.count(inputs)
        pairs = torch.tensor(len(inputs["clips_per_row"]))
        targets = self.take_targets(inputs)
        base = self.model.base_model
        towers = [tower for tower in (base.audio_tower, base.emotion_tower) if tower is not None]
        if "tower_outputs" not in inputs and not any(map(is_trained, towers)):
            features = {name: inputs.pop(name) for name in FEATURES if name in inputs}
            with self.accelerator.autocast():
                inputs["tower_outputs"] = base.run_towers(**features)
        inputs["audio_repeats"] = 2
        with self.reference.in_place(), in_eval(self.model):
            chosen, rejected = self.compute_ref_log_probs(self.model, inputs)
        recorder = Recorder(model)
        loss = super().compute_loss(recorder, {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected})
        output = recorder.outputs[0]
        of_pairs = loss - self.router_aux_loss_coef * output.aux_loss if self.aux_loss_enabled else loss
        mode = "train" if self.model.training else "eval"
        self._means.add(mode, self.args.reply_metrics[0], of_pairs * pairs, pairs)
        in_training = self.model.training and num_items_in_batch is not None
        loss = loss * self.args.response_loss_weight
        if in_training:  # DDP averages over processes
            loss = loss * pairs * self.accelerator.num_processes / num_items_in_batch
        return self.add_heads(loss, output, targets, counts, in_training)


parse_dpo = partial(parse_arguments, kind=ReLLMDPOConfig)


def run_dpo(script: ReLLMScriptArguments, args: ReLLMDPOConfig) -> ReLLMTrainerMixin:
    """Train by pairs as [`~relllm.training.run.run_training`] does by replies."""
    if script.model_name_or_path is None:
        raise ValueError("method: dpo starts from a model that replies already: give model_name_or_path.")
    return run_training(script, args, ReLLMDPOTrainer, DPO_SETTINGS)


def _why_no_pair(row: Mapping) -> str | None:
    """Say what a row lacks."""
    if reason := lacks_audio(row):
        return reason
    chosen, rejected = replies = [row.get(name) for name in ("chosen", "rejected")]
    if not all(isinstance(reply, str) and reply.strip() for reply in replies):
        return f"Row {row.get('id')!r} needs `chosen` and `rejected`, a text each, and has {replies}."
    return f"Row {row.get('id')!r} has one reply as `chosen` and as `rejected`." if chosen == rejected else None


def _last_run(mask: Tensor) -> Tensor:
    """Return, of each row of a mask `(rows, sequence)`, its last run of True alone: of many turns the last reply."""
    after_end = mask.flip(1).int().cummax(1).values.bool()  # from the last True on, to the left
    gaps = (after_end & ~mask.flip(1)).int().cumsum(1)
    return mask & (gaps == 0).flip(1)


def _hear_once(model: ReLLMModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before a pass over pairs, hear their audio once and put it into the sequences of both replies."""
    if (repeats := kwargs.pop("audio_repeats", None)) is not None:
        inputs = {name: kwargs.pop(name, None) for name in (*FEATURES, "audio_num_windows", "tower_outputs")}
        audio = model.get_audio_features(**inputs, return_dict=True)
        audio.pooler_output = audio.pooler_output.repeat(repeats, 1)
        kwargs["mm_encoder_outputs"] = {"audio": audio}
    return args, kwargs
