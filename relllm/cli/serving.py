"""An OpenAI-compatible server: `relllm serve`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console()


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A checkpoint: a directory or a Hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default the id, or the folder's name.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="RELLLM_API_KEY", show_envvar=True, help="What clients must send; a flag is seen in `ps`."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the Hub.")] = "main",
    max_batch_size: Annotated[int, typer.Option(min=1, help="Requests worked on together.")] = 16,
    max_batch_windows: Annotated[
        int, typer.Option(min=1, help="Windows of audio (30 s each for Whisper) worked on together: memory.")
    ] = 64,
    batch_wait_ms: Annotated[float, typer.Option(min=0, help="The first request waits so long for company.")] = 10.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply a request may ask for.")] = 512,
    max_context: Annotated[
        int | None, typer.Option(min=2, help="Longest conversation with its reply, in tokens; by default the LLM's.")
    ] = None,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Largest request, in MiB; more gets 413.")] = 32.0,
    max_audio_seconds: Annotated[float, typer.Option(min=0.025, help="Of all clips of a request together.")] = 120.0,
    max_clips: Annotated[int, typer.Option(min=1, help="Clips in a request.")] = 16,
    min_sampling_rate: Annotated[int, typer.Option(min=4000, help="Of a clip, in Hz.")] = 8_000,
    max_sampling_rate: Annotated[int, typer.Option(max=768_000, help="Of a clip, in Hz.")] = 96_000,
    grace_period: Annotated[float, typer.Option(min=0, help="After SIGTERM, seconds to finish in.")] = 30.0,
) -> None:
    """Serve a model to clients of OpenAI's API: chat with speech in it, and the emotion in every clip.

    /v1/chat/completions, /v1/models, /v1/emotion, /health, /metrics. Requests that wait are answered together. Clips
    come as base64; addresses and paths from a client are never read. SIGTERM finishes what is accepted, exit status 0.

    Example: relllm serve runs/demo/re-llm --port 8000
    """
    import torch
    from transformers import AutoModel, AutoProcessor

    from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration

    try:
        from relllm.inference.server.engine import EngineSettings
        from relllm.inference.server.prompts import Limits
        from relllm.inference.server.server import Server, bind, build_service, run
    except ImportError as error:
        raise ImportError(f"Serving needs further packages ({error}): `pip install relllm[serve]`.") from error

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        sock = bind(host, port)
    except OSError as error:
        raise typer.BadParameter(f"Cannot listen on {host}, port {port}: {error.strerror or error}.") from error
    with sock:
        processor = AutoProcessor.from_pretrained(model, revision=revision)
        loaded = AutoModel.from_pretrained(model, revision=revision, dtype=dtype).to(device).eval()
        if not isinstance(loaded, ReLLMForConditionalGeneration):
            raise typer.BadParameter(f"{model} holds a {type(loaded).__name__}, not a ReLLM.", param_hint="MODEL")
        limits = Limits(
            max_body_bytes=round(max_body_mib * 1024**2),
            max_audio_seconds=max_audio_seconds,
            max_clips=max_clips,
            min_sampling_rate=min_sampling_rate,
            max_sampling_rate=max_sampling_rate,
            max_tokens=max_tokens,
            context_length=max_context,
        )
        settings = EngineSettings(max_batch_size, max_batch_windows, batch_wait_ms / 1000, max_queue)
        shown = name or (Path(model).resolve().name if Path(model).is_dir() else model)
        service = build_service(
            loaded, processor, name=shown, api_key=api_key or None, settings=settings, limits=limits
        )
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{sock.getsockname()[1]}"
        if api_key is None and not _is_loopback(host):
            console.print("[yellow]No --api-key: whoever reaches this address can use the model.[/yellow]")

        def announce() -> None:
            console.print(f"Serving [bold]{shown}[/bold] at {address}/v1 (Ctrl-C or SIGTERM stops it)", soft_wrap=True)

        run(Server(service, grace_s=grace_period, announce=announce), sock)
        console.print("Stopped.")


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
