"""Reading the bodies of requests: no further than a limit, no longer than a time, not too many at once."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from fastapi import Request

from .errors import ApiError, stopping
from .prompts import Limits

BODIES_AT_ONCE = 8  # of the largest size; of smaller ones more
LOOK_UP_S = 0.5  # how often a slow body is left to see whether the server is stopping
CLOSE = {"Connection": "close"}  # or the rest of the body would be read, to be thrown away


class ClientGone(Exception):
    """The client closed the connection before its answer."""


class BodyReader:
    """Reads bodies, and knows how much is in memory: many clients that send at once must not fill it.

    Args:
        limits ([`Limits`]): Bytes and seconds of a body.
        is_open (`Callable[[], bool]`): Whether requests are still accepted. If not, no body is waited for.
    """

    def __init__(self, limits: Limits, is_open: Callable[[], bool]) -> None:
        self._limits, self._is_open = limits, is_open
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request, which counts as held until the block is left.

        Raises:
            ApiError: 413 if it is larger than the limit, 415 if it is not JSON, 408 if it does not arrive in time, 429
                if too much is being read at once, 503 if the server is stopping.
            ClientGone: If the client closes the connection.
        """
        self._check_head(request)
        body = bytearray()
        try:
            async for chunk in self._chunks(request):
                body += chunk
                self._held += len(chunk)
                if len(body) > self._limits.max_body_bytes:
                    raise self._too_large()
                if self._held > BODIES_AT_ONCE * self._limits.max_body_bytes:
                    message = "Too many large requests are being sent at once. Try again later."
                    raise ApiError(429, message, "too_many_bodies", headers={"Retry-After": "1", **CLOSE})
            yield body
        finally:
            self._held -= len(body)

    def _check_head(self, request: Request) -> None:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            message = "Send the request as JSON, with the header 'Content-Type: application/json'."
            raise ApiError(415, message, "unsupported_media_type", headers=CLOSE)
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > self._limits.max_body_bytes:
            raise self._too_large()

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        limit_s = self._limits.body_timeout_s
        deadline = time.monotonic() + limit_s
        more = True
        while more:
            if not self._is_open():
                raise stopping()
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ApiError(408, f"The body did not arrive within {limit_s:g} s.", "request_timeout", headers=CLOSE)
            try:
                message = await asyncio.wait_for(request.receive(), min(left_s, LOOK_UP_S))
            except asyncio.TimeoutError:
                continue
            if message["type"] == "http.disconnect":
                raise ClientGone
            yield message.get("body", b"")
            more = message.get("more_body", False)

    def _too_large(self) -> ApiError:
        limit = self._limits.max_body_bytes
        message = f"The body is larger than {limit} bytes. Send shorter or compressed clips (FLAC, Ogg)."
        return ApiError(413, message, "request_too_large", headers=CLOSE)


__all__ = ["BodyReader", "ClientGone"]
