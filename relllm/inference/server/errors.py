"""What a client is told when a request is not answered, in the form that OpenAI's clients read."""

from dataclasses import dataclass, field


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
