"""The routes: requests read and handed to the engine, answers and errors in OpenAI's form."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hmac import compare_digest
from typing import TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from ..replies import Heard
from .decoding import Ended, Event, Job, Prompt
from .engine import Engine
from .errors import ApiError
from .prompts import PromptReader
from .schema import ChatRequest, EmotionRequest, parse_body

BODY_TIMEOUT_S = 60.0  # for a whole body to arrive
HEAD_AFTER_S = 1.0  # of a stream that has nothing to say yet
COMMENT_EVERY_S = 10.0  # in such a stream
CLIENT_GONE = 499  # nginx's; nobody reads it
CLOSE = {"Connection": "close"}  # or the rest of the body would be read, to be thrown away
READERS = 4  # threads that decode clips
Result = TypeVar("Result")


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    name: str  # of the model, for clients
    engine: Engine
    reader: PromptReader
    audio_token_id: int  # of the placeholder
    api_key: str | None = None  # what clients must send as `Authorization: Bearer …`


def create_app(service: Service) -> FastAPI:
    """Return the application, around an engine that is started elsewhere."""
    app = FastAPI(title="relllm", docs_url=None, redoc_url=None)  # their pages load scripts from elsewhere
    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "relllm"}
    handlers = _Handlers(service)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=CLIENT_GONE))
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    routes = APIRouter(prefix="/v1", dependencies=[Depends(handlers.check_key)])
    for path, handler, schema in (
        ("/chat/completions", handlers.chat, ChatRequest.model_json_schema()),
        ("/emotion", handlers.emotion, EmotionRequest.model_json_schema()),
    ):
        body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
        routes.add_api_route(path, handler, methods=["POST"], openapi_extra=body)

    @routes.get("/models")
    async def list_models() -> dict:
        return {"object": "list", "data": [card]}

    @routes.get("/models/{name:path}")
    async def retrieve_model(name: str) -> dict:
        handlers.check_model(name)
        return card

    async def health(_: Request) -> JSONResponse:
        status = service.engine.status
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    app.add_route("/health", health, methods=["GET"])  # and HEAD
    app.include_router(routes)
    return app


class _Handlers:
    """The two routes that run the model, and what is checked before."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="relllm-read")

    async def check_key(self, request: Request) -> None:
        if (expected := self._service.api_key) is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if not compare_digest(key.strip().encode("latin-1"), expected.encode()) or scheme.lower() != "bearer":
            message = "Send the server's key as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer", **CLOSE})

    def check_model(self, name: str) -> None:
        if name != self._service.name:
            message = f"There is no model {name!r} here; this server has {self._service.name!r}."
            raise ApiError(404, message, "model_not_found", param="model")

    async def chat(self, request: Request) -> Response:
        def read(body: bytes) -> tuple[tuple[bool, bool], Prompt]:  # the request, with its base64, is not kept
            parsed = cast(ChatRequest, parse_body(ChatRequest, body))
            self.check_model(parsed.model)
            include_usage = parsed.stream_options is not None and parsed.stream_options.include_usage
            return (bool(parsed.stream), include_usage), self._service.reader.read_chat(parsed)

        (stream, include_usage), job, events = await self._submit(request, read)
        completion = _Completion(self._service, job.prompt)
        if not stream:
            heard, text, ended = await self._wait(request, job, _collect(events))
            return JSONResponse(completion.whole(heard, text, ended))
        # the status is sent with the first event if that comes soon: a failure before it has one of its own
        first = await self._wait(request, job, _next_event(events, HEAD_AFTER_S))
        pieces = _stream(first, events, completion, include_usage)
        return _EventStream(pieces, completion, at_end=lambda: self._service.engine.cancel(job))

    async def emotion(self, request: Request) -> Response:
        def read(body: bytes) -> tuple[None, Prompt]:
            parsed = cast(EmotionRequest, parse_body(EmotionRequest, body))
            self.check_model(parsed.model)
            return None, self._service.reader.read_emotion(parsed)

        _, job, events = await self._submit(request, read)
        heard, _, _ = await self._wait(request, job, _collect(events))
        usage = {"audio_seconds": round(job.prompt.audio_seconds, 3)}
        data = _emotions(heard, job.prompt)
        return JSONResponse({"object": "list", "model": self._service.name, "data": data, "usage": usage})

    async def _submit(
        self, request: Request, read: Callable[[bytes], tuple[Result, Prompt]]
    ) -> tuple[Result, Job, asyncio.Queue[Event]]:
        """Read the body, then hold a place in the queue while a thread makes a prompt of it."""
        engine = self._service.engine
        engine.check_room()  # before the body is read
        loop = asyncio.get_running_loop()
        body = await _read_body(request, round(self._service.reader.limits.max_body_mib * 1024**2))
        engine.reserve()
        try:
            parsed, prompt = await loop.run_in_executor(self._readers, read, body)
        except BaseException:
            engine.release()
            raise
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = engine.submit(prompt, lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        return parsed, job, events

    async def _wait(self, request: Request, job: Job, work: Coroutine[None, None, Result]) -> Result:
        """Await `work`; a job whose client closes the connection first is cancelled, with `ClientDisconnect`."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        working, going = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return working.result()
        except BaseException:
            self._service.engine.cancel(job)
            raise
        finally:
            working.cancel()
            going.cancel()


async def _read_body(request: Request, limit: int) -> bytes:
    """Return the body, no further read than `limit` bytes, no longer waited for than `BODY_TIMEOUT_S`."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        message = "Send the request as JSON, with the header 'Content-Type: application/json'."
        raise ApiError(415, message, "unsupported_media_type", headers=CLOSE)
    message = f"The body is larger than {limit} bytes. Send shorter or compressed clips (FLAC, Ogg)."
    too_large = ApiError(413, message, "request_too_large", headers=CLOSE)
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limit:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        message = f"The body did not arrive within {BODY_TIMEOUT_S:g} s."
        raise ApiError(408, message, "request_timeout", headers=CLOSE) from None


class _EventStream(StreamingResponse):
    """Server-sent events. `at_end` is called however it ends, also if the client goes before the first one."""

    def __init__(self, content: AsyncIterator[bytes], completion: "_Completion", at_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._completion, self._at_end = completion, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unless_failed(message: Message) -> None:
            # a failed stream is cut off, which is logged: for whoever counts answers its 200 would be a success
            if not self._completion.failed or message.get("more_body"):
                await send(message)

        try:
            await super().__call__(scope, receive, send_unless_failed)
        finally:
            self._at_end()


async def _next_event(events: asyncio.Queue[Event], timeout_s: float | None = None) -> Event | None:
    """Return the next event, or `None` if none comes in time; raise an [`ApiError`]."""
    try:
        event = await asyncio.wait_for(events.get(), timeout_s)
    except asyncio.TimeoutError:
        return None
    if isinstance(event, ApiError):
        raise event
    return event


async def _collect(events: asyncio.Queue[Event]) -> tuple[list[Heard], str, Ended]:
    """Return all that a job sends."""
    heard = cast(list[Heard], await _next_event(events))
    pieces = []
    while isinstance(event := await _next_event(events), str):
        pieces.append(event)
    return heard, "".join(pieces), cast(Ended, event)


class _Completion:
    """The answers to one chat request, in OpenAI's JSON with `emotion` beside the choices."""

    def __init__(self, service: Service, prompt: Prompt) -> None:
        self.prompt, self.failed = prompt, False
        self._audio_tokens = prompt.token_ids.count(service.audio_token_id)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}

    def whole(self, heard: Sequence[Heard], text: str, ended: Ended) -> dict[str, object]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": ended.reason}],
            "usage": self.usage(ended),
            "emotion": _emotions(heard, self.prompt),
        }

    def chunk(self, delta: dict[str, str] | None, reason: str | None = None, **more: object) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        choices = [] if delta is None else [choice]
        return _sse({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})

    def usage(self, ended: Ended) -> dict[str, object]:
        read = len(self.prompt.token_ids)
        return {
            "prompt_tokens": read,
            "completion_tokens": ended.num_tokens,
            "total_tokens": read + ended.num_tokens,
            "prompt_tokens_details": {"audio_tokens": self._audio_tokens},
        }


