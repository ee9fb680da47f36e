"""Using a model: `relllm reply`, and `relllm demo`, which makes one to try."""

from typing import Annotated

import typer
from rich.console import Console

from relllm.demo.demo_settings import DemoSettings

from .options import from_settings
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
@from_settings
def demo(settings: DemoSettings) -> None:
    """Train, evaluate and talk to a RE-LLM on synthetic speech: minutes on two cores, and nothing is downloaded.

    Interrupted, it goes on with the step it was in. The speech is rule-made prosody (eSpeak NG), not human emotion.

    Example: relllm demo --out runs/demo
    """
    from relllm.demo.tiny import run_demo

    if not run_demo(settings, console):
        raise typer.Exit(1)
