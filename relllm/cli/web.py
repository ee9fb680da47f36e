"""`relllm web`: a conversation in the browser. The page itself is in `relllm/web/`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .systems import load_systems

app = typer.Typer()
console = Console()


@app.command()
def web(
    model: Annotated[str, typer.Argument(help="A ReLLM checkpoint: a directory or a Hub id.")],
    baseline: Annotated[str | None, typer.Option(help="Beside it a second ReLLM, for example a speech-only.")] = None,
    text_only: Annotated[
        str | None, typer.Option(help="Beside it a bare LLM: a directory, a Hub id, or `own` for the one in MODEL.")
    ] = None,
    transcriber: Annotated[
        str | None,
        typer.Option(help="Speech recognition that writes spoken turns down for --text-only: Whisper, CTC."),
    ] = None,
    examples: Annotated[Path | None, typer.Option(help="Clips to try, of `relllm prepare examples`.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Text before a clip; empty for none.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System turn; empty for none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 128,
    host: Annotated[
        str, typer.Option(help="Address to serve on; 127.0.0.1 is seen from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 7860,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of MODEL on the Hub.")] = "main",
) -> None:
    """Talk with a model in the browser: microphone, upload or text; what was heard, as bars and over the turns.

    Every browser tab is a conversation of its own; they take turns at the
    model. Nothing is sent elsewhere, and recordings are deleted. Browsers
    give the microphone to https pages and to localhost only: from another
    machine use `ssh -L 7860:localhost:7860 HOST`. There is no password: do
    not serve it to a network that you do not trust.

    Example: relllm web runs/demo/re-llm --baseline runs/demo/speech-only --examples data/examples
    """
    from functools import partial

    from relllm.demo.examples import read_examples
    from relllm.inference.web.page import Page
    from relllm.inference.web.session import System

    given = {"instruction": instruction, "system_prompt": system_prompt}
    request = {name: value for name, value in given.items() if value is not None}
    try:
        clips = read_examples(examples) if examples is not None else []
        systems, tokenizers = load_systems(
            model, text_only=text_only, speech_only=baseline, transcriber=transcriber, device=device, revision=revision
        )
        page = Page(
            {name: System(partial(start, **request), tokenizers[name]) for name, start in systems.items()},
            examples=clips,
            max_new_tokens=max_new_tokens,
        )
        console.print(f"{escape(model)}: http://{host}:{port}  (Ctrl-C ends)")
        page.launch(host=host, port=port)
    except (ImportError, OSError) as error:  # Gradio or the examples are missing, the port is taken
        console.print(f"[red]stopped:[/red] {escape(str(error))}")
        raise typer.Exit(1) from error
