"""The routes: requests handed to the engine, answers and errors in OpenAI's form.

What does not live here: reading a request (`bodies.py`, `schema.py`, `prompts.py`), batching (`engine.py`), sockets
and signals (`server.py`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hmac import compare_digest
from typing import TypeVar, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .bodies import BodyReader, ClientGone
from .completions import SSE_END, Completion, emotions, sse
from .counters import Metrics
from .engine import Ended, Engine, Event, Failed, Heard, Job, Prompt, Text
from .errors import ApiError
from .prompts import PromptReader
from .schema import ChatRequest, EmotionRequest, parse_body

CLIENT_GONE = 499  # nginx's; nobody reads it but the metrics
READERS = 4  # threads that decode clips
Result = TypeVar("Result")


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Args:
        name (`str`): Of the model, for clients.
        engine ([`Engine`]), reader ([`PromptReader`]), metrics ([`Metrics`]): The parts.
        audio_token_id (`int`): Of the placeholder.
        api_key (`str`, *optional*): What clients must send as `Authorization: Bearer …`; `None` for no key.
    """

    name: str
    engine: Engine
    reader: PromptReader
    metrics: Metrics
    audio_token_id: int
    api_key: str | None = None


@dataclass(frozen=True)
class _Form:
    """How a chat is to be answered. The request itself, with its base64, is not kept until then."""

    stream: bool
    include_usage: bool


