"""Reward training with audio: [`ReLLMGRPOTrainer`], TRL's `GRPOTrainer` for a model that hears (arXiv 2402.03300).

The towers hear a clip once for its group: for the replies, for their log-probabilities and for the reference. Only
their outputs are kept, because the projector trains.
"""

import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers.utils import ModelOutput
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from relllm.evaluation.evaluation_settings import MECHANISMS
from relllm.evaluation.fingerprints import folder_fingerprint
from relllm.modeling.configuration_relllm import config_fields
from relllm.modeling.modeling_relllm import FEATURES
from relllm.modeling.outputs_relllm import ReLLMAudioOutput, TowerOutputs
from relllm.processing.processing_relllm import ReLLMProcessor, audio_parts
from relllm.tower_outputs import join_clips, split_clips
from relllm.training.alignment import in_eval
from relllm.training.collator import ReLLMCollator
from relllm.training.completions import split_reply
from relllm.training.config import ReLLMScriptArguments, ReLLMSettings
from relllm.training.losses import IGNORE_INDEX
from relllm.training.objective import keep_labels
from relllm.training.run import parse_arguments, run_training
from relllm.training.trainer import ReLLMTrainerMixin

from .grpo_config import GRPO_SETTINGS, NOT_TAKEN, ReLLMGRPOConfig
from .reference import StartingWeights
from .refusals import lacks_audio, name_rows, unread_rows
from .rewards import KINDS, Reward, check_rewards, first_text, load_rewards, of_last_clip


@dataclass(eq=False)
class SpokenRow:
    """A row, and what all replies to it share."""

    row: Mapping[str, Any]  # as the rewards read it
    reply: str | None  # the row's own, for the log
    text: str  # the conversation up to the reply, as the template writes it
    input_ids: list[int] = field(repr=False)
    clips: list[TowerOutputs] = field(repr=False)
    labels: dict[str, Tensor] = field(repr=False)  # of its clips, as of a collator
    heard: str | None = None  # the emotion of the last clip, where the head was trained


class _WithoutSecondModel(GRPOTrainer):
    """TRL's, which loads no reference, and to which an LLM that hears is one that sees."""

    def __init__(self, model: Any, args: ReLLMGRPOConfig, data_collator: ReLLMCollator, **kwargs: Any) -> None:
        beta, log_completions = args.beta, args.log_completions
        args.beta, args.log_completions = 0.0, 0  # a second LLM; and a folder that a push would take along
        try:
            # which TRL then suppresses in replies
            with config_fields(model.config, {"image_token_id": model.config.audio_token_id}):
                super().__init__(model=model, args=args, **kwargs)
        finally:
            args.beta, args.log_completions = beta, log_completions
        self.beta = beta
        self.labeller = data_collator  # TRL's own stays: rows are heard when their replies are drawn


