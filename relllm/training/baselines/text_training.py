"""`relllm train-text`: the LLM alone, reading, fine-tuned on a ReLLM's replies: the baseline `text-only-tuned`.

PEFT's LoRA on a bare causal LM, by TRL's `SFTTrainer`, with the paper's settings of RE-LLM where nothing else is said.
The prompt is the one that `relllm evaluate` gives such a system: the transcript where the audio would stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
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
from ..config import OF_A_NEW_MODEL, LoraSettings, PaperConfig, SplitSettings, check_places, check_selection
from ..run import TRAINER_SETTINGS, load_rows
from ..settings import SettingsParser, check_metric, check_tokens, check_trainer

logger = logging.get_logger(__name__)


@dataclass
class TextScriptArguments(LoraSettings, SplitSettings):
    """What `relllm train-text` takes beside [`TextTrainingConfig`]."""

    text_model: str | None = setting(None, "Any causal LM: id or path.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "Of its frozen weights; by default its own. The LoRA is in float32."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_model is None or self.data is None:
            raise ValueError("text_model and data are needed: what to fine-tune, and on which rows.")
        check_settings(self)
        for name in ("lora_r", "lora_alpha", "lora_dropout"):
            if getattr(self, name) is None:
                setattr(self, name, OF_A_NEW_MODEL[name])
        self.check_lora()
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


OWN = [*PaperConfig.__annotations__, *TextTrainingConfig.__annotations__]  # settings with a default of ours


def parse_text_arguments(arguments: Sequence[str]) -> tuple[TextScriptArguments, TextTrainingConfig]:
    """Read settings as [`~relllm.training.settings.SettingsParser.parse_settings`] does."""
    parser = SettingsParser((TextScriptArguments, TextTrainingConfig), command="relllm train-text")
    script, args = parser.parse_settings(arguments)
    return script, args


def run_text_training(script: TextScriptArguments, args: TextTrainingConfig) -> TextTrainer:
    """Train the LoRA, evaluate and save, as the settings say; adapter and tokenizer are in `args.output_dir`.

    It goes on from what is in that folder as [`~relllm.training.run.run_training`] does.
    """
    check_places(script)
    check_trainer(args)
    check_metric(args, ("loss", "mean_token_accuracy", "entropy"))
    assert script.text_model is not None
    check_tokens(args, script.text_model)
    selection = check_selection(script, args)
    with args.main_process_first(desc="reading the rows"):
        train_rows, eval_rows, _ = load_rows(script, args)
        train_rows = keep_spoken(train_rows)
        if isinstance(eval_rows, dict):
            eval_rows = {name: keep_spoken(rows) for name, rows in eval_rows.items()}
        elif eval_rows is not None:
            eval_rows = keep_spoken(eval_rows)
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
        eval_dataset=None if eval_rows is None else write_turns(eval_rows),
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


def write_turns(rows: Dataset | dict[str, Dataset]) -> Dataset:
    """Return the conversations of rows as TRL's `prompt` and `completion`; of several data sets those of all."""
    parts = rows.values() if isinstance(rows, dict) else [rows]
    pairs = [pair for part in parts for pair in zip(part["text"], part["response"], strict=True)]
    return Dataset.from_list([_turns(str(only_one(text)), reply) for text, reply in pairs])


def _turns(text: str, reply: str) -> dict[str, list[dict[str, str]]]:
    asked = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": SPEECH_PROMPT + text}]
    return {"prompt": asked, "completion": [{"role": "assistant", "content": reply}]}


def _training_record(script: TextScriptArguments, args: TextTrainingConfig) -> dict[str, object]:
    """Return the settings that decide what comes out of a run."""
    names = [*OWN, *(name for name in TRAINER_SETTINGS if name != "world_size")]
    record = {one.name: getattr(script, one.name) for one in fields(LoraSettings)} | {"dtype": script.dtype}
    record |= {name: getattr(args, name) for name in names if name != "report_to"}
    return {name: getattr(value, "value", value) for name, value in record.items() if value is not None}
