"""From a checkpoint to a listening server, and its end: sockets, signals, grace."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from transformers.utils import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import Service

logger = logging.get_logger(__name__)
LAST_ANSWERS_S = 2.0  # after the grace period, for the errors that end what is still running to be sent
REQUEST_TIMEOUT_S = 30.0  # for a whole request, from the connection or the answer before it on
MOST_CONNECTIONS = 1024  # more get 503 at once
BACKLOG = 16  # connections that are accepted in one go; without a free descriptor asyncio logs each of them
OTHER_FILES = 64  # descriptors kept for what is no connection; those of four goes are open before the first is closed


class _Connection(H11Protocol):
    """A client's connection: closed if a request does not come in time, refused if there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, transport.close)
        if len(self.connections) >= cast(int, self.config.limit_concurrency):
            self.connections.discard(self)  # or uvicorn counts it, and refuses the requests of others
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            transport.close()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete):
            self._deadline.cancel()

    def on_response_complete(self) -> None:
        self._deadline.cancel()
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.close)
        super().on_response_complete()  # where the next request may be waiting already

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._deadline.cancel()


def most_connections() -> int:
    """Return how many connections the process has descriptors for, at most `MOST_CONNECTIONS`."""
    free = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    return max(1, min(MOST_CONNECTIONS, free - 4 * BACKLOG - OTHER_FILES))


class Server(uvicorn.Server):
    """A uvicorn server and its engine: `announce` is called once it accepts requests, `grace_s` is to finish them."""

    def __init__(self, service: Service, *, grace_s: float = 30.0, announce: Callable[[], None] | None = None) -> None:
        quiet: dict[str, Any] = {"http": _Connection, "ws": "none", "lifespan": "off", "log_level": "warning"}
        quiet |= {"server_header": False, "limit_concurrency": most_connections() + 1, "backlog": BACKLOG}
        super().__init__(uvicorn.Config(service.create_app(), **quiet))
        self.engine, self._grace_s, self._announce = service.engine, grace_s, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.start()
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen()  # more may wait to be accepted than are in one go
        if self._announce is not None:
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace_s
        while loop.time() < end and not self.force_exit and self.engine.is_alive():
            await asyncio.sleep(0.05)  # whoever comes meanwhile is told
        self.engine.stop(now=True)
        # a float waits as well
        self.config.timeout_graceful_shutdown = max(0.0, end - loop.time()) + LAST_ANSWERS_S  # type: ignore[assignment]
        await super().shutdown(sockets)


def serve_until_stopped(server: Server, sock: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C and finish what the grace period allows; a longer step ends the process with 0."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn handles them while it runs, and raises them again at its end
    server.run(sockets=[sock])
    server.engine.join(LAST_ANSWERS_S)
    if server.engine.is_alive():
        logger.warning("The model was still in a step at the end of the grace period.")
        os._exit(0)  # its thread cannot be interrupted, and the interpreter must not be torn down around it
