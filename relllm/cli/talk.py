"""Using a model: `relllm reply`, and `relllm demo`, which makes one to try."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .systems import load_relllm, pick_device

app = typer.Typer()
console = Console()


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
    from transformers import TextStreamer

    from relllm.inference.replies import reply as answer

    loaded, processor = load_relllm(model, device=pick_device(device), revision=revision)
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
    out: Annotated[Path | None, typer.Option(help="Of the run; runs/demo or runs/demo-small.")] = None,
    seed: Annotated[int, typer.Option(help="Of the corpus and of every weight.")] = 0,
    backbone: Annotated[
        Literal["tiny", "small"], typer.Option(help="tiny: everything is trained here. small: Whisper and SmolLM2.")
    ] = "tiny",
    real_models: Annotated[
        Path | None, typer.Option(help="small: folder with whisper-tiny.en and SmolLM2-135M-Instruct.")
    ] = None,
    audio_model: Annotated[str | None, typer.Option(help="small: a Whisper, as a directory or Hub id.")] = None,
    text_model: Annotated[str | None, typer.Option(help="small: a causal LM, as a directory or Hub id.")] = None,
) -> None:
    """Train, evaluate and talk to a RE-LLM on synthetic speech.

    tiny: minutes on two cores, and nothing is downloaded. small: pretrained Whisper tiny.en and SmolLM2-135M-Instruct,
    from the Hub or from folders that you give, joined in two stages within 40 minutes on two cores; needs
    `pip install relllm[demo]` as well.

    Interrupted, it goes on with the step it was in. The speech is rule-made prosody (eSpeak NG), not human emotion.

    Example: relllm demo --backbone small --real-models models --out runs/demo-small
    """
    if backbone == "tiny":
        if given := [place for place in (real_models, audio_model, text_model) if place is not None]:
            raise typer.BadParameter(f"{given[0]} is for --backbone small; the tiny demo trains its own towers.")
        from relllm.demo.tiny import DemoSettings, run_demo

        learned = run_demo(DemoSettings(out=out or Path("runs/demo"), seed=seed), console)
    else:
        from relllm.demo.pretrained import PretrainedSettings, find_models, run_pretrained_demo

        try:
            audio, text = find_models(real_models, audio_model, text_model)
        except FileNotFoundError as error:
            raise typer.BadParameter(str(error), param_hint="--real-models") from error
        settings = PretrainedSettings(
            out=out or Path("runs/demo-small"), audio_model=audio, text_model=text, seed=seed
        )
        learned = run_pretrained_demo(settings, console)
    if not learned:
        raise typer.Exit(1)
