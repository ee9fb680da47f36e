"""From a checkpoint to a listening server, and its end: sockets, signals, grace."""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import uvicorn
from transformers import PreTrainedConfig
from transformers.utils import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import BatchSettings, RequestLimits
from .app import Service, create_app
from .engine import Engine
from .prompts import PromptReader

logger = logging.get_logger(__name__)
LAST_ANSWERS_S = 2.0  # after the grace period, for the errors that end what is still running to be sent
HEAD_TIMEOUT_S = 20.0  # for the whole head of a request, from the connection or the answer before it on
MOST_CONNECTIONS = 1024  # more get 503 at once
BACKLOG = 64  # connections that are accepted in one go; without a free descriptor asyncio logs each of them
OTHER_FILES = 64  # descriptors kept for what is no connection


class _Connection(H11Protocol):
    """A client's connection: closed if a head does not come in time, refused if there are too many."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) >= cast(int, self.config.limit_concurrency):
            self.connections.discard(self)  # or uvicorn counts it, and refuses the requests of others
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            transport.close()
        else:
            self._expect_head()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete and self._head_timer is not None:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        self._expect_head()  # before the next one, which may have come already
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)


def most_connections() -> int:
    """Return how many connections the process has descriptors for, at most `MOST_CONNECTIONS`."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    left = descriptors - len(os.listdir("/dev/fd")) - BACKLOG - OTHER_FILES
    return max(1, min(MOST_CONNECTIONS, left))


class Server(uvicorn.Server):
    """A uvicorn server and its engine: `announce` is called once it accepts requests, `grace_s` is to finish them."""

    def __init__(self, service: Service, *, grace_s: float = 30.0, announce: Callable[[], None] | None = None) -> None:
        quiet: dict[str, Any] = {"http": _Connection, "ws": "none", "lifespan": "off", "log_level": "warning"}
        quiet |= {"server_header": False, "limit_concurrency": most_connections() + 1, "backlog": BACKLOG}
        super().__init__(uvicorn.Config(create_app(service), **quiet))
        self._engine, self._grace_s, self._announce = service.engine, grace_s, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.start()
        await super().startup(sockets)
        if self._announce is not None:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace_s
        abort = loop.call_at(end, self._engine.abort)
        while loop.time() < end and not self.force_exit and not self._engine.join(0):
            await asyncio.sleep(0.05)  # whoever comes meanwhile is told
        # a float waits as well
        self.config.timeout_graceful_shutdown = max(0.0, end - loop.time()) + LAST_ANSWERS_S  # type: ignore[assignment]
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
