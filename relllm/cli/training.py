"""Training: `relllm train`, `train-emotion`, `write-targets`, `annotate`, `plan`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console()
# Every setting of TRL is a flag of these commands, and they have a help page of their own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("write-targets")
def write_targets(
    data: Annotated[str, typer.Argument(help="A corpus: a directory, a .jsonl/.csv/.parquet file, or a Hub id.")],
    text_model: Annotated[str, typer.Option(help="The chat LLM that writes: an id, a path, or its name there.")],
    out: Annotated[Path, typer.Option(help="The rows with `response`: .jsonl or .parquet.")],
    split: Annotated[str | None, typer.Option(help="Split of the data; by default every one.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="OpenAI-compatible, such as http://host:8000/v1.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON: further fields of the endpoint's requests.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the endpoint at once.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Replies a local LLM writes at once.")] = 16,
    device: Annotated[str, typer.Option(help="Of a local LLM: cpu, cuda, cuda:1, … or auto.")] = "auto",
    revision: Annotated[str, typer.Option(help="Of a local LLM: branch, tag or commit on the Hub.")] = "main",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, with a temperature.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="Before the transcript; {emotion} may stand in it.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System turn of the writer; empty for none.")] = None,
    min_words: Annotated[int, typer.Option(min=1, help="Shorter replies are dropped.")] = 3,
    max_words: Annotated[int, typer.Option(min=1, help="Longer replies are dropped.")] = 150,
) -> None:
    """Have a chat LLM write the replies to learn, from transcript and emotion.

    Refusals and junk are dropped; what and why is in NAME.report.json. Killed, the same command goes on where it was.

    Example: relllm write-targets corpora/esd --text-model Qwen/Qwen2.5-7B-Instruct --out corpora/esd/targets.jsonl
    """
    from relllm.data.replies.targets import run_write_targets

    given = {"prompt": prompt, "system_prompt": system_prompt}
    try:
        report = run_write_targets(
            data,
            out,
            text_model,
            split=split,
            endpoint=endpoint,
            endpoint_options={"api_key_env": api_key_env, "concurrency": concurrency},
            extra_body=extra_body,
            batch_size=batch_size,
            device=device,
            revision=revision,
            sampling={"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
            prompts={name: value for name, value in given.items() if value is not None},
            words=(min_words, max_words),
            console=console,
        )
    except (PermissionError, ConnectionError) as error:  # of the endpoint; the message says what to do
        console.print(f"[red]stopped:[/red] {error}")
        raise typer.Exit(1) from error
    if not report["written"]:
        raise typer.Exit(1)


@app.command()
def annotate(
    data: Annotated[str, typer.Argument(help="A corpus: a directory, a .jsonl/.csv/.parquet file, or a Hub id.")],
    emotion_model: Annotated[str, typer.Option(help="The emotion tower: an id or a path.")],
    out: Annotated[Path, typer.Option(help="The rows with dimensions: .jsonl or .parquet.")],
    split: Annotated[str | None, typer.Option(help="Split of the data; by default every one.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace numbers that are there.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips read at once.")] = 16,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
    revision: Annotated[str, typer.Option(help="Of the tower: branch, tag or commit on the Hub.")] = "main",
) -> None:
    """Read arousal, dominance and valence with an emotion tower where a corpus has none.

    The column `dimension_source` says of each row whether its numbers are labels or a model's. Clips that cannot be
    read are in NAME.report.json. Killed, the same command goes on where it was.

    Example: relllm annotate corpora/esd --emotion-model audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim
    --out corpora/esd/annotated.jsonl
    """
    from relllm.data.annotate import AnnotationSettings, run_annotate

    settings = AnnotationSettings(emotion_model, revision, overwrite)
    run_annotate(data, out, settings, split=split, batch_size=batch_size, device=device, console=console)


@app.command(context_settings=PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a ReLLM from a YAML file and flags; `relllm train --help` lists them all.

    Example: relllm train --config recipes/stage2_emotion.yaml --data data/iemocap --output_dir runs/iemocap
    """
    from relllm.training.run import parse_arguments, run_training

    trainer = run_training(*parse_arguments(context.args))
    if trainer.is_world_process_zero():
        console.print(f"The model and its processor are in [bold]{trainer.args.output_dir}[/bold].")


@app.command("train-emotion", context_settings=PASSED_ON)
def train_emotion(context: typer.Context) -> None:
    """Fine-tune an emotion tower to arousal, dominance and valence; `relllm train-emotion --help` lists the settings.

    Example: relllm train-emotion --model_name_or_path microsoft/wavlm-large --data data/msp --output_dir runs/tower
    """
    from relllm.training.emotion_training import parse_emotion_arguments, run_emotion_training

    trainer = run_emotion_training(*parse_emotion_arguments(context.args))
    if trainer.is_world_process_zero():
        console.print(f"The tower is in [bold]{trainer.args.output_dir}[/bold].")


@app.command(context_settings=PASSED_ON)
def plan(context: typer.Context) -> None:
    """Say what a run takes before a GPU is rented: memory, largest batch, speed; `relllm plan --help` lists the flags.

    It takes every setting of `relllm train` and reads configurations only. The exit status is 1 if the batch does not
    fit.

    Example: relllm plan --config recipes/stage2_emotion.yaml --gpu-memory 24GB
    """
    from relllm.training.plan import parse_plan, run_plan

    if not run_plan(*parse_plan(context.args), console):
        raise typer.Exit(1)
