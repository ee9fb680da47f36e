"""Training: `relllm train`, `train-emotion`, `train-text`, `plan`."""

from importlib import import_module

import typer

from relllm.setting import METHODS, find_method

from .options import console
from .training_help import show_training_help

app = typer.Typer()
TRAINED_BY = {  # of `relllm train`, by its method: a module, and what of it reads the settings and what trains
    "sft": ("training.run", ("parse_arguments", "run_training")),
    "dpo": ("preferences.dpo", ("parse_dpo", "run_dpo")),
    "grpo": ("preferences.grpo", ("parse_grpo", "run_grpo")),
}
# Every setting of TRL is a flag of these commands, and they have a help page of their own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a ReLLM from a YAML file and flags; `relllm train --help` lists them all.

    Every setting is a line of the file and a flag; a flag wins. You must say where the rows are (--data), what to
    start from (--model_name_or_path for a ReLLM, or --audio_tower and --text_model for a new one) and where the run
    goes (--output_dir). Everything else has the paper's value; see docs/training.md for the sentence behind each.
    Interrupted, the same command goes on from the last complete checkpoint.

    By default it trains on the replies of rows. With `method: dpo`, a line of recipes/preference_dpo.yaml, on pairs of
    a better and a worse one, against the weights that it starts from: rows have audio, `chosen` and `rejected`
    (`relllm score-replies` writes them). With `method: grpo`, of recipes/reward_grpo.yaml, by rewards (--rewards) of
    replies that it draws itself. `relllm train --method dpo --help` lists the settings of one; see
    docs/preferences.md.

    Example: relllm train --config recipes/stage2_emotion.yaml --data data/iemocap/targets.jsonl --out runs/iemocap
    """
    module, names = TRAINED_BY[_method(context)]
    _run(context, module, names, "The model and its processor are in")


@app.command("train-emotion", context_settings=PASSED_ON)
def train_emotion(context: typer.Context) -> None:
    """Fine-tune an emotion tower to arousal, dominance and valence; `relllm train-emotion --help` lists the settings.

    It starts from a wav2vec2, HuBERT or WavLM encoder (which gets a fresh head) or from a tower that has its head
    already, and is what `--emotion_tower` takes then. A dimension that the training rows have no label of is not
    trained, and the tower's configuration says so. Of a corpus that has emotions alone, `--targets emotions` teaches
    these: such a tower reads no dimension. The checkpoint with the best mean CCC on the development split is the one
    that is kept. Interrupted, the same command goes on from the last complete checkpoint.

    Example: relllm train-emotion --model_name_or_path microsoft/wavlm-large --data data/msp --output_dir runs/tower
    """
    _run(context, "training.emotion_training", ("parse_emotion_arguments", "run_emotion_training"), "The tower is in")


@app.command("train-text", context_settings=PASSED_ON)
def train_text(context: typer.Context) -> None:
    """Fine-tune an LLM alone on transcripts and replies, the baseline text-only-tuned; `--help` lists the settings.

    Rows need `text` and `response`; the prompt is the one that `relllm evaluate` gives to text-only systems, and the
    result a PEFT adapter (LoRA on all linear layers). Interrupted, the same command goes on from the last complete
    checkpoint.

    Example: relllm train-text --config recipes/text_only.yaml --data data/iemocap/targets.jsonl --out runs/text
    """
    names = ("parse_text_arguments", "run_text_training")
    _run(context, "training.baselines.text_training", names, "The adapter is in")


@app.command(context_settings=PASSED_ON)
def plan(context: typer.Context) -> None:
    """Say what a run takes before a GPU is rented: memory, largest batch, speed; `relllm plan --help` lists the flags.

    It takes every setting of `relllm train` and reads configurations only. The exit status is 1 if the batch does not
    fit.

    Example: relllm plan --config recipes/stage2_emotion.yaml --gpu-memory 24GB
    """
    if _show_help(context):
        return
    if (method := _method(context)) != METHODS[0]:
        raise typer.BadParameter(f"method: {method} is not planned, only {METHODS[0]}. Plan a recipe of that.")
    from relllm.training.planning.plan import parse_plan, run_plan

    if not run_plan(*parse_plan(context.args), console):
        raise typer.Exit(1)


def _run(context: typer.Context, module: str, names: tuple[str, str], what: str) -> None:
    """Parse, train and say where the result is, by the functions of a module; or print the settings."""
    if _show_help(context):
        return
    from relllm.training.checkpoints import RunComplete

    parse, run = (getattr(import_module(f"relllm.{module}"), name) for name in names)
    try:
        trainer = run(*parse(context.args))
    except RunComplete as complete:
        console.print(str(complete))
        return
    if trainer.is_world_process_zero():
        console.print(f"{what} {trainer.args.output_dir}.")


def _method(context: typer.Context) -> str:
    try:
        return find_method(context.args)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _show_help(context: typer.Context) -> bool:
    """Print the settings of a command that asks for them; tell whether it did."""
    if asked := bool({"--help", "-h"}.intersection(context.args)):
        command = context.info_name or ""
        method = _method(context) if command == "train" else METHODS[0]
        page = command if method == METHODS[0] else f"{command} --method {method}"
        print(show_training_help(page, context.command.help or ""), end="")
    return asked
