"""How a run is saved and taken up again: light checkpoints, and none that is half written.

A checkpoint is written beside the finished ones and takes its name `checkpoint-N` when it is complete, by one rename:
a kill while saving leaves the last one as it was.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import logging
from transformers.utils.hub import hf_api

from relllm.data import membership
from relllm.data.journal import audio_fingerprint, name_differences, rows_fingerprint, write_json
from relllm.data.loading import corpus_facts, corpus_name, pair_rewards
from relllm.data.membership import RECORD_NAME
from relllm.modeling.checkpoint_relllm import TOWERS, check_left_out, source_fingerprint, why_not_light
from relllm.uploads import replacing_uploads

from .config import RowsSettings

logger = logging.get_logger(__name__)

# Of a record: where a run runs, how much memory it takes, what it logs, which do not decide what comes out; and what
# says again which rows it reads.
MAY_DIFFER = (
    *("world_size", "gradient_checkpointing", "light_checkpoints", "log_completions"),
    *("seen_rows", "seen_corpora", "chosen_before", "text_model_trained"),
)
OPTIMIZER_FILES = ("optimizer", "global_step")  # DeepSpeed's are in a folder
UNFINISHED = "_unfinished"  # `Trainer` pushes no file or folder whose name starts with an underscore


class RunComplete(RuntimeError):
    """Says that a run has nothing left to do."""


def begin_run(output_dir: Path, identity: Mapping[str, object], resume: str) -> str | None:
    """Write what decides a run's result into its folder, and return the checkpoint from which it goes on.

    A run there with another `identity` (settings, data and towers) is a `ValueError` that names each difference, but
    for those in `MAY_DIFFER`; this run, complete, is a [`RunComplete`]. `resume` is [`checkpoint_to_resume`]'s.
    """
    wanted = json.loads(json.dumps(identity))
    record = output_dir / RECORD_NAME
    found: dict | None = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    checkpoint = checkpoint_to_resume(output_dir, resume)
    complete = found is not None and found.get("steps_done") is not None
    if complete or checkpoint is not None:
        what = "a complete run" if complete or checkpoint is None else Path(checkpoint).name
        if found is None:
            raise ValueError(
                f"{output_dir} holds {what} and no {RECORD_NAME}: the settings of that run are not known. Choose "
                f"another output_dir, or say that you mean it: --resume_from_checkpoint {checkpoint}."
            )
        if differences := name_differences(_decides(found), _decides(wanted)):
            raise ValueError(
                f"{output_dir} holds {what} with other settings ({differences}). Choose another output_dir, delete "
                "the folder, or give the settings of that run."
            )
    if found is not None and complete:
        raise RunComplete(
            f"This run is complete in {output_dir}: {found['steps_done']} steps. To train it again, delete the folder "
            "or choose another output_dir; to train further, start from it with --model_name_or_path."
        )
    write_json(wanted, record)
    return checkpoint


def complete_run(trainer: Trainer, identity: Mapping[str, object], checkpoint: str | None) -> None:
    """Train, from a checkpoint if any, save (and push), evaluate, and write how far it went: that says it is done."""
    is_main = trainer.is_world_process_zero()
    if checkpoint is not None and is_main:
        print(f"Going on from {checkpoint}.", flush=True)
    trainer.save_metrics("train", trainer.train(resume_from_checkpoint=checkpoint).metrics)
    trainer.save_state()
    trainer.save_model()  # which pushes; before the evaluation, which `bf16_full_eval` rounds the weights for
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if is_main:
        done = {"steps_done": trainer.state.global_step, "epochs_done": trainer.state.epoch}
        write_json({**identity, **done}, Path(trainer.args.output_dir) / RECORD_NAME)


def describe_origin(
    script: RowsSettings,
    train_rows: Dataset | IterableDataset,
    eval_rows: Mapping[str, Dataset | IterableDataset],
    places: Mapping[str, str],
    revision: str = "main",
) -> dict[str, object]:
    """Return which rows a run reads and what it starts from, by names and fingerprints, for its record.

    `places` are checkpoints by their settings, `revision` that of `model_name_or_path`.
    """
    names = ("data", "train_split", "held_out", "eval_data", "eval_split")
    record: dict[str, object] = {name: value for name in names if (value := getattr(script, name, None))}
    for name in {"data", "eval_data"} & record.keys():
        record[name] = _without_folder(record[name])
    read = {"train_rows": train_rows} | {f"eval_rows{name and '_'}{name}": rows for name, rows in eval_rows.items()}
    for name, rows in read.items():
        if isinstance(rows, Dataset):
            columns = [column for column in rows.column_names if column != "audio"]
            record |= {name: len(rows), f"{name}_fingerprint": rows_fingerprint(rows, columns)}
            if (digest := audio_fingerprint(rows)) is not None:
                record[f"{name}_audio_fingerprint"] = digest
    for name, place in places.items():
        source = {"name": place, "revision": revision if name == "model_name_or_path" else None}
        record[f"{name}_fingerprint"] = source_fingerprint(source)
    return record | describe_seen(script, train_rows, eval_rows, places, revision)


def _without_folder(place: object) -> object:
    """Return a data set's place, or several, without the folder of this machine that it is in."""
    if isinstance(place, list):
        return [{**one, "name": _without_folder(one["name"])} for one in place]
    return Path(str(place)).name if os.path.exists(str(place)) else place


