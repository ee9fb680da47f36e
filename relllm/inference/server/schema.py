"""What a client may send, as OpenAI's chat completions have it; what the server cannot honour is refused by name."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from .errors import bad_request

MAX_STOP_STRINGS = 4  # OpenAI's limit
MAX_ITEMS = 1024  # messages of a conversation, parts of a message
MAX_VALUES = 100_000  # in a body: each takes memory and time before it can be refused
# Fields of OpenAI's that are accepted where they ask for nothing: each with the values that do.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **{"n": (1,), "logit_bias": ({},), "logprobs": (False,)},
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs"), (0,)),
    **{"response_format": ({"type": "text"},), "modalities": (["text"],)},
    **{"tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False)},
    **{"functions": ([],), "function_call": ("none",)},
}
IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}  # not of the answer


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, values: object) -> object:  # what a client sends for a field that it leaves out
        given = values.items() if isinstance(values, dict) else ()
        known = {name: value for name, value in given if value is not None or name in cls.model_fields}
        return known if isinstance(values, dict) else values


class AudioData(_Strict):
    """A clip: a whole audio file in base64. Its content decides what it is, `format` is not needed."""

    data: str
    format: str | None = None


class AudioPart(_Strict):
    type: Literal["input_audio"]
    input_audio: AudioData


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Part: TypeAlias = Annotated[TextPart | AudioPart, Field(discriminator="type")]


# One error is enough: a hostile body could make millions.
TextParts: TypeAlias = Annotated[list[TextPart], Field(max_length=MAX_ITEMS), FailFast()]
Parts: TypeAlias = Annotated[list[Part], Field(max_length=MAX_ITEMS), FailFast()]


class _Turn(BaseModel):
    @field_validator("content", mode="before", check_fields=False)
    @classmethod
    def _as_parts(cls, content: object) -> object:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class SystemMessage(_Turn):
    role: Literal["system", "developer"]
    content: TextParts


class UserMessage(_Turn):
    role: Literal["user"]
    content: Parts


class AssistantMessage(_Turn):
    """A turn of the model; further fields of an answer that is sent back are ignored where they are empty."""

    role: Literal["assistant"]
    content: TextParts

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, values: object) -> object:
        for name in ("tool_calls", "function_call", "audio"):
            if isinstance(values, dict) and values.get(name):
                raise ValueError(f"{name!r} is not supported; an assistant's turn is text.")
        return values


Message: TypeAlias = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # asked for or not, there is none


class ChatRequest(_Strict):
    """The body of `/v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS), FailFast()]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        for name, accepted in NEUTRAL.items():
            value = values.get(name)
            if value is not None and value not in accepted:
                only = " or ".join(repr(choice) for choice in accepted)
                raise ValueError(f"{name!r} is not supported (only {only}). Leave it out.")
        return {name: value for name, value in values.items() if name not in NEUTRAL and name not in IGNORED}

    @field_validator("stop")
    @classmethod
    def _few_and_not_empty(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > MAX_STOP_STRINGS or not all(strings):
            raise ValueError(f"Expected up to {MAX_STOP_STRINGS} strings, none of them empty.")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.messages[-1].role != "user":
            raise ValueError(f"The last message is of the {self.messages[-1].role}; it has to be the user's.")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ. Send one of them.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true.")
        return self


class EmotionRequest(_Strict):
    """The body of `/v1/emotion`: clips, each as in a chat."""

    model: str
    input: Annotated[list[AudioPart], Field(min_length=1, max_length=MAX_ITEMS), FailFast()]


def parse_body(
    kind: type[ChatRequest] | type[EmotionRequest], body: bytes | bytearray
) -> ChatRequest | EmotionRequest:
    """Return the request in a body; what is wrong with it is an [`ApiError`] that names the field."""
    if (values := sum(map(body.count, (b",", b"[", b"{")))) > MAX_VALUES:  # none of these is in base64
        message = f"The body has {values} commas and brackets; up to {MAX_VALUES} are read. Send fewer turns."
        raise bad_request(message, "request_too_large")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = [str(step) for step in first["loc"]]
        if place[:1] == ["messages"]:
            del place[2:3]  # pydantic's own: which kind of message it took it for
        where, message = ".".join(place), first["msg"].removeprefix("Value error, ")
        if first["type"] == "union_tag_invalid" and "content" in place:
            message += ". Audio is sent in base64 as 'input_audio'; addresses and paths are never read."
        raise bad_request(f"{where}: {message}" if where else message, param=where or None) from None
