"""The `relllm` command. Heavy imports are inside the commands, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="relllm",
    help="RE-LLM: a speech LLM that hears how something is said.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
prepare = typer.Typer(help="Write corpora in the form that training reads.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")
console = Console()
# Every setting of TRL is a flag of these commands, and they have a help page of their own.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.callback()
def _commands() -> None:
    """RE-LLM: a speech LLM that hears how something is said."""


@app.command()
def reply(
    model: Annotated[str, typer.Argument(help="A checkpoint: a directory or a Hub id.")],
    audio: Annotated[list[str], typer.Argument(help="WAV, FLAC, OGG or MP3 files, or URLs.")],
    instruction: Annotated[str | None, typer.Option(help="Text before the audio.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System turn; empty for none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
) -> None:
    """Answer spoken turns: the reply as it is written, the emotion heard, arousal, dominance and valence.

    A file that cannot be read is named, the others are answered, and the exit status is 1.

    Example: relllm reply runs/demo/re-llm question.wav
    """
    import torch
    from transformers import AutoModel, AutoProcessor, TextStreamer

    from relllm.inference import reply as answer
    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(model, revision=revision)
    loaded = AutoModel.from_pretrained(model, revision=revision).to(device).eval()
    if not isinstance(loaded, ReLLMForConditionalGeneration):
        raise typer.BadParameter(f"{model} holds a {type(loaded).__name__}, not a ReLLM.", param_hint="MODEL")
    given = {"instruction": instruction, "system_prompt": system_prompt}
    request = {name: value for name, value in given.items() if value is not None}
    failed = 0
    for source in audio:
        console.print(f"[bold]{source}[/bold]")
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            heard = answer(
                loaded, processor, source, streamer=streamer, max_new_tokens=max_new_tokens, **request
            ).hearing
        except (OSError, ValueError) as error:
            failed += 1
            console.print(f"[red]not answered:[/red] {error}")
            continue
        dimensions = "  ".join(f"{name} {value:.2f}" for name, value in heard.dimensions.items())
        console.print(f"[dim]{heard.emotion} {heard.probabilities[heard.emotion]:.0%}  {dimensions}[/dim]")
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where corpus, models, plots and results go.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the corpus and of every weight.")] = 0,
) -> None:
    """Train, evaluate and talk to a small RE-LLM on synthetic speech: minutes on two cores, nothing downloaded.

    Interrupted, it goes on with the step it was in. The speech is rule-made prosody (eSpeak NG), not human emotion.
    """
    from relllm.demo import DemoSettings, run_demo

    if not run_demo(DemoSettings(out=out, seed=seed), console):
        raise typer.Exit(1)


@app.command("write-targets")
def write_targets(
    data: Annotated[str, typer.Argument(help="A corpus: a directory, a .jsonl/.csv/.parquet file, or a Hub id.")],
    text_model: Annotated[str, typer.Option(help="The chat LLM that writes: an id, a path, or its name there.")],
    out: Annotated[Path, typer.Option(help="The rows with `response`: .jsonl or .parquet.")],
    split: Annotated[str | None, typer.Option(help="Split of the data.")] = None,
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
    from relllm.training.targets import run_write_targets

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
    split: Annotated[str | None, typer.Option(help="Split of the data.")] = None,
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
    from relllm.training.annotate import AnnotationSettings, run_annotate

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
    from relllm.training.emotion_run import parse_emotion_arguments, run_emotion_training

    trainer = run_emotion_training(*parse_emotion_arguments(context.args))
    if trainer.is_world_process_zero():
        console.print(f"The tower is in [bold]{trainer.args.output_dir}[/bold].")


@prepare.command()
def synthetic(
    out: Annotated[Path, typer.Option(help="Folder of the corpus.")] = Path("data/synthetic"),
    train_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 180,
    validation_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 30,
    test_clips: Annotated[int, typer.Option(min=1, help="Of each of the five emotions.")] = 40,
    seed: Annotated[int, typer.Option(help="The same settings give the same bytes.")] = 0,
) -> None:
    """Synthesise speech in five emotions with replies and all labels: rule-made prosody, not human emotion."""
    from relllm.data.synthetic import synthesize_corpus

    corpus = synthesize_corpus(
        out,
        train_clips_per_emotion=train_clips,
        validation_clips_per_emotion=validation_clips,
        test_clips_per_emotion=test_clips,
        seed=seed,
    )
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in corpus.items())
    console.print(f"{counts} clips in [bold]{out}[/bold]")


@prepare.command("tiny-towers")
def tiny_towers(
    out: Annotated[Path, typer.Option(help="Folder of the three towers.")] = Path("data/tiny-towers"),
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write three tiny towers with random weights, for recipes/smoke.yaml."""
    from relllm.training.tiny_towers import make_tiny_towers

    make_tiny_towers(out, seed=seed)
    console.print(f"speech, emotion and llm in [bold]{out}[/bold]")


@app.command()
def merge(
    light: Annotated[str, typer.Argument(help="A light checkpoint: a directory or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Where the full checkpoint goes.")],
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
    audio_tower: Annotated[str | None, typer.Option(help="Where the speech tower is, if it moved.")] = None,
    emotion_tower: Annotated[str | None, typer.Option(help="Where the emotion tower is, if it moved.")] = None,
    text_model: Annotated[str | None, typer.Option(help="Where the LLM is, if it moved.")] = None,
) -> None:
    """Write the full checkpoint of a light one: with its towers in it, and the processor's files.

    Example: relllm merge runs/stage2/checkpoint-900 --out re-llm
    """
    from relllm.checkpoints import merge_checkpoint

    moved = {"audio_tower": audio_tower, "emotion_tower": emotion_tower, "text_model": text_model}
    towers = {name: place for name, place in moved.items() if place is not None}
    merge_checkpoint(light, out, towers=towers, revision=revision)
    console.print(f"Full checkpoint: [bold]{out}[/bold]")


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


def main() -> None:
    """Entry point of the `relllm` command."""
    app()


if __name__ == "__main__":
    main()