def describe_seen(
    script: RowsSettings,
    train_rows: Dataset | IterableDataset,
    eval_rows: Mapping[str, Dataset | IterableDataset],
    places: Mapping[str, str],
    revision: str,
) -> dict[str, object]:
    """Return which rows and corpora made the model, by this run and those behind the checkpoints that it starts from.

    `relllm evaluate` holds that against the rows to measure. Streamed rows, and rows without ids, are not known.
    """
    read = {"train": [train_rows], "validation": [*eval_rows.values()]}
    read_here = {name: [one for one in rows if isinstance(one, Dataset)] for name, rows in read.items()}
    seen = {name: set().union(*map(membership.digest_rows, rows)) for name, rows in read_here.items()}
    given = [*(source.name for source in script.sources), *filter(None, [getattr(script, "eval_data", None)])]
    corpora = {corpus_name(data) for data in given}
    facts = {corpus_name(data): found for data in given if (found := corpus_facts(data))}
    inherited: dict[str, bool] = {}
    by_pairs = getattr(script, "method", None) == "dpo"
    rewarded = {name: weight for data in given if by_pairs for name, weight in pair_rewards(data).items()}
    for name, place in places.items():
        record = membership.read_training_record(place, revision=revision if name == "model_name_or_path" else "main")
        rewarded = {**record.get("rewarded", {}), **record.get("rewards", {}), **rewarded}
        corpora |= set(record.get("seen_corpora", []))
        facts |= record.get("corpus_facts", {})
        before = {
            "chosen_before": membership.is_chosen(record),
            "selected_on_test": bool(record.get("selected_on_test")),
            "text_model_trained": membership.is_text_model_trained(record) or (name == "text_model" and bool(record)),
        }
        inherited |= {name: True for name, value in before.items() if value}
        for split, digests in record.get("seen_rows", {}).items():
            seen[split] = seen.get(split, set()) | membership.unpack_digests(digests)
    packed = {name: membership.pack_digests(digests) for name, digests in seen.items() if digests}
    known = {"corpus_facts": facts, "rewarded": rewarded, **inherited}
    known["seen_rows"] = packed if "train" in packed else {}
    return {"seen_corpora": sorted(corpora), **{name: value for name, value in known.items() if value}}


def checkpoint_to_resume(output_dir: Path, resume: str) -> str | None:
    """Return the last complete `checkpoint-…` of a run: one whose state, which is written last, reads.

    `"auto"` takes one if there is one, `"true"` demands one, `"false"` refuses one: two runs would mix in one folder.
    """
    checkpoints = [path for path in output_dir.glob("checkpoint-*") if _has_state(path)]
    last = max(checkpoints, key=lambda path: int(path.name.split("-")[1]), default=None)
    if resume == "true" and last is None:
        raise FileNotFoundError(f"resume='true', and {output_dir} has no complete checkpoint. Use resume='auto'.")
    if resume == "false" and last is not None:
        raise ValueError(
            f"resume='false', and {output_dir} holds {last.name} of an earlier run. Go on from it with resume='auto', "
            "delete the folder, or choose another output_dir."
        )
    if last is not None and not any(path.name.startswith(OPTIMIZER_FILES) for path in last.iterdir()):
        raise ValueError(
            f"{last} was saved without its optimiser (save_only_model), and a run cannot go on from it. Start a new "
            "one from its weights with --model_name_or_path, or choose another output_dir."
        )
    return None if last is None else str(last)


def _decides(record: Mapping[str, object]) -> dict[str, object]:
    """Return what of a record decides the result; how an update's rows are divided does for a CCC, or by length."""
    free = [*MAY_DIFFER, "steps_done", "epochs_done"]
    grouped = record.get("train_sampling_strategy") == "group_by_length"
    if "rows_per_update" in record and record.get("dimension_loss") != "ccc" and not grouped:
        free += ["per_device_train_batch_size", "gradient_accumulation_steps"]
    return {name: value for name, value in record.items() if name not in free}


