"""Routes beside vLLM's: the emotion in clips alone, and beside each chat's reply. They need `VLLM_PLUGINS=relllm`.

A request's clips are noted where vLLM makes features of them; their readings, which the towers' pass gave anyway, are
fetched from the workers by the clips' keys, and a clip that they have forgotten is heard again.
"""

import asyncio
import base64
import functools
import json
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import UploadFile
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from relllm.modeling.configuration_relllm import ReLLMConfig

from ..inference_settings import RequestLimits
from ..replies import Heard, read_heard
from ..server.prompts import PromptReader
from ..server.schema import ApiError, AudioPart, EmotionRequest, parse_body
from .vllm_processing import CLIPS
from .vllm_readings import AT_ONCE, gather_readings, waveform_key

# Of the running request: each of its clips, as the renderer reads them in tasks of their own.
_clips: ContextVar[list[np.ndarray] | None] = ContextVar("relllm_clips", default=None)
AUDIO_PARTS = ("input_audio", "audio_url")
UNFINISHED = '"finish_reason":null'  # in each chunk of a stream but the last ones

router = APIRouter()


class EmotionRoutes:
    """The endpoint plugin: adds the routes, and notes each request's clips."""

    name = "relllm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add `/v1/emotion`, and put ours in the place of vLLM's `/v1/chat/completions`."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Prepare the routes; of another model than a ReLLM the chat is vLLM's own."""
        config = engine_client.model_config.hf_config
        state.relllm = None
        if isinstance(config, ReLLMConfig):
            state.relllm = _Emotions(engine_client, config)
            _note_clips(engine_client.renderer, config.audio_token_id)


@router.post("/v1/emotion")
async def emotion(raw_request: Request) -> Response:
    """Tell the emotion in clips, sent as JSON or as files of a form; the LLM does not run."""
    emotions: _Emotions | None = raw_request.app.state.relllm
    try:
        if emotions is None:
            raise ApiError("The model that is served here is no ReLLM.", "model_not_found", status=404)
        asked = await _read_emotion_request(raw_request)
        models = raw_request.app.state.openai_serving_models
        if asked.model and not models.is_base_model(asked.model):
            message = f"There is no model {asked.model!r} here."
            raise ApiError(message, "model_not_found", status=404, param="model")
        prompt = await asyncio.to_thread(emotions.reader.read_emotion, asked)
    except ApiError as error:
        return JSONResponse(error.body(), status_code=error.status)
    heard = await emotions.read(prompt.waveforms)
    data = [{"index": index, **one.fields()} for index, one in enumerate(heard)]
    usage = {"audio_seconds": round(prompt.audio_seconds, 3)}
    return JSONResponse({"object": "list", "model": asked.model or models.model_name(), "data": data, "usage": usage})


@router.post("/v1/chat/completions", dependencies=[Depends(validate_json_request)])
async def chat_with_emotion(request: ChatCompletionRequest, raw_request: Request) -> Any:
    """Answer as vLLM does, with `emotion` beside `choices`; of a stream, in its last chunk."""
    emotions: _Emotions | None = raw_request.app.state.relllm
    clips: list[np.ndarray] = []
    _clips.set(clips)
    response = await create_chat_completion(request, raw_request)
    if emotions is None or not isinstance(response, (JSONResponse, StreamingResponse)) or response.status_code != 200:
        return response
    sent = (await raw_request.json())["messages"]  # which vLLM's own request has validated in pieces
    find = functools.partial(emotions.beside, clips, _messages_of(sent))
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_emotion(response.body_iterator, find)
        return response
    answer = {**json.loads(bytes(response.body)), "emotion": await find()}
    kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    return JSONResponse(answer, headers=kept, background=response.background)


