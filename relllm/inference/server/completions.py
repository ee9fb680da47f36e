"""From the engine's events to OpenAI's JSON: a whole completion, the chunks of a stream, emotions."""

import json
import time
import uuid
from collections.abc import Sequence

from ..replies import Hearing
from .decoding import FinishReason
from .engine import Prompt


def emotions(hearings: Sequence[Hearing], prompt: Prompt) -> list[dict[str, object]]:
    """What was heard in each clip, with the message that the clip is in (for a chat)."""
    found: list[dict[str, object]] = []
    for index, hearing in enumerate(hearings):
        where = {"message": prompt.clip_messages[index]} if prompt.clip_messages else {}
        found.append(
            {
                "index": index,
                **where,
                "emotion": hearing.emotion,
                "probabilities": hearing.probabilities,
                "dimensions": hearing.dimensions,
            }
        )
    return found


class Completion:
    """The answers to one chat request.

    Args:
        model (`str`): The name that clients call it by.
        prompt ([`Prompt`]): The request.
        audio_token_id (`int`): Of the placeholder, to count audio positions.
    """

    def __init__(self, model: str, prompt: Prompt, audio_token_id: int) -> None:
        self._model, self._prompt = model, prompt
        self._audio_tokens = prompt.token_ids.count(audio_token_id)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(
        self, text: str, hearings: Sequence[Hearing], reason: FinishReason | None, num_tokens: int
    ) -> dict[str, object]:
        """`chat.completion`, with `emotion` beside the choices."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            **self._head("chat.completion"),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}],
            "usage": self._usage(num_tokens),
            "emotion": emotions(hearings, self._prompt),
        }

    def first_chunk(self, hearings: Sequence[Hearing]) -> bytes:
        """The role, and `emotion` beside the choices: it is known before the first token."""
        heard = {"emotion": emotions(hearings, self._prompt)}
        return self._chunk({"role": "assistant", "content": ""}, None, **heard)

    def text_chunk(self, text: str) -> bytes:
        return self._chunk({"content": text}, None)

    def last_chunk(self, reason: FinishReason | None) -> bytes:
        return self._chunk({}, reason)

    def usage_chunk(self, num_tokens: int) -> bytes:
        """Of `stream_options.include_usage`: without choices."""
        return sse({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(num_tokens)})

    def _chunk(self, delta: dict[str, str], reason: FinishReason | None, **more: object) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return sse({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, object]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self, num_tokens: int) -> dict[str, object]:
        read = len(self._prompt.token_ids)
        return {
            "prompt_tokens": read,
            "completion_tokens": num_tokens,
            "total_tokens": read + num_tokens,
            "prompt_tokens_details": {"audio_tokens": self._audio_tokens},
        }


def sse(content: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


SSE_END = b"data: [DONE]\n\n"

__all__ = ["SSE_END", "Completion", "emotions", "sse"]
