"""From a checkpoint to a listening server, and its end: sockets, signals, grace."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import uvicorn
from transformers import PreTrainedConfig
from transformers.utils import logging

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import BatchSettings, RequestLimits
from .app import Service, create_app
from .engine import Engine
from .prompts import PromptReader

logger = logging.get_logger(__name__)
LAST_ANSWERS_S = 2.0  # after the grace period, for the errors that end what is still running to be sent
MOST_CONNECTIONS = 1024  # beyond them uvicorn answers 503


class Server(uvicorn.Server):
    """A uvicorn server and its engine: `announce` is called once it accepts requests, `grace_s` is to finish them."""

    def __init__(self, service: Service, *, grace_s: float = 30.0, announce: Callable[[], None] | None = None) -> None:
        quiet: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off", "log_level": "warning"}
        quiet |= {"server_header": False, "limit_concurrency": MOST_CONNECTIONS}
        quiet["timeout_graceful_shutdown"] = grace_s + LAST_ANSWERS_S  # a float waits as well
        super().__init__(uvicorn.Config(create_app(service), **quiet))
        self._engine, self._grace_s, self._announce = service.engine, grace_s, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.start()
        await super().startup(sockets)
        if self._announce is not None:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.drain()
        abort = asyncio.get_running_loop().call_later(self._grace_s, self._engine.abort)
        await super().shutdown(sockets)
        abort.cancel()
        self._engine.abort()

    def join_engine(self, timeout_s: float) -> bool:
        """Return whether the model's thread has ended, or does within `timeout_s` seconds."""
        return self._engine.join(timeout_s)


def build_service(
    model: ReLLMForConditionalGeneration,
    processor: ReLLMProcessor,
    *,
    name: str,
    api_key: str | None = None,
    settings: BatchSettings | None = None,
    limits: RequestLimits | None = None,
) -> Service:
    """Put the parts together for one checkpoint in eval mode; without a limit of the context it is the LLM's."""
    limits = limits or RequestLimits()
    if limits.max_context is None:
        text_config = cast(PreTrainedConfig, model.config.text_config).to_dict()
        names = ("max_position_embeddings", "n_positions")  # neither where positions are relative
        context = next((text_config[name] for name in names if name in text_config), None)
        limits = replace(limits, max_context=context)
    engine = Engine(model, processor, settings or BatchSettings())
    return Service(name, engine, PromptReader(processor, limits), processor.audio_token_id, api_key)


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is not listening yet: clients are refused until the model is loaded."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def serve_until_stopped(server: Server, sock: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C and finish what the grace period allows; a longer step ends the process with 0."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn handles them while it runs, and raises them again at its end
    server.run(sockets=[sock])
    if not server.join_engine(LAST_ANSWERS_S):
        logger.warning("The model was still in a step at the end of the grace period.")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # its thread cannot be interrupted, and the interpreter must not be torn down around it
