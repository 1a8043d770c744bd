"""What a client gets instead of an answer, in OpenAI's form."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# By status: the `type` of OpenAI's errors. Others of 4xx are invalid requests.
TYPES = MappingProxyType(
    {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
)


class ApiError(Exception):
    """A request that is not answered: the status, the message for people, the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`param`: the field of the body at fault; `code`: a word for programs."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message, self.headers = message, dict(headers)

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer, which is also that of an event of a stream."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, usual)
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}


def wrong_field(name: str, rule: str, code: str | None = None) -> ApiError:
    """Make the error of a field that breaks a rule, such as `takes a number from 0 to 2`."""
    return ApiError(400, f"{name} {rule}", name, code)


def retry_later(status: int, message: str, seconds: float, code: str) -> ApiError:
    """Make the error of a request that may be repeated after some `seconds`."""
    return ApiError(status, message, None, code, {"Retry-After": str(max(1, round(seconds)))})