class ReLLMGRPOTrainer(ReLLMTrainerMixin, _WithoutSecondModel):
    """Trains the projector, the heads and the LoRA of a [`ReLLMForConditionalGeneration`] by rewards of its replies.

    Rows are as [`ReLLMCollator`] takes them, with a reply or without; metrics have TRL's names. See
    [`ReLLMTrainerMixin`] for the rest.

    Args:
        rewards: As of [`load_rewards`]; by default those that the settings name.
    """

    _tag_names = ["relllm", "trl", "grpo"]
    _sampler: Any = None  # of the training rows, where these are no stream

    def __init__(
        self,
        model: Any,
        args: ReLLMGRPOConfig | None = None,
        *rows: Any,
        rewards: Sequence[tuple[Reward, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        if given := sorted(name for name in NOT_TAKEN if kwargs.pop(name, None) is not None):
            named = ", ".join(given)
            raise ValueError(f"{named}: not taken here. Replies are drawn by generate, and scored by rewards.")
        args = args if args is not None else ReLLMGRPOConfig()
        if rewards is None:
            rewards = load_rewards(args.weights, device=args.device, **vars(args.reward_settings))
        kwargs["reward_funcs"] = [_as_function(reward) for reward, _ in rewards]
        super().__init__(model, args, *rows, **kwargs)
        self.reward_weights = torch.tensor([weight for _, weight in rewards], dtype=torch.float32)
        self.rollout_func = self._draw_replies
        if self.beta:
            self.ref_model = StartingWeights(self.model)
        taught = self.model.config.trained_readings  # of which an evaluation makes a secret
        self._hears_emotion = taught is None or "emotion" in {*taught, *self._fed}
        held_out, at_once = self.eval_dataset, args.eval_batch_size * args.world_size
        if held_out is not None and at_once % self.num_generations_eval:
            raise ValueError(
                f"An evaluation takes {at_once} replies at once, and a group is {self.num_generations_eval}. Make "
                "per_device_eval_batch_size a multiple of num_generations_eval."
            )
        for rows in (self.train_dataset, *(held_out.values() if isinstance(held_out, dict) else [held_out])):
            check_needs(rows, {reward.name: reward.needs for reward, _ in rewards}, self._hears_emotion)
        self._spoken: list[SpokenRow] = []  # of the rows that TRL works on
        self._output: ModelOutput | None = None  # of the last pass, with the heads'

    @classmethod
    def check_rows(cls, rows: object, args: ReLLMSettings) -> None:
        """Raise a `ValueError` where there is no audio to reply to, or not what a reward needs; a stream's rows are
        checked when read.
        """
        assert isinstance(args, ReLLMGRPOConfig)
        check_needs(rows, {name: KINDS[name].needs for name in args.weights})
        if isinstance(rows, Dataset) and (deaf := [row for row in unread_rows(rows) if lacks_audio(row)]):
            raise ValueError(
                f"{len(deaf)} of {len(rows)} rows have no audio, or a place for some and none (rows "
                f"{name_rows(deaf)}). Leave them out, or name their clips."
            )

    def make_collator(self, processor: ReLLMProcessor, labels: Sequence[str], args: ReLLMSettings) -> ReLLMCollator:
        """Return the one whose labels the heads learn; batches are TRL's."""
        return ReLLMCollator(processor, labels, replies=False, votes=args.emotion_targets == "votes")

    def get_batch_samples(self, *args: Any) -> tuple[list, Any]:
        """Do as TRL: what the heads' losses are over is counted when replies are drawn."""
        return GRPOTrainer.get_batch_samples(self, *args)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple:
        """Do as TRL."""
        return GRPOTrainer.prediction_step(self, *args, **kwargs)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Order the rows of an epoch by its number: TRL's sampler would begin anew where a run goes on."""
        if self.shuffle_dataset and self._sampler is not None:
            self._sampler.generator.manual_seed(self.args.seed + kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _get_train_sampler(self, *args: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args)
        return self._sampler

    def _generate_and_score_completions(self, inputs: Sequence[Mapping]) -> dict[str, Any]:
        """Hear the rows, draw and score replies, and say over how many labels the heads' losses are."""
        self._spoken = self._listen(inputs)
        self._log_completion_extra("id", [one.row.get("id") for one in self._spoken])
        self._log_completion_extra("reply_of_row", [one.reply for one in self._spoken])
        drawn = super()._generate_and_score_completions([{"prompt": one.text, "spoken": one} for one in self._spoken])
        counts = self.accelerator.reduce(self.objective.count(self._targets()), reduction="sum")
        return {**drawn, "spoken": self._spoken, **dict(zip(self.objective.weights, counts, strict=True))}

    @torch.no_grad()
    def _listen(self, rows: Sequence[Mapping]) -> list[SpokenRow]:
        """Return what the replies to each row share; equal neighbours, as in a group, are one and heard once."""
        processor, device = self.processing_class, self.accelerator.device
        groups = [list(same) for _, same in itertools.groupby(rows, key=pickle.dumps)]
        prompts, replies = zip(*(spoken_prompt(same[0], processor) for same in groups), strict=True)
        texts = processor.apply_chat_template(list(prompts), add_generation_prompt=True)
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = processor.apply_chat_template(list(prompts), **options).to(device)
        with self.accelerator.autocast():
            features = {name: inputs[name] for name in FEATURES if name in inputs}
            towers = self.model.base_model.run_towers(**features)
        clips = split_clips(towers, inputs["audio_num_windows"].tolist())
        spoken = []
        for index, (same, prompt) in enumerate(zip(groups, prompts, strict=True)):
            count = len(audio_parts(prompt))
            ids = inputs["input_ids"][index][inputs["attention_mask"][index].bool()].tolist()
            labels = {name: one.to(device) for name, one in self.labeller.label_clips(same[:1], [count]).items()}
            own = list(itertools.islice(clips, count))
            spoken += [SpokenRow(same[0], replies[index], texts[index], ids, own, labels)] * len(same)
        new = len(spoken) if self.model.training else self.count_new(len(spoken))
        return [*spoken[:new], *(replace(one, labels=keep_labels(one.labels, 0)) for one in spoken[new:])]

    def _calculate_rewards(self, *args: Any) -> Tensor:
        """Do as TRL; a reply of which a weighted reward is unknown has none, and is above and below no other."""
        found = super()._calculate_rewards(*args)
        unknown = found.isnan() & (self.reward_weights.to(found.device) != 0)
        return found.masked_fill(unknown.any(1, keepdim=True), math.nan)

    def _targets(self) -> dict[str, Tensor]:
        """Return what the heads are to learn of the clips of the rows at hand."""
        names = self._spoken[0].labels
        return {name: torch.cat([one.labels[name] for one in self._spoken]) for name in names}

    @torch.no_grad()
    def _draw_replies(self, prompts: list[str], _: GRPOTrainer) -> dict[str, Any]:
        """Return a reply to each row, up to the end of its turn, as TRL's `rollout_func`s do."""
        ids = [one.input_ids for one in self._spoken]
        padded = self._tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        padded = padded.to(self.accelerator.device)
        unwrapped = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        with unwrapped as model, in_eval(model), self.accelerator.autocast():
            different = list({id(one): one for one in self._spoken}.values())
            heard = model.get_audio_features(**join_rows(different), return_dict=True)
            sizes = [one.input_ids.count(model.config.audio_token_id) for one in different]
            by_row = dict(zip(map(id, different), heard.pooler_output.split(sizes), strict=True))
            audio = ReLLMAudioOutput(pooler_output=torch.cat([by_row[id(one)] for one in self._spoken]))
            options = {"mm_encoder_outputs": {"audio": audio}, "generation_config": self.generation_config}
            tokens = model.generate(**padded, **options)[:, padded["input_ids"].shape[1] :]
        clips = heard.emotion_logits.split([len(one.clips) for one in different])
        for one, logits in zip(different, clips, strict=True):
            known = self._hears_emotion and not logits.isnan().any()
            one.heard = self.model.config.emotion_labels[int(logits[-1].argmax())] if known else None
        ends = torch.isin(tokens, torch.tensor(self.eos_token_ids, device=tokens.device)).int()
        before_end = (ends.cumsum(1) - ends == 0).cpu()
        replies = [row[own].tolist() for row, own in zip(tokens.cpu(), before_end, strict=True)]
        return {"prompt_ids": ids, "completion_ids": replies, "logprobs": None}

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **of_images: object,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Do as TRL, with the rows' audio; of the reference, the weights that the run started from are in place."""
        if isinstance(model, StartingWeights):
            with model.in_place(), in_eval(self.model):
                of_rows = (input_ids, attention_mask, logits_to_keep, batch_size)
                return self._get_per_token_logps_and_entropies(self.model, *of_rows)
        outputs = []
        for start in range(0, len(input_ids), size := batch_size or len(input_ids)):
            rows = slice(start, start + size)
            ids, mask = input_ids[rows], attention_mask[rows]
            labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
            labels[:, :-logits_to_keep] = IGNORE_INDEX
            given = {"input_ids": ids, "attention_mask": mask, "labels": labels, **join_rows(self._spoken[rows])}
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them
            router = {"output_router_logits": True} if compute_aux_loss else {}
            with self.accelerator.autocast():
                outputs.append(model(**given, **router, fused_lm_head=True))
        self._output = outputs[-1]
        log_probs = torch.cat([one.log_probs[:, -logits_to_keep:] for one in outputs])
        entropies = torch.cat([one.entropy[:, -logits_to_keep:] for one in outputs]) if compute_entropy else None
        aux_loss = torch.stack([one.aux_loss for one in outputs]).mean() if compute_aux_loss else None
        return log_probs, entropies, aux_loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return TRL's loss and those of the heads, which are over the rows that replies were drawn for at once."""
        mode = "train" if self.model.training else "eval"
        self._spoken = inputs["spoken"]
        loss = super()._compute_loss(model, inputs)
        output, self._output = self._output, None  # the graph is not to be kept
        assert output is not None  # TRL has run the model
        own_share = self.current_gradient_accumulation_steps if mode == "train" else 1
        rows = torch.tensor(len(self._spoken))
        of_replies = loss * own_share - (self.router_aux_loss_coef * output.aux_loss if self.aux_loss_enabled else 0)
        self._means.add(mode, self.args.reply_metrics[0], of_replies * rows, rows)
        targets = self._targets()
        self._num_items = torch.stack([inputs[name] for name in self.objective.weights])
        self._num_items = self._num_items * own_share / (self.args.steps_per_generation if mode == "train" else 1)
        loss = loss * self.args.response_loss_weight
        return self.add_heads(loss, output, targets, self.objective.count(targets), mode == "train")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Do as TRL, with some of the replies drawn last, beside what they were given for."""
        super().log(logs, start_time)
        lines = list(itertools.islice(self._log_lines(), self.args.log_completions))
        if lines and self.is_world_process_zero():
            self._publish(lines, "_train" if self.model.training else "eval")
        for columns in self._logs.values():
            for column in columns.values() if isinstance(columns, dict) else [columns]:
                column.clear()

    def _log_lines(self) -> Iterator[dict[str, object]]:
        columns, extra = {**self._logs["rewards"], "advantage": self._logs["advantages"]}, self._logs["extra"]
        for index, reply in enumerate(self._logs["completion"]):
            scores = "  ".join(f"{name} {values[index]:.3g}" for name, values in columns.items())
            row_id, of_row = extra["id"][index], extra["reply_of_row"][index]
            told = {"step": self.state.global_step, "id": row_id, "reply": reply.strip()}
            yield {**told, "reply_of_row": of_row, "scores": scores}


parse_grpo = partial(parse_arguments, kind=ReLLMGRPOConfig)


def run_grpo(script: ReLLMScriptArguments, args: ReLLMGRPOConfig) -> ReLLMTrainerMixin:
    """Train by rewards as [`~relllm.training.run.run_training`] does by replies."""
    if script.model_name_or_path is None:
        raise ValueError("method: grpo starts from a model that replies already: give model_name_or_path.")
    if not args.rewards:
        raise ValueError("rewards is missing: what is rewarded, by name and weight, as in ER=1,EX=1,length=-0.1.")
    check_rewards(args.weights, args.reward_settings)
    facts: dict[str, str] = {}
    if args.scorers is not None and set(args.weights).intersection(MECHANISMS):
        facts["scorers_fingerprint"] = folder_fingerprint(args.scorers)
    return run_training(script, args, ReLLMGRPOTrainer, GRPO_SETTINGS, facts)


def check_needs(rows: object, needs: Mapping[str, Sequence[str]], hears_emotion: bool = True) -> None:
    """Raise a `ValueError` for rows without what a reward needs; of a stream that is found out as it comes."""
    if not isinstance(rows, Dataset):
        return
    columns = sorted({"id", *itertools.chain(*needs.values())}.intersection(rows.column_names))
    told = [of_last_clip(row) for row in rows.select_columns(columns)] if columns else [{}] * len(rows)
    for row in told:
        row["heard"] = "later" if hears_emotion else None
    for name, of in needs.items():
        if lacking := [row for row in told if of and first_text(row, of) is None]:
            raise ValueError(
                f"{len(lacking)} of {len(rows)} rows have no {' or '.join(of)}, which the reward {name} needs (rows "
                f"{name_rows(lacking)}). Leave such rows out, or the reward."
            )


def spoken_prompt(row: Mapping, processor: ReLLMProcessor) -> tuple[list[dict], str | None]:
    """Return the conversation that a row asks to go on with, and the row's own reply; `ValueError` without audio."""
    if lacks_audio(row):
        raise ValueError(f"Row {row.get('id')!r} has no audio, or a place for some and none. Leave it out.")
    return split_reply(row, processor)


def join_rows(rows: Sequence[SpokenRow]) -> dict[str, Any]:
    """Return the audio of rows as the model takes it; of one that comes again, again."""
    clips = [clip for one in rows for clip in one.clips]
    windows = torch.tensor([len(clip.lengths) for clip in clips], device=clips[0].lengths.device)
    return {"tower_outputs": join_clips(clips), "audio_num_windows": windows}


def _as_function(reward: Reward) -> Callable[..., list[float]]:
    """Return a reward as TRL calls one."""

    def score(prompts: list, completions: list[str], spoken: list[SpokenRow], **others: object) -> list[float]:
        rows = [{**of_last_clip(one.row), "heard": one.heard} for one in spoken]
        return reward(rows, [reply.strip() for reply in completions])

    score.__name__ = reward.name
    return score
