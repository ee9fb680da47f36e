"""What trainers of a ReLLM share, and `ReLLMSFTTrainer`: TRL's supervised fine-tuning with RE-LLM's losses.

Each loss is normalised over the whole accumulated batch of all processes, so 8 x 1, 4 x 2 and 2 x 4 rows give the same
gradients, unlabelled rows included.
"""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset, IterableDataset
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length
from transformers.utils import ModelOutput, logging
from trl import SFTTrainer

from relllm.data.columns import normalize_columns
from relllm.data.survey import TRAINING, check_surveys, fed_readings, survey_splits
from relllm.labels import DIMENSIONS
from relllm.metrics import concordances, recognition_metrics
from relllm.modeling.checkpoint_relllm import find_ends
from relllm.modeling.configuration_relllm import config_fields
from relllm.modeling.lora_relllm import compile_layers
from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.modeling.outputs_relllm import TowerOutputs
from relllm.processing.feature_extraction_relllm import ReLLMFeatureExtractor
from relllm.processing.processing_relllm import ReLLMProcessor
from relllm.tower_outputs import TowerCache, cache_settings

from . import freezing
from .alignment import return_heads
from .augmentation import Augmentation, AugmentationMixin, EpochCallback
from .checkpoints import CheckpointMixin
from .collator import ReLLMCollator
from .completions import CompletionsMixin
from .config import ReLLMSettings, ReLLMSFTConfig
from .lengths import row_lengths
from .losses import IGNORE_INDEX
from .objective import TARGETS, Objective, RunningMeans, keep_labels
from .planning.micro_batch import MicroBatchMixin
from .tasks import TaskMix, TaskRows, log_tasks

logger = logging.get_logger(__name__)


