"""What the model says in an evaluation: replies to a few of its rows, beside what the rows have; printed and logged.

They lie in the run's folder under `_completions`: `Trainer` pushes nothing whose name starts with an underscore.
"""

import importlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled
from transformers.utils import logging

from relllm.labels import DIMENSIONS
from relllm.processing.processing_relllm import audio_parts

from .collator import ReLLMCollator, place_clips

logger = logging.get_logger(__name__)

FOLDER = "_completions"
MAX_NEW_TOKENS = 64


class CompletionsMixin(Trainer):
    """For a trainer of a ReLLM whose `args` have `log_completions`, and which has an `objective`."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Do as Transformers, and log the replies to some of the rows."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        # of several data sets Transformers asks for each by itself; rows for another collator are of any kind
        if isinstance(rows, (Dataset, IterableDataset)) and isinstance(self.data_collator, ReLLMCollator):
            self._log_completions(_choose(rows, self.args.log_completions), metric_key_prefix)
        return metrics

    def _log_completions(self, rows: list[dict], prefix: str) -> None:
        if rows and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            logger.warning_once("log_completions: no replies are logged while the weights are sharded over processes.")
        elif rows and self.is_world_process_zero():
            size = self.args.per_device_eval_batch_size
            found = [self._complete(rows[start : start + size]) for start in range(0, len(rows), size)]
            self._publish([{"step": self.state.global_step, **line} for lines in found for line in lines], prefix)

    @torch.no_grad()
    def _complete(self, rows: Sequence[Mapping]) -> list[dict[str, object]]:
        """Return a line for each row: its id, the reply, and what was heard, each beside what the row has."""
        self.model.eval()
        prompts, references = zip(*(split_reply(row, self.processing_class) for row in rows), strict=True)
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = self.processing_class.apply_chat_template(list(prompts), **options).to(self.model.device)
        lines: list[dict[str, object]] = [{"id": row.get("id")} for row in rows]
        with self.accelerator.autocast():
            text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
            encoded = self.model.get_audio_features(**inputs, return_dict=True) if len(inputs) else None
            if self.args.response_loss_weight > 0 or self.args.own_loss_weights["response_kl_weight"] > 0:
                heard = {"mm_encoder_outputs": {"audio": encoded}} if encoded is not None else {}
                limit = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "num_beams": 1}
                tokens = self.model.generate(**text, **heard, **limit)[:, text["input_ids"].shape[1] :]
                replies = self.processing_class.batch_decode(tokens, skip_special_tokens=True)
                for line, said, reference, row in zip(lines, replies, references, rows, strict=True):
                    line |= {"reply": said.strip(), "reply_of_row": row.get("chosen") or reference}
        if encoded is not None:
            clips = iter(self._hear(encoded))
            for line, row, prompt in zip(lines, rows, prompts, strict=True):
                own = [next(clips) for _ in audio_parts(prompt)]
                for name in own[0] if own else ():
                    values = [clip[name] for clip in own]
                    line |= {name: values[0] if len(values) == 1 else values, f"{name}_of_row": row.get(name)}
        return lines

    def _hear(self, encoded: Any) -> Iterator[dict[str, object]]:
        """Yield what the heads that are trained say of each clip."""
        active, labels = self.objective.active, self.model.config.emotion_labels
        classes, values = encoded.emotion_logits.argmax(-1).tolist(), encoded.dimensions.float().tolist()
        for index, dimensions in zip(classes, values, strict=True):
            heard: dict[str, object] = {"emotion": labels[index]} if "emotion_loss" in active else {}
            if "dimension_loss" in active:
                heard |= {name: round(value, 3) for name, value in zip(DIMENSIONS, dimensions, strict=True)}
            yield heard

    def _publish(self, lines: list[dict[str, object]], prefix: str) -> None:
        """Write the lines into the run's folder, print them, and hand them to where the run reports to."""
        of_set = prefix.removeprefix("eval")
        name = f"completions{of_set}"
        path = Path(self.args.output_dir) / FOLDER / f"{name}_{self.state.global_step:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{key: _without_nan(value) for key, value in line.items()} for line in lines]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
        if not self.args.disable_tqdm:
            Console(stderr=True, markup=False).print(_draw(lines))
        for backend in {"wandb", "trackio"}.intersection(self.args.report_to):
            module = importlib.import_module(backend)
            cells = [
                {key: str(cell) if isinstance(cell, list) else cell for key, cell in one.items()} for one in lines
            ]
            module.log({name: module.Table(dataframe=pandas.DataFrame(cells))})
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                blocks = "\n\n".join("\n".join(f"    {key}: {line[key]}" for key in line) for line in lines)
                callback.tb_writer.add_text(name, blocks, self.state.global_step)


def _without_nan(value: object) -> object:
    """Return `None` for what JSON has no number for: a dimension that nobody trained, or labelled."""
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _choose(rows: Dataset | IterableDataset, count: int) -> list[dict]:
    """Return so many rows from all over a data set, of a stream the first ones."""
    if isinstance(rows, IterableDataset):
        return list(rows.take(count))
    count = min(count, len(rows))
    return list(rows.select([index * len(rows) // count for index in range(count)])) if count else []


def split_reply(row: Mapping, processor: Any) -> tuple[list[dict], str | None]:
    """Return the conversation of a row up to its last turn, if that is the assistant's, and that reply."""
    if row.get("messages") is None:
        return processor.build_conversation(row["audio"]), row.get("response")
    messages = place_clips(row)
    if not messages or messages[-1]["role"] != "assistant":
        return messages, None
    content = messages[-1]["content"]
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return messages[:-1], content


def _draw(lines: list[dict[str, object]]) -> Table:
    """Return the lines as a table, a row for each: what the model says and hears, beside what the row has."""
    title = f"Replies at step {lines[0]['step']}"
    table = Table("row", "the model", "the row", title=title, title_justify="left", show_lines=True)
    names = ("emotion", *DIMENSIONS)
    for line in lines:
        heard = ["  ".join(str(line.get(f"{name}{of}", "-")) for name in names) for of in ("", "_of_row")]
        if "scores" in line:  # of a reply that was rewarded
            heard = [str(line["scores"]), ""]
        said = (str(line.get(name) or "-") for name in ("reply", "reply_of_row"))
        table.add_row(*map(Text, (str(line["id"]), *map("\n".join, zip(said, heard, strict=True)))))
    return table
