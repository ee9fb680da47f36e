"""`relllm train-text`: the LLM alone, reading, fine-tuned on a ReLLM's replies: the baseline `text-only-tuned`.

PEFT's LoRA on a bare causal LM, by TRL's `SFTTrainer`, with the paper's settings of RE-LLM where nothing else is said.
The prompt is the one that `relllm evaluate` gives such a system: the transcript where the audio would stand.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging
from trl import SFTTrainer

from relllm.data.survey import emotions_of, only_one, survey_rows
from relllm.modeling.checkpoint_relllm import place_of
from relllm.processing.prompts_relllm import SPEECH_PROMPT, SYSTEM_PROMPT
from relllm.processing.turns_relllm import build_chat_template
from relllm.setting import check_settings, setting

from ..checkpoints import LastStepMixin, begin_run, complete_run, describe_origin
from ..config import OF_A_NEW_MODEL, LoraSettings, PaperConfig, check_places, check_selection
from ..run import TRAINER_SETTINGS, load_rows
from ..settings import SettingsParser, check_metric, check_tokens, check_trainer

logger = logging.get_logger(__name__)


@dataclass
class TextScriptArguments(LoraSettings):
    """What `relllm train-text` takes beside [`TextTrainingConfig`]."""

    text_model: str | None = setting(None, "Any causal LM: id or path.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "Of its frozen weights; default: its own.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_model is None or self.data is None:
            raise ValueError("text_model and data are needed: what to fine-tune, and on which rows.")
        check_settings(self)
        for name in ("lora_r", "lora_alpha", "lora_dropout"):
            if getattr(self, name) is None:
                setattr(self, name, OF_A_NEW_MODEL[name])
        if self.lora is None:
            raise ValueError(f"lora_r is {self.lora_r}: nothing would train. Give a rank, such as 16.")


@dataclass
class TextTrainingConfig(PaperConfig):
    """`trl.SFTConfig` with the optimisation of RE-LLM's recipe as the defaults, so that the input alone differs."""

    max_length: int | None = setting(None, "Longest row in tokens; by default none is cut.")
    report_to: str = setting("none", "trackio, tensorboard, wandb, …")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template_path is not None:
            raise ValueError(
                f"chat_template_path is {self.chat_template_path}, and rows are written in the LLM's own template, as "
                "`relllm evaluate` asks. Leave it out."
            )
        self.assistant_only_loss = True  # the reply and its end, as in a ReLLM's labels


class TextTrainer(LastStepMixin, SFTTrainer):
    """TRL's, which can be resumed after its last step, and writes no card of its own."""

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """Write none: what it was trained on is in its record."""


parse_text_arguments = SettingsParser.of("relllm train-text", TextScriptArguments, TextTrainingConfig)


def run_text_training(script: TextScriptArguments, args: TextTrainingConfig) -> TextTrainer:
    """Train as [`~relllm.training.run.run_training`] does; adapter and tokenizer are in `args.output_dir`."""
    check_places(script)
    check_trainer(args)
    check_metric(args, ("loss", "mean_token_accuracy", "entropy"))
    assert script.text_model is not None
    check_tokens(args, script.text_model)
    selection = check_selection(script, args)
    with args.main_process_first(desc="reading the rows"):
        read, to_evaluate, _ = load_rows(script, args)
        train_rows = keep_spoken(read)
        eval_rows = {name: keep_spoken(rows) for name, rows in to_evaluate.items()}
        identity = _training_record(script, args) | selection
        identity["emotion_labels"] = emotions_of(survey_rows(train_rows))  # a ReLLM's of these rows, to choose from
        identity |= describe_origin(script, train_rows, eval_rows, {"text_model": script.text_model})
        checkpoint = args.resume_from_checkpoint or begin_run(Path(args.output_dir), identity, script.resume)
    tokenizer = AutoTokenizer.from_pretrained(script.text_model)
    set_seed(args.seed)  # what is drawn for the LoRA
    options = {"dtype": script.dtype or "auto", "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(place_of(script.text_model), **options)
    own, tokenizer.chat_template = tokenizer.chat_template, build_chat_template(tokenizer)
    trainer = TextTrainer(
        model=model,
        args=args,
        train_dataset=write_turns(train_rows),
        eval_dataset=write_turns(*eval_rows.values()) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **(script.lora or {})}),
    )
    tokenizer.chat_template = own  # it has made the rows; the LLM's own is saved
    complete_run(trainer, identity, checkpoint)
    return trainer


def keep_spoken(rows: Dataset) -> Dataset:
    """Return the rows that have a transcript and a reply; `ValueError` if there is none."""
    columns = [rows[name] if name in rows.column_names else [None] * len(rows) for name in ("text", "response")]
    pairs = enumerate(zip(*columns, strict=True))
    kept = [index for index, (text, reply) in pairs if (only_one(text) or "").strip() and reply]
    if not kept:
        raise ValueError(f"None of {len(rows)} rows has `text` and `response`. `relllm write-targets` writes replies.")
    if len(kept) < len(rows):
        logger.warning(f"{len(rows) - len(kept)} of {len(rows)} rows lack one transcript or a reply: left out.")
    return rows.select(kept)


def write_turns(*parts: Dataset) -> Dataset:
    """Return the conversations of rows as TRL's `prompt` and `completion`."""
    turns = []
    for text, reply in (pair for part in parts for pair in zip(part["text"], part["response"], strict=True)):
        asked = {"role": "user", "content": f"{SPEECH_PROMPT}{only_one(text)}"}
        prompt = [{"role": "system", "content": SYSTEM_PROMPT}, asked]
        turns.append({"prompt": prompt, "completion": [{"role": "assistant", "content": reply}]})
    return Dataset.from_list(turns)


def _training_record(script: TextScriptArguments, args: TextTrainingConfig) -> dict[str, object]:
    """Return the settings that decide what comes out of a run."""
    names = [*PaperConfig.__annotations__, *TextTrainingConfig.__annotations__, *TRAINER_SETTINGS]
    record = {name: getattr(script, name) for name in LoraSettings.__annotations__} | {"dtype": script.dtype}
    record |= {name: getattr(args, name) for name in names if name not in ("report_to", "world_size")}
    return {name: getattr(value, "value", value) for name, value in record.items() if value is not None}