class ReLLMTrainerMixin(freezing.LearningRatesMixin, CompletionsMixin, AugmentationMixin, CheckpointMixin):
    """What trainers of a ReLLM share, before one of TRL's in the bases: what trains, and the losses of its heads.

    An evaluation also measures the heads, on the outputs that gave the loss: `eval_ua`, `eval_wa`, `eval_macro_f1`,
    `eval_ccc_arousal`, `eval_ccc_dominance` and `eval_ccc_valence`, where there are labels.
    """

    def __init__(
        self,
        model: ReLLMForConditionalGeneration,
        args: ReLLMSettings,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: ReLLMProcessor | None = None,
        **kwargs: object,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a loaded ReLLMForConditionalGeneration, got {type(model).__name__}.")
        if not isinstance(processing_class, ReLLMProcessor):
            raise TypeError(f"processing_class must be a ReLLMProcessor, got {type(processing_class).__name__}.")
        if kwargs.pop("peft_config", None) is not None:
            raise ValueError("A ReLLM carries its own LoRA: set lora_config in its configuration, not peft_config.")
        train_dataset = _normalized(train_dataset, "train_dataset")
        eval_dataset = _normalized(eval_dataset, "eval_dataset")
        surveys = survey_splits(train_dataset, eval_dataset) if "data_collator" not in kwargs else {}
        evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        for rows in () if "data_collator" in kwargs else (train_dataset, *evaluated):
            self.check_rows(rows, args)
        check_surveys(surveys, model.config.emotion_labels, args.own_loss_weights, list(args.task_shares))
        freezing.keep_unpacked(model)
        self.objective = Objective(args, model, surveys[TRAINING].emotions if TRAINING in surveys else None)
        self._fed = fed_readings(surveys.get(TRAINING), args.own_loss_weights)
        for name in ("instruction", "system_prompt"):  # which whoever loads the model then asks with
            if getattr(args, name) is not None:
                setattr(processing_class, name, getattr(args, name))
        ends = find_ends(model.generation_config, processing_class.tokenizer, processing_class.chat_template)
        model.generation_config.eos_token_id = ends
        freezing.prepare_trainable(model, args.unfreeze, args.unused_heads)
        if "data_collator" not in kwargs:
            kwargs["data_collator"] = self.make_collator(processing_class, model.config.emotion_labels, args)
        with freezing.lora_counts_as_adapter(model):
            rows = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            super().__init__(model=model, args=args, processing_class=processing_class, **rows, **kwargs)
        if getattr(model, "is_quantized", False):  # TRL has put what trains in bfloat16: 2e-5 is lost there
            freezing.prepare_trainable(model, args.unfreeze, args.unused_heads)
        return_heads(self.model, self.objective.alignment)
        if self._compiles_layers:
            llm = self.model.base_model.text_model
            compile_layers(llm, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        if args.augments or args.tower_cache_dir is not None:
            if not isinstance(self.data_collator, ReLLMCollator):
                raise ValueError(
                    f"data_collator is a {type(self.data_collator).__name__}, and only a ReLLMCollator augments clips "
                    "or looks them up in the cache of tower outputs. Leave data_collator out, or these settings."
                )
            extractor = processing_class.feature_extractor
            if args.tower_cache_dir is not None:  # which excludes augmentation
                self._tower_cache = self._open_tower_cache(model, extractor)
                self.data_collator = dataclasses.replace(self.data_collator, tower_cache=self._tower_cache)
            else:
                names = ("sampling_rate", "min_duration_s", "max_duration_s")
                limits = {name: getattr(extractor, name) for name in names}
                self._augmentation = Augmentation(args, seed=args.seed, **limits)
        self.add_callback(EpochCallback)
        self.add_callback(_ShortRunCallback)
        self._num_items = torch.zeros(len(self.objective.weights))
        measured = [args.reply_metrics[0], "emotion_accuracy", "tower_cache_hits", *self.objective.active]
        self._means = RunningMeans(measured, self.args.device)
        self._pool: list[tuple[Tensor, list[Tensor]]] | None = None  # of an evaluation over several data sets
        self._heard: list[Tensor] = []  # of the running evaluation what the heads said, `(clips, 2 + 6)`

    @classmethod
    def check_rows(cls, rows: object, args: ReLLMSettings) -> None:
        """Raise a `ValueError` for rows of a split that this trainer, beyond what others ask, cannot take."""

    def make_collator(self, processor: ReLLMProcessor, labels: Sequence[str], args: ReLLMSettings) -> ReLLMCollator:
        """Return what makes batches of rows, where the trainer is given nothing for it."""
        raise NotImplementedError

    def _open_tower_cache(self, model: ReLLMForConditionalGeneration, extractor: ReLLMFeatureExtractor) -> TowerCache:
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "tower_cache_dir is set, and FSDP and ZeRO 3 spread the towers' weights: all processes must run the "
                "towers together, whatever is cached. Use DDP, or leave tower_cache_dir out."
            )
        precision = {"mixed_precision": self.accelerator.mixed_precision, "tf32": self.args.tf32}
        settings = cache_settings(model.base_model, extractor, deepspeed=self.is_deepspeed_enabled, **precision)
        cache = TowerCache(Path(self.args.tower_cache_dir).expanduser(), settings)
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            free = f"{shutil.disk_usage(cache.folder).free / 1e9:.3g} GB are free there"
            Console(stderr=True, markup=False).print(f"Tower outputs are kept in {cache.folder}: {free}.")
        return cache

    @property
    def _compiles_layers(self) -> bool:
        """Whether the LLM's layers are compiled alone: all at once are many graphs, for minutes. Not under FSDP."""
        return self.args.torch_compile and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def create_accelerator_and_postprocess(self) -> None:
        """Do as Transformers, but leave compiling to `compile_layers`."""
        super().create_accelerator_and_postprocess()
        if self._compiles_layers:
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as in Transformers, and record in the configuration which readings of the heads were taught."""
        config = self.model.config
        if config.trained_readings is not None or not config.name_or_path:  # else it stays unknown
            config.trained_readings = sorted({*(config.trained_readings or ()), *self._fed})
        if self.is_world_process_zero() and not self.args.disable_tqdm:
            beside_the_bar = Console(stderr=True, markup=False)
            beside_the_bar.print(freezing.draw_table(freezing.trainable_table(self.model), self.args))
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Count what each loss is over in the whole accumulated batch, as Transformers counts its tokens."""
        read = list(itertools.islice(epoch_iterator, num_batches))
        self._check_shares(len(read))
        batches, num_items = super().get_batch_samples(iter(read), num_batches, device)
        local = torch.zeros(len(self.objective.weights), device=self.args.device)
        for batch in batches:
            local += self.objective.count(batch).to(local.device)
        self._num_items = self.accelerator.reduce(local, reduction="sum")
        if self.state.global_step == 0 and isinstance(self.train_dataset, IterableDataset):  # nobody has counted
            counts = dict(zip(self.objective.weights, self._num_items.tolist(), strict=True))
            if unfed := [name for name in self.objective.active if not counts[name]]:
                raise ValueError(
                    f"{unfed[0]} has a weight, and no row of the stream's first update has its labels (or, for the "
                    "KL, a transcript in `text`). Set the weight to 0, or mend the columns."
                )
        return batches, num_items

    def _check_shares(self, batches: int) -> None:
        """Raise a `ValueError` in all processes if the files of some end before others', which would wait forever."""
        processes, rows = self.accelerator.num_processes, self.train_dataset
        if not (isinstance(rows, IterableDataset) and rows.n_shards >= processes > 1):
            return
        counts = self.accelerator.gather(torch.tensor([batches], device=self.args.device))
        if counts.min() < counts.max():
            raise ValueError(
                f"The {rows.n_shards} files of the training stream are shared out among {processes} processes, and "
                f"after {self.state.global_step} updates some have read theirs while others have not. Set max_steps "
                "so that the run ends before, or load the rows without streaming."
            )

    def take_targets(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take out of a batch what its heads are to learn; clips that the tower cache has get their outputs."""
        targets = {name: inputs.pop(name) for name in TARGETS if name in inputs}
        if (known := inputs.get("tower_known")) is not None:
            mode = "train" if self.model.training else "eval"
            self._means.add(mode, "tower_cache_hits", known.sum(), torch.tensor(len(known)))
            self.put_towers(inputs)
        return targets

    def put_towers(self, inputs: dict) -> None:
        """Do as [`TowerCache.fill`] in the run's precision."""

        def run_towers(**features: Tensor) -> TowerOutputs:
            with self.accelerator.autocast():
                return self.model.base_model.run_towers(**features)

        self._tower_cache.fill(inputs, run_towers)

    def add_heads(
        self, loss: Tensor, output: ModelOutput, targets: dict[str, Tensor], counts: Tensor, in_training: bool
    ) -> Tensor:
        """Return a loss with the others of the objective, whose `counts` are of this micro-batch, on these outputs."""
        mode = "train" if self.model.training else "eval"
        for term in self.objective.terms(output, targets, counts, self._num_items if in_training else counts):
            self._means.add(mode, term.name, term.total, term.count)
            scale = 1.0
            if in_training:  # DDP averages gradients over processes, and the counts are over all
                scale = (
                    self.accelerator.num_processes if term.is_share else 1 / self.current_gradient_accumulation_steps
                )
            loss = loss + term.weight * scale * term.value
        if "emotion_labels" in targets and output.emotion_logits is not None:
            labels, predictions = targets["emotion_labels"], output.emotion_logits.detach().argmax(-1)
            if "emotion_loss" in self.objective.active:
                known = labels != IGNORE_INDEX
                self._means.add(mode, "emotion_accuracy", (labels == predictions).sum(), known.sum())
            if mode == "eval":
                heard = [labels[:, None], predictions[:, None], output.dimensions, targets["dimension_labels"]]
                self._heard.append(torch.cat([one.detach().float() for one in heard], dim=1))
        return loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: object, **kwargs: object
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Do as TRL, without the labels of rows that Accelerate repeats to give every process a last batch."""
        size = len(inputs.get("clips_per_row", inputs.get("labels", ())))
        if (new := self.count_new(size)) < size:
            inputs = keep_labels(inputs, new)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def count_new(self, size: int) -> int:
        """Return how many rows of an evaluation's batch, its first ones, are not repeated by Accelerate."""
        state = self.accelerator.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0):
            return size
        own = state.remainder - self.accelerator.process_index * size  # the first ones of all are the new ones
        return min(max(own, 0), size)

    def evaluation_loop(
        self, dataloader: DataLoader, *args: object, metric_key_prefix: str = "eval", **kwargs: object
    ) -> EvalLoopOutput:
        """Do as Transformers, with the heads' metrics and the objective over the whole set, no mean of batches."""
        self._heard.clear()
        several = self.accelerator.num_processes > 1
        if several and isinstance(dataloader.dataset, IterableDataset):  # which Accelerate has not wrapped
            raise ValueError(
                "The evaluation reads a stream of several files on several processes, each of which gets some of the "
                "files and ends at another time. Load the evaluation's rows without streaming."
            )
        if several and not has_length(dataloader):
            logger.warning(
                "The evaluation reads a stream on several processes, and Accelerate repeats rows of a stream without "
                "saying which: these count twice. Load the evaluation's rows without streaming."
            )
        with config_fields(self.model.config, {"trained_readings": None}):  # the losses want numbers
            result = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(self._means.take("eval"), reduction="sum")
        if self._pool is not None:
            self._pool.append((sums, list(self._heard)))
        metrics = self._measure(sums)
        result.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return result

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Do as Transformers; of several data sets also the metrics over all of them, without a name in between."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(rows, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._pool = []
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            self._heard[:] = [clips for _, heard in self._pool for clips in heard]
            found = self._measure(torch.stack([sums for sums, _ in self._pool]).sum(0))
        finally:
            self._pool = None
        pooled = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(pooled))
        control = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, pooled)
        return {**metrics, **pooled}

    def _measure(self, sums: Tensor) -> dict[str, float]:
        """Return the metrics of an evaluation from its sums over all processes, and from what the heads said."""
        metrics = self._means.means(sums) | self._heads_metrics()
        if self.objective.dimension_loss == "ccc" and "dimension_loss" in metrics:
            concordance = [value for name, value in metrics.items() if name.startswith("ccc_")]
            metrics["dimension_loss"] = 1 - sum(concordance) / len(concordance) if concordance else 0.0
        weights = {self.args.reply_metrics[0]: self.args.response_loss_weight, **self.objective.weights}
        metrics["loss"] = sum(weight * metrics.get(name, 0.0) for name, weight in weights.items())
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Do as TRL, with the mean of each loss since the last log, over the items of all processes."""
        if self.model.training:
            logs |= self._means.means(self.accelerator.reduce(self._means.take("train"), reduction="sum"))
        super().log(logs, start_time)

    def _heads_metrics(self) -> dict[str, float]:
        """Return UA, WA, macro-F1 and CCC over the clips of the evaluation, of the heads that have a loss."""
        none = torch.full((1, 2 + 2 * len(DIMENSIONS)), float("nan"), device=self.args.device)
        clips = torch.cat([none, *self._heard])  # a process may have heard nothing
        clips = self.accelerator.pad_across_processes(clips, dim=0, pad_index=float("nan"))
        clips = self.accelerator.gather(clips).cpu()
        labels, predictions, dimensions, targets = clips[~clips[:, 0].isnan()].split([1, 1, 3, 3], dim=1)
        metrics: dict[str, float] = {}
        if "emotion_loss" in self.objective.active and (known := labels != IGNORE_INDEX).any():
            classes = self.model.config.emotion_labels
            scores = recognition_metrics(labels[known].int().tolist(), predictions[known].int().tolist(), classes)
            metrics |= {"ua": scores["ua"], "wa": scores["wa"], "macro_f1": scores["macro_f1"]}
        if "dimension_loss" in self.objective.active:
            metrics |= concordances(targets.numpy(), dimensions.numpy())
        return metrics


class ReLLMSFTTrainer(MicroBatchMixin, ReLLMTrainerMixin, SFTTrainer):
    """Trains the projector, the heads and the LoRA of a [`ReLLMForConditionalGeneration`] to say given replies.

    Rows are as [`ReLLMCollator`] takes them; the settings are the paper's by default. See [`ReLLMTrainerMixin`].
    """

    _tag_names = ["relllm", "trl", "sft"]

    def __init__(
        self, model: ReLLMForConditionalGeneration, args: ReLLMSFTConfig | None = None, *rows: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, args if args is not None else ReLLMSFTConfig(), *rows, **kwargs)
        self._mix: TaskMix | None = self.data_collator.mix if "data_collator" not in kwargs else None
        if self._mix is not None:
            of_tasks = [*(f"{name}_loss" for name in self._mix.names), "recognition_accuracy"]
            self._means = RunningMeans([*self._means.names, *of_tasks], self.args.device)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Do as Transformers, but evaluate on every task."""
        if self._mix is not None and not kwargs.get("is_training") and isinstance(dataset, Dataset):
            dataset = TaskRows(dataset, self._mix.names)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def make_collator(self, processor: ReLLMProcessor, labels: Sequence[str], args: ReLLMSettings) -> ReLLMCollator:
        """Return the collator of rows with replies, or of what the settings teach beside them."""
        assert isinstance(args, ReLLMSFTConfig)
        mix = None
        if args.tasks is not None:
            mix = TaskMix(args.task_shares, seed=args.seed, draws_options=args.recognition_options == "drawn")
        return ReLLMCollator(
            processor,
            labels,
            teacher=self.objective.alignment is not None,
            replies=args.response_loss_weight > 0 or args.response_kl_weight > 0,
            mix=mix,
            votes=args.emotion_targets == "votes",
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """Return TRL's loss of the response, and the other losses on the outputs of the same forward pass."""
        local_counts = self.objective.count(inputs)
        targets = self.take_targets(inputs)
        outputs = None
        if self.args.response_loss_weight == 0 and not return_outputs:
            output = model(**inputs, without_lm_head=True)
            loss = output.loss
        else:
            recorder = Recorder(model)
            result = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)
            loss, outputs = result if return_outputs else (result, None)
            output = recorder.outputs[0]  # the training pass's; TRL may run another for metrics
            reply = loss
            if self.aux_loss_enabled:  # of a mixture of experts: TRL has added how unevenly its routers chose
                steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
                reply = loss - self.router_aux_loss_coef * output.aux_loss / steps
            mode = "train" if self.model.training else "eval"
            tokens = divisor = (inputs["labels"][..., 1:] != IGNORE_INDEX).sum()
            if num_items_in_batch is not None:  # TRL's loss is this micro-batch's share of the mean
                processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                divisor = torch.as_tensor(num_items_in_batch, device=loss.device) / processes
            total = torch.where(tokens > 0, reply.detach() * divisor, 0.0)  # label smoothing divides zero by no tokens
            self._means.add(mode, "response_loss", total, tokens)
            if self._mix is not None:
                log_tasks(self._means, mode, self._mix, output, inputs["labels"], targets["row_tasks"])
            loss = loss * self.args.response_loss_weight
        in_training = self.model.training and num_items_in_batch is not None
        loss = self.add_heads(loss, output, targets, local_counts, in_training)
        return (loss, outputs) if return_outputs else loss

    def measure_rows(self, rows: Dataset) -> list[int]:
        """Return about how many positions each row takes in the LLM's sequence."""
        return row_lengths(rows, self.processing_class.feature_extractor)


