"""What a client may send, as OpenAI's chat completions have it, and what it is told when that is not answered."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, FailFast, Field, ValidationError, model_validator

MAX_ITEMS = 1024  # messages of a conversation, parts of a message
MAX_VALUES = 100_000  # in a body: each takes memory and time before it can be refused
# What is not of the answer; and what asks for nothing, of fields that are refused otherwise.
IGNORED = {"metadata", "name", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
NEUTRAL: dict = {"n": [1], "logprobs": [False], "top_logprobs": [0], "frequency_penalty": [0], "presence_penalty": [0]}
NEUTRAL |= {"tool_choice": ["auto", "none"], "parallel_tool_calls": [True, False], "modalities": [["text"]]}


@dataclass(eq=False)
class ApiError(Exception):
    """A request that gets an error, with `code` for programs and in `param` the field that is wrong."""

    message: str
    code: str = "invalid_request"
    status: int = 400
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the answer as JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def stopping() -> ApiError:
    """Return a 503."""
    message = "The server is stopping. Send the request to another one."
    return ApiError(message, "server_stopping", status=503, headers={"Connection": "close"})


class _Strict(BaseModel, extra="forbid"):
    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, values: object) -> object:
        """Leave out what asks for nothing."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
        neutral = {**NEUTRAL, "max_completion_tokens": [given.get("max_tokens")]}  # the same length twice
        unset = {name for name, value in given.items() if value in ([], {}, {"type": "text"}, *neutral.get(name, ()))}
        return {name: value for name, value in given.items() if name in cls.model_fields or name not in unset}


class AudioData(_Strict):
    """A clip: a whole audio file in base64. Its content decides what it is, `format` is not needed."""

    data: str
    format: str = ""


class AudioPart(_Strict):
    type: Literal["input_audio"]
    input_audio: AudioData


class TextPart(_Strict):
    type: Literal["text"]
    text: str


Part: TypeAlias = Annotated[TextPart | AudioPart, Field(discriminator="type")]


def _as_parts(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    # One error is enough: a hostile body could make millions.
    content: Annotated[list[Part], Field(max_length=MAX_ITEMS), FailFast(), BeforeValidator(_as_parts)]


class ReplyOptions(_Strict):
    """How a reply is written and sent."""

    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: float = Field(default=0.0, ge=0, le=2)  # 0 takes the most probable token
    top_p: float = Field(default=1.0, gt=0, le=1)  # draw from the fewest tokens that have this probability together
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)  # of the draws; by default another one each time
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] = {}  # obfuscation there is none


class ChatRequest(ReplyOptions):
    """The body of `/v1/chat/completions`."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS), FailFast()]

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        for index, message in enumerate(self.messages):
            if message.role != "user" and any(isinstance(part, AudioPart) for part in message.content):
                raise ValueError(f"messages.{index} has a clip and is the {message.role}'s; clips are the user's.")
        if self.messages[-1].role != "user":
            raise ValueError(f"The last message is of the {self.messages[-1].role}; it has to be the user's.")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for stream=true.")
        return self


class EmotionRequest(_Strict):
    """The body of `/v1/emotion`: clips, each as in a chat."""

    model: str
    input: Annotated[list[AudioPart], Field(min_length=1, max_length=MAX_ITEMS), FailFast()]


Asked = TypeVar("Asked", ChatRequest, EmotionRequest)


def parse_body(kind: type[Asked], body: bytes) -> Asked:
    """Return the request in a body; what is wrong with it is an [`ApiError`] that names the field."""
    if (values := sum(map(body.count, (b",", b"[", b"{")))) > MAX_VALUES:  # none of these is in base64
        message = f"The body has {values} commas and brackets; up to {MAX_VALUES} are read. Send fewer turns."
        raise ApiError(message, "request_too_large")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "union_tag_invalid":
            message += ". Audio is sent in base64 as 'input_audio'; addresses and paths are never read."
        raise ApiError(f"{where}: {message}" if where else message, param=where or None) from None