class _Emotions:
    """What the workers have heard, as our own server tells it."""

    def __init__(self, engine: Any, config: ReLLMConfig) -> None:
        self.engine, self.config = engine, config
        processor = engine.renderer.get_mm_processor().info.get_hf_processor()
        self.reader = PromptReader(processor, RequestLimits())

    async def beside(self, clips: Sequence[np.ndarray], messages: Sequence[int]) -> list[dict[str, object]]:
        """Return what stands beside a reply: of each clip its message, where there are as many, and its emotion."""
        heard = await self.read(clips)
        known = len(messages) == len(clips)
        return [
            {"index": index, **({"message": messages[index]} if known else {}), **one.fields()}
            for index, one in enumerate(heard)
        ]

    async def read(self, clips: Sequence[np.ndarray]) -> list[Heard]:
        """Return what was heard in clips; those that no worker knows are heard now, some between two steps."""
        keys = [waveform_key(clip) for clip in clips]
        found: dict[int, Any] = {}
        if keys:
            for known in await self.engine.collective_rpc("relllm_readings", args=(keys,)):
                found |= {key: reading for key, reading in zip(keys, known, strict=True) if reading is not None}
        unknown = {key: clip for key, clip in zip(keys, clips, strict=True) if key not in found}
        for start in range(0, len(unknown), AT_ONCE):
            some = dict(list(unknown.items())[start : start + AT_ONCE])
            waveforms = [np.ascontiguousarray(clip, np.float32).tobytes() for clip in some.values()]
            heard = await self.engine.collective_rpc("relllm_hear", args=(waveforms,))
            found |= dict(zip(some, heard[0], strict=True))
        return read_heard(self.config, gather_readings([found[key] for key in keys])) if keys else []


def _note_clips(renderer: Any, audio_token_id: int) -> None:
    """Have a request's clips noted where vLLM has read them, and a placeholder that somebody typed refused."""
    process = renderer.process_for_engine_async

    async def process_and_note(*args: Any, **kwargs: Any) -> Any:
        made = await process(*args, **kwargs)
        if CLIPS not in made and audio_token_id in made.get("prompt_token_ids", ()):  # beside clips they are counted
            raise VLLMValidationError(
                "'<|audio|>' stands for a clip and cannot be in a text. Send the clip as an 'input_audio' part."
            )
        if (clips := _clips.get()) is not None:
            clips += made.pop(CLIPS, [])
        return made

    renderer.process_for_engine_async = process_and_note


async def _read_emotion_request(request: Request) -> EmotionRequest:
    """Return the request in a JSON body, or in a form whose files are the clips, whatever they are called."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data":
        await validate_json_request(request)
        return parse_body(EmotionRequest, await request.body())
    async with request.form() as form:
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise ApiError("The form has no file. Send each clip as one: curl -F file=@question.wav.")
        data = [base64.b64encode(await file.read()).decode() for file in files]
        parts = [AudioPart.model_validate({"type": "input_audio", "input_audio": {"data": clip}}) for clip in data]
        return EmotionRequest(model=str(form.get("model") or ""), input=parts)


def _messages_of(messages: Sequence[dict[str, Any]]) -> list[int]:
    """Return, for each clip in a conversation, the index of its message."""
    found = []
    for index, message in enumerate(messages):
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        found += [index for part in parts if isinstance(part, dict) and part.get("type") in AUDIO_PARTS]
    return found


async def _with_emotion(pieces: AsyncIterable[Any], find: Any) -> AsyncIterator[str]:
    """Yield a stream's events, the last one before its end with the emotion in it."""
    last = ""
    async for piece in pieces:
        event = piece if isinstance(piece, str) else bytes(piece).decode()
        if event.startswith("data: [DONE]") and last:
            chunk = {**json.loads(last.removeprefix("data: ")), "emotion": await find()}
            last = f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
        if last:
            yield last
        failed = event.startswith('data: {"error"')
        held = event.startswith("data: {") and UNFINISHED not in event and not failed
        last = event if held else ""
        if not held:
            yield event
    if last:
        yield last