class Recorder:
    """Stands in for the model in TRL's `compute_loss`, and keeps its outputs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.outputs: list[ModelOutput] = []

    def __call__(self, **inputs: Tensor) -> ModelOutput:
        self.outputs.append(self.model(**inputs))
        return self.outputs[-1]


class _ShortRunCallback(TrainerCallback):
    """Warns of a warm-up that outlasts the run, and ends one over a stream that is too short for one update."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **kwargs: object) -> None:
        self.last_step: int | None = None
        warmup = args.get_warmup_steps(state.max_steps)
        if state.is_world_process_zero and warmup >= state.max_steps:
            logger.warning(
                f"warmup_steps is {warmup}, and the run has {state.max_steps} steps: it never reaches its learning "
                f"rate of {args.learning_rate}. Shorten the warm-up; below 1 it is a share of the steps."
            )

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.last_step == state.global_step and not control.should_training_stop:  # two passes without an update
            factors = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
            raise ValueError(
                f"The training stream holds fewer than the {math.prod(factors)} rows of one update "
                f"({' × '.join(map(str, factors))} processes). Lower per_device_train_batch_size or "
                "gradient_accumulation_steps, or load the rows without streaming."
            )
        self.last_step = state.global_step


def _normalized(dataset: Any, name: str) -> Any:
    """Return what a trainer is given as data with the columns of [`normalize_columns`]; other kinds: `TypeError`."""
    if isinstance(dataset, dict) and name == "eval_dataset":
        return {split: _normalized(one, f"eval_dataset[{split!r}]") for split, one in dataset.items()}
    if isinstance(dataset, dict):
        raise TypeError(
            f"{name} is a {type(dataset).__name__} of {list(dataset)}, expected one `Dataset` or `IterableDataset`. "
            f"Name a split: {name}=data[{next(iter(dataset), 'train')!r}]."
        )
    if not isinstance(dataset, (Dataset, IterableDataset, type(None))):
        raise TypeError(
            f"{name} must be a `Dataset` or `IterableDataset` of `datasets`, got {type(dataset).__name__}. Of a list "
            "of rows `Dataset.from_list(rows)` makes one."
        )
    return None if dataset is None else normalize_columns(dataset)
