"""What a client is told when a request is not answered, in the form that OpenAI's clients read."""


class ApiError(Exception):
    """A request that gets an error.

    Args:
        status (`int`): HTTP status, 4xx or 5xx.
        message (`str`): What was found, what is expected, what to do.
        code (`str`): For programs, such as `"context_length_exceeded"`.
        param (`str`, *optional*): The field that is wrong.
        headers (`dict[str, str]`, *optional*): Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """The answer as JSON."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, code: str = "invalid_request", *, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, code, param=param)


def stopping() -> ApiError:
    """A 503."""
    message = "The server is stopping. Send the request to another one."
    return ApiError(503, message, "server_stopping", headers={"Connection": "close"})


__all__ = ["ApiError", "bad_request", "stopping"]