def _has_state(checkpoint: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return checkpoint.name.split("-")[1].isdigit()
    return False


class LastStepMixin(Trainer):
    """For a trainer that may be resumed after its last step, where Transformers' takes one more."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> object:
        """Do as Transformers, and remove in the same commit what of the checkpoint before is not sent again."""
        with replacing_uploads(hf_api()):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with replacing_uploads(hf_api()):
            super()._push_from_checkpoint(checkpoint_folder)

    def _run_epoch(self, **kwargs: Any) -> None:
        over = 0 < self.state.max_steps <= self.state.global_step
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                over |= callback.early_stopping_patience_counter >= callback.early_stopping_patience
        self.control.should_training_stop |= over
        if not over:
            super()._run_epoch(**kwargs)


class CheckpointMixin(LastStepMixin):
    """For a trainer of a ReLLM, before TRL's in the bases; its `args` have `light_checkpoints`."""

    _staging: str | None = None
    _pushing = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save light where the settings say so and the towers' sources are known, else full, with a warning why."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        light = self.args.should_save and self.args.light_checkpoints and self._can_be_light()
        try:
            if light:
                self.model.save_pretrained(folder, light=True, state_dict=state_dict)
        except OSError as error:
            logger.warning(f"Saved in full, although light_checkpoints is on. {error}")
            light = False
        if not light:
            return super()._save(output_dir, state_dict)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _can_be_light(self) -> bool:
        pushes_checkpoints = self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END
        is_sent = self._pushing or pushes_checkpoints
        reason = why_not_light(self.model) or (why_not_shared(self.model) if is_sent else None)
        if reason is not None:
            logger.warning_once(f"Checkpoints are saved in full, although light_checkpoints is on. {reason}")
        return reason is None

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return run_dir if self._staging is None else os.path.join(run_dir, self._staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = os.path.join(run_dir, UNFINISHED, name), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(os.path.join(run_dir, UNFINISHED), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.state.best_model_checkpoint == staged:
            self.state.best_model_checkpoint = final
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))  # with the best one's final place
            if os.path.exists(final):  # of an earlier run at the same step, which goes once this one is in its place
                os.rename(final, os.path.join(run_dir, UNFINISHED, f"replaced-{name}"))
            os.rename(staged, final)
            shutil.rmtree(os.path.dirname(staged), ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write none: TRL's knows neither towers nor licences. `relllm card` writes one from what was measured."""

    def push_to_hub(self, *args: object, **kwargs: object) -> object:
        """Do as Transformers; in full where a light checkpoint would point at a folder of this machine."""
        self._pushing = True
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self._pushing = False

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:  # the push comes when the checkpoint is in its place
            return
        if self.args.hub_always_push and self.is_world_process_zero():
            self._finish_current_push()  # which still reads the files that this push replaces
        push = getattr(self, "push_in_progress", None)  # of a repository that is there
        running = push is not None and not push.is_done()
        if self.args.should_save and self.args.hub_strategy != HubStrategy.END and not running:
            for code in Path(checkpoint_folder).glob("*.py"):  # Transformers takes along only weights and settings
                shutil.copy(code, self.args.output_dir)
            for weights in Path(self.args.output_dir).glob("model*.safetensors*"):  # of a save in another form
                if not Path(checkpoint_folder, weights.name).exists():
                    weights.unlink()
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # whose own files have every weight
            check_left_out(self.model if model is None else model, resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse a checkpoint that lacks what trains, which would stay as it was before."""
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        lost = sorted(trained.intersection(load_result.missing_keys))
        known = self.model.state_dict().keys()
        # what bitsandbytes keeps beside a 4-bit weight (`….weight.absmax`) is the frozen weight's own, and is there
        keys = load_result.unexpected_keys
        unexpected = [key for key in keys if f"{key.rpartition('.weight.')[0]}.weight" not in known]
        if lost or unexpected:
            raise ValueError(
                f"The checkpoint does not fit this run: it lacks {len(lost)} weights that train, {lost[:3]}, and has "
                f"{len(unexpected)} that the model has not, {unexpected[:3]}. "
                "Resume with the model and the `unfreeze` of the run that wrote it."
            )


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Say why a light checkpoint is of no use on another machine, with the remedy; `None` if it is."""
    for kind in TOWERS:
        tower = getattr(model.base_model, kind)
        frozen = tower is not None and not all(weight.requires_grad for weight in tower.parameters())
        name = (model.config.towers or {}).get(kind, {}).get("name")
        if frozen and name is not None and os.path.isdir(name):
            return (
                f"They go to the Hub, and its {kind} comes from the folder {name}, which is on this machine only. "
                "Train from towers that are on the Hub to send light checkpoints."
            )
    return None
