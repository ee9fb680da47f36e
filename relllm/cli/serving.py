"""An OpenAI-compatible server: `relllm serve`."""

import os
import re
import socket
from pathlib import Path

import typer

from relllm.inference.inference_settings import BatchSettings, RequestLimits, ServerSettings

from .options import console, from_settings
from .talking import load_relllm

app = typer.Typer()


@app.command()
@from_settings
def serve(settings: ServerSettings, batching: BatchSettings, limits: RequestLimits) -> None:
    """Serve a model to clients of OpenAI's API: chat with speech in it, and the emotion in every clip.

    /v1/chat/completions, /v1/models, /v1/emotion, /health. Requests that wait are answered together. Clips
    come as base64; addresses and paths from a client are never read. SIGTERM finishes what is accepted, exit status 0.

    Example: relllm serve runs/demo/re-llm --port 8000
    """
    try:
        from relllm.inference.server.server import Server, build_service, serve_until_stopped
    except ImportError as error:
        raise ImportError(f"Serving needs further packages ({error}): `pip install relllm[serve]`.") from error

    host = settings.host
    key = settings.api_key if settings.api_key is not None else os.environ.get("RELLLM_API_KEY")  # also an empty one
    if key is not None and not re.fullmatch("[!-~]+", key):
        found = "is empty" if not key else "has a space, a line break or a character beyond ASCII"
        raise typer.BadParameter(f"The key (--api-key, RELLLM_API_KEY) {found}. Leave both out to serve without one.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # IPv4 as well
    try:
        sock = socket.create_server((host, settings.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        message = f"Cannot listen on {host}, port {settings.port}: {error.strerror or error}."
        raise typer.BadParameter(message) from error
    with sock:
        model, processor = load_relllm(settings)
        folder = Path(settings.model)
        name = settings.name or (folder.resolve().name if folder.is_dir() else settings.model)
        service = build_service(model, processor, name=name, api_key=key, settings=batching, limits=limits)
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{sock.getsockname()[1]}"
        if key is None and host not in ("localhost", "::1") and not host.startswith("127."):
            console.print("No --api-key: whoever reaches this address can use the model.", style="yellow")

        def announce() -> None:
            console.print(f"Serving {name} at {address}/v1 (Ctrl-C or SIGTERM stops it)")

        serve_until_stopped(Server(service, grace_s=settings.grace_period, announce=announce), sock)
        console.print("Stopped.")
