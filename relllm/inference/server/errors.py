"""What a client is told when a request is not answered, in the form that OpenAI's clients read."""


class ApiError(Exception):
    """A request that gets an error, with `code` for programs and in `param` the field that is wrong."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the answer as JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, code: str = "invalid_request", *, param: str | None = None) -> ApiError:
    """Return a 400."""
    return ApiError(400, message, code, param=param)


def stopping() -> ApiError:
    """Return a 503."""
    message = "The server is stopping. Send the request to another one."
    return ApiError(503, message, "server_stopping", headers={"Connection": "close"})