def create_app(service: Service) -> FastAPI:
    """The application, around an engine that has been started."""
    app = FastAPI(title="relllm", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    started = int(time.time())
    card = {"id": service.name, "object": "model", "created": started, "owned_by": "relllm"}
    handlers = _Handlers(service)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(ClientGone, lambda *_: Response(status_code=CLIENT_GONE))
    app.add_exception_handler(Exception, _answer_error)
    app.add_middleware(Gate, service=service)
    body = {"chat": _body_schema(ChatRequest), "emotion": _body_schema(EmotionRequest)}
    app.add_api_route("/v1/chat/completions", handlers.chat, methods=["POST"], openapi_extra=body["chat"])
    app.add_api_route("/v1/emotion", handlers.emotion, methods=["POST"], openapi_extra=body["emotion"])

    @app.get("/v1/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict:
        handlers.check_model(name)
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        ready = service.engine.is_ready
        return JSONResponse({"status": "ok" if ready else "stopping"}, status_code=200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


class _Handlers:
    """The two routes that run the model."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bodies = BodyReader(service.reader.limits, lambda: service.engine.is_ready)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="relllm-read")

    async def chat(self, request: Request) -> Response:
        def read(body: bytearray) -> tuple[_Form, Prompt]:
            parsed = cast(ChatRequest, parse_body(ChatRequest, body))
            self.check_model(parsed.model)
            include_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
            return _Form(bool(parsed.stream), include_usage), self._service.reader.read_chat(parsed)

        form, job, events = await self._submit(request, read)
        completion = Completion(self._service.name, job.prompt, self._service.audio_token_id)
        if not form.stream:
            hearings, text, ended = await self._collect(request, job, events)
            return JSONResponse(completion.whole(text, hearings, ended.reason, ended.num_tokens))
        try:  # the status is sent with the first event, so that a failure before it still has one of its own
            first = await _unless_gone(request, _next_event(events))
        except BaseException:
            self._service.engine.cancel(job)
            raise
        stream = _stream(cast(Heard, first), events, completion, form.include_usage)
        return _EventStream(stream, at_end=lambda: self._service.engine.cancel(job))

    async def emotion(self, request: Request) -> Response:
        def read(body: bytearray) -> tuple[None, Prompt]:
            parsed = cast(EmotionRequest, parse_body(EmotionRequest, body))
            self.check_model(parsed.model)
            return None, self._service.reader.read_emotion(parsed)

        _, job, events = await self._submit(request, read)
        hearings, _, _ = await self._collect(request, job, events)
        heard = emotions(hearings, job.prompt)
        usage = {"audio_seconds": round(job.prompt.audio_seconds, 3)}
        return JSONResponse({"object": "list", "model": self._service.name, "data": heard, "usage": usage})

    def check_model(self, name: str) -> None:
        if name != self._service.name:
            message = f"There is no model {name!r} here; this server has {self._service.name!r}."
            raise ApiError(404, message, "model_not_found", param="model")

    async def _submit(
        self, request: Request, read: Callable[[bytearray], tuple[Result, Prompt]]
    ) -> tuple[Result, Job, asyncio.Queue[Event]]:
        """Reads the body, then holds a place in the queue while a thread makes a prompt of it."""
        engine = self._service.engine
        engine.check_room()  # before the body is read
        loop = asyncio.get_running_loop()
        async with self._bodies.read(request) as body:
            engine.reserve()
            try:
                parsed, prompt = await loop.run_in_executor(self._readers, read, body)
            except BaseException:
                engine.release()
                raise
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = engine.submit(prompt, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        return parsed, job, events

    async def _collect(self, request: Request, job: Job, events: asyncio.Queue[Event]) -> tuple[list, str, Ended]:
        """All events of a job; the job ends with the client."""

        async def collect() -> tuple[list, str, Ended]:
            heard = cast(Heard, await _next_event(events))
            pieces = []
            while isinstance(event := await _next_event(events), Text):
                pieces.append(event.text)
            return heard.hearings, "".join(pieces), cast(Ended, event)

        try:
            return await _unless_gone(request, collect())
        except BaseException:
            self._service.engine.cancel(job)
            raise


class _EventStream(StreamingResponse):
    """Server-sent events. `at_end` is called however it ends, also if the client goes before the first one."""

    def __init__(self, content: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def _stream(
    heard: Heard, events: asyncio.Queue[Event], completion: Completion, include_usage: bool
) -> AsyncIterator[bytes]:
    try:
        yield completion.first_chunk(heard.hearings)
        while isinstance(event := await _next_event(events), Text):
            yield completion.text_chunk(event.text)
        ended = cast(Ended, event)
        yield completion.last_chunk(ended.reason)
        if include_usage:
            yield completion.usage_chunk(ended.num_tokens)
        yield SSE_END
    except ApiError as error:  # the status is sent; OpenAI's clients raise on this
        yield sse(error.body())


async def _next_event(events: asyncio.Queue[Event]) -> Event:
    event = await events.get()
    if isinstance(event, Failed):
        raise event.error
    return event


async def _unless_gone(request: Request, work: Coroutine[None, None, Result]) -> Result:
    """Awaits `work`, unless the client closes the connection first.

    Raises:
        ClientGone: If it does; `work` is cancelled.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, going = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        going.cancel()


class Gate:
    """Counts every answer, and lets requests to `/v1` in only with the key. It stands before the routes.

    Args:
        app (`ASGIApp`): What is behind it.
        service ([`Service`]): With the key and the metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = CLIENT_GONE

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"].startswith("/v1/") and not self._has_key(scope):
                answer = _answer_error(None, _wrong_key())
                await answer(scope, receive, send_counted)
            else:
                await self._app(scope, receive, send_counted)
        except Exception:
            status = 500  # answered outside of this, after it has been counted
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # a path of the client's own would be a label each
            self._service.metrics.requests.labels(route, str(status)).inc()
            self._service.metrics.request_seconds.labels(route).observe(time.perf_counter() - start)

    def _has_key(self, scope: Scope) -> bool:
        if self._service.api_key is None:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return compare_digest(key.strip(), self._service.api_key.encode()) and scheme.lower() == b"bearer"


def _wrong_key() -> ApiError:
    message = "Send the server's key as 'Authorization: Bearer KEY'."
    return ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer", "Connection": "close"})


def _answer_error(_: Request | None, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):  # of the router: no such route, another method
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        error = ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {}))
    if not isinstance(error, ApiError):  # the traceback goes to the log
        error = ApiError(500, "The server failed on this request; its log says why.", "internal_error")
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def _body_schema(kind: type[ChatRequest] | type[EmotionRequest]) -> dict[str, object]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


__all__ = ["Gate", "Service", "create_app"]