async def _stream(
    event: Event | None, events: asyncio.Queue[Event], completion: _Completion, include_usage: bool
) -> AsyncIterator[bytes]:
    try:
        while not isinstance(event, Ended):
            if event is None:
                yield b": the request waits\n\n"  # a comment: what lies between knows that somebody is there
            elif isinstance(event, str):
                yield completion.chunk({"content": event})
            else:  # what was heard is known before the first token
                emotion = _emotions(cast(list[Heard], event), completion.prompt)
                yield completion.chunk({"role": "assistant", "content": ""}, emotion=emotion)
            event = await _next_event(events, COMMENT_EVERY_S)
        yield completion.chunk({}, event.reason)
        if include_usage:
            yield completion.chunk(None, usage=completion.usage(event))
        yield b"data: [DONE]\n\n"
    except ApiError as error:  # the status is sent; OpenAI's clients raise on this
        completion.failed = True
        yield _sse(error.body())


def _sse(content: object) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def _emotions(heard: Sequence[Heard], prompt: Prompt) -> list[dict[str, object]]:
    """Return what was heard in each clip, with the message that the clip is in (for a chat)."""
    return [
        {
            "index": index,
            **({"message": prompt.clip_messages[index]} if prompt.clip_messages else {}),
            **clip.fields(),
        }
        for index, clip in enumerate(heard)
    ]


def _answer_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):  # of the router: no such route, another method
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        error = ApiError(error.status_code, str(error.detail), code, headers=dict(error.headers or {}))
    if not isinstance(error, ApiError):  # the traceback goes to the log
        error = ApiError(500, "The server failed on this request; its log says why.", "internal_error", headers=CLOSE)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
