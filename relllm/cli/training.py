"""Training: `relllm train`, `train-emotion`, `plan`."""

import typer
from rich.console import Console

app = typer.Typer()
console = Console()
# Every setting of TRL is a flag of these commands, and they have a help page of their own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a ReLLM from a YAML file and flags; `relllm train --help` lists them all.

    Example: relllm train --config recipes/stage2_emotion.yaml --data data/iemocap/targets.jsonl --out runs/iemocap
    """
    from relllm.training.checkpoints import RunComplete
    from relllm.training.run import parse_arguments, run_training

    try:
        trainer = run_training(*parse_arguments(context.args))
    except RunComplete as complete:
        console.print(str(complete))
        return
    if trainer.is_world_process_zero():
        console.print(f"The model and its processor are in [bold]{trainer.args.output_dir}[/bold].")


@app.command("train-emotion", context_settings=PASSED_ON)
def train_emotion(context: typer.Context) -> None:
    """Fine-tune an emotion tower to arousal, dominance and valence; `relllm train-emotion --help` lists the settings.

    Example: relllm train-emotion --model_name_or_path microsoft/wavlm-large --data data/msp --output_dir runs/tower
    """
    from relllm.training.checkpoints import RunComplete
    from relllm.training.emotion_training import parse_emotion_arguments, run_emotion_training

    try:
        trainer = run_emotion_training(*parse_emotion_arguments(context.args))
    except RunComplete as complete:
        console.print(str(complete))
        return
    if trainer.is_world_process_zero():
        console.print(f"The tower is in [bold]{trainer.args.output_dir}[/bold].")


@app.command(context_settings=PASSED_ON)
def plan(context: typer.Context) -> None:
    """Say what a run takes before a GPU is rented: memory, largest batch, speed; `relllm plan --help` lists the flags.

    It takes every setting of `relllm train` and reads configurations only. The exit status is 1 if the batch does not
    fit.

    Example: relllm plan --config recipes/stage2_emotion.yaml --gpu-memory 24GB
    """
    from relllm.training.planning.plan import parse_plan, run_plan

    if not run_plan(*parse_plan(context.args), console):
        raise typer.Exit(1)
