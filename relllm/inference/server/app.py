"""The routes: requests read and handed to the engine, answers and errors in OpenAI's form."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hmac import compare_digest
from typing import TypeAlias

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from relllm.modeling.modeling_relllm import ReLLMForConditionalGeneration
from relllm.processing.processing_relllm import ReLLMProcessor

from ..inference_settings import BatchSettings, RequestLimits
from ..replies import Heard
from .engine import Engine
from .prompts import PromptReader
from .schema import ApiError, Asked, ChatRequest, EmotionRequest, parse_body
from .writing import Ended, Event, Job, Piece, Prompt

HEAD_AFTER_S = 1.0  # of a stream that has nothing to say yet
COMMENT_EVERY_S = 10.0  # in such a stream
LOOK_EVERY_S = 0.5  # whether the client of a whole answer is still there
Events: TypeAlias = asyncio.Queue[Event]
READERS = ThreadPoolExecutor(4, "relllm-reader")  # so many requests are decoded at once
CLOSE = {"Connection": "close"}  # or the rest of the body would be read, to be thrown away


class Service:
    """The routes, and what they need, for one checkpoint in eval mode.

    `name` is the model's for clients, `api_key` what they must send as `Authorization: Bearer …`. The context is by
    default the LLM's.
    """

    def __init__(
        self,
        model: ReLLMForConditionalGeneration,
        processor: ReLLMProcessor,
        *,
        name: str,
        api_key: str | None,
        settings: BatchSettings,
        limits: RequestLimits,
    ) -> None:
        if limits.max_context is None:  # nor has the LLM one where positions are relative
            context = getattr(model.config.text_config, "max_position_embeddings", None)
            limits = replace(limits, max_context=context)
        self.name, self.api_key = name, api_key
        self.engine, self.reader = Engine(model, processor, settings), PromptReader(processor, limits)

    def create_app(self) -> Starlette:
        """Return the application, around an engine that is started elsewhere."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/emotion", self._emotion, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/health", self._health),  # GET and HEAD
        ]
        handlers: dict = dict.fromkeys((ApiError, HTTPException, Exception), _answer_error)
        handlers[ClientDisconnect] = lambda *_: Response(status_code=499)  # nginx's; nobody reads it
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _chat(self, request: Request) -> Response:
        job, events = await self._submit(request, ChatRequest, self.reader.read_chat)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if job.prompt.options is None or not job.prompt.options.stream:
            return JSONResponse(_whole(head, job.prompt, *await self._wait(request, job, events)))
        # the status is sent with the first event if that comes soon: a failure before it has one of its own
        pieces = _stream(head, job.prompt, await _next_event(events, HEAD_AFTER_S), events)
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
        return StreamingResponse(pieces, headers=headers, background=BackgroundTask(self.engine.cancel, job))

    async def _emotion(self, request: Request) -> Response:
        job, events = await self._submit(request, EmotionRequest, self.reader.read_emotion)
        heard, _, _ = await self._wait(request, job, events)
        usage = {"audio_seconds": round(job.prompt.audio_seconds, 3)}
        data = _emotions(heard, job.prompt)
        return JSONResponse({"object": "list", "model": self.name, "data": data, "usage": usage})

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        card = {"id": self.name, "object": "model", "created": 0, "owned_by": "relllm"}
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [card]})
        self._check_model(name)
        return JSONResponse(card)

    async def _health(self, request: Request) -> Response:
        status = self.engine.status
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    def _check_key(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = compare_digest(key.strip().encode("latin-1"), (self.api_key or "").encode())
        if self.api_key is not None and not (right and scheme.lower() == "bearer"):
            message = "Send the server's key as 'Authorization: Bearer KEY'."
            raise ApiError(message, "invalid_api_key", status=401, headers={"WWW-Authenticate": "Bearer", **CLOSE})

    def _check_model(self, name: str) -> None:
        if name != self.name:
            message = f"There is no model {name!r} here; this server has {self.name!r}."
            raise ApiError(message, "model_not_found", status=404, param="model")

    async def _submit(
        self, request: Request, kind: type[Asked], read: Callable[[Asked], Prompt]
    ) -> tuple[Job, Events]:
        """Read the body, have a thread make a prompt of it, and put that into the queue."""
        self._check_key(request)
        self.engine.check_room()  # before the body is read
        body = await _read_body(request, round(self.reader.limits.max_body_mib * 1024**2))

        def parse() -> Prompt:  # the request, with its base64, is not kept
            asked = parse_body(kind, body)
            self._check_model(asked.model)
            return read(asked)

        loop = asyncio.get_running_loop()
        events = Events()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        self.engine.check_room()  # others' bodies have come meanwhile
        reading = loop.run_in_executor(READERS, parse)
        self.engine.being_read.add(reading)
        reading.add_done_callback(self.engine.being_read.discard)
        return self.engine.submit(await reading, emit), events

    async def _wait(self, request: Request, job: Job, events: Events) -> tuple[list[Heard], str, Ended]:
        """Return all that a job sends; one whose client closes the connection first is cancelled."""
        heard: list[Heard] = []
        text, event = "", None
        while not isinstance(event, Ended):
            event = await _next_event(events, LOOK_EVERY_S)
            if isinstance(event, list):
                heard = event
            elif isinstance(event, str):
                text += event
            if await request.is_disconnected():
                self.engine.cancel(job)
                raise ClientDisconnect
        return heard, text, event


async def _read_body(request: Request, limit: int) -> bytes:
    """Return the body, no further read than `limit` bytes."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        message = "Send the request as JSON, with the header 'Content-Type: application/json'."
        raise ApiError(message, "unsupported_media_type", status=415, headers=CLOSE)
    size, body = int(request.headers.get("content-length", 0)), bytearray()
    if size <= limit:
        async for chunk in request.stream():
            body += chunk
            if (size := len(body)) > limit:
                break
    if size > limit:
        message = f"The body is larger than {limit} bytes. Send shorter or compressed clips (FLAC, Ogg)."
        raise ApiError(message, "request_too_large", status=413, headers=CLOSE)
    return bytes(body)


async def _next_event(events: Events, timeout_s: float) -> Piece | None:
    """Return the next event, or `None` if none comes in time; raise an [`ApiError`]."""
    try:
        event = await asyncio.wait_for(events.get(), timeout_s)
    except asyncio.TimeoutError:
        return None
    if isinstance(event, ApiError):
        raise event
    return event


def _whole(head: dict, prompt: Prompt, heard: Sequence[Heard], text: str, ended: Ended) -> dict[str, object]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ended.reason}
    more = {"usage": _usage(prompt, ended), "emotion": _emotions(heard, prompt)}
    return {**head, "object": "chat.completion", "choices": [choice], **more}


async def _stream(head: dict, prompt: Prompt, event: Piece | None, events: Events) -> AsyncIterator[str]:
    def chunk(delta: dict[str, str] | None, reason: str | None = None, **more: object) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        content = {**head, "object": "chat.completion.chunk", "choices": [] if delta is None else [choice], **more}
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        while not isinstance(event, Ended):
            if event is None:
                yield ": the request waits\n\n"  # a comment: what lies between knows that somebody is there
            elif isinstance(event, str):
                yield chunk({"content": event})
            else:  # what was heard is known before the first token
                yield chunk({"role": "assistant", "content": ""}, emotion=_emotions(event, prompt))
            event = await _next_event(events, COMMENT_EVERY_S)
    except ApiError as error:  # the status is sent; OpenAI's clients raise on this
        yield f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n"
        raise  # cuts the answer off: for whoever counts answers its 200 would be a success
    yield chunk({}, event.reason)
    if prompt.options is not None and prompt.options.stream_options.get("include_usage"):
        yield chunk(None, usage=_usage(prompt, event))
    yield "data: [DONE]\n\n"


def _usage(prompt: Prompt, ended: Ended) -> dict[str, object]:
    read, written = len(prompt.token_ids), ended.num_tokens
    details = {"prompt_tokens_details": {"audio_tokens": prompt.audio_tokens}}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, **details}


def _emotions(heard: Sequence[Heard], prompt: Prompt) -> list[dict[str, object]]:
    """Return what was heard in each clip, with the message that the clip is in (for a chat)."""
    places = [{"message": message} for message in prompt.clip_messages] or [{}] * len(heard)
    pairs = zip(places, heard, strict=True)
    return [{"index": index, **place, **clip.fields()} for index, (place, clip) in enumerate(pairs)]


def _answer_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):  # of the router: no such route, another method
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        error = ApiError(str(error.detail), code, status=error.status_code, headers=dict(error.headers or {}))
    if not isinstance(error, ApiError):  # the traceback goes to the log
        message = "The server failed on this request; its log says why."
        error = ApiError(message, "internal_error", status=500, headers=CLOSE)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
