"""The errors of serving: each has a name, an HTTP status and a remedy."""

from __future__ import annotations

from typing import Any

from visadapt.errors import VisadaptError

STATUS = {
    "malformed": 400,
    "unauthorized": 401,
    "wrong_host": 403,
    "unknown_task": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "too_large": 413,
    "invalid_request": 422,
    "undecodable": 422,
    "wrong_input": 422,
    "broken_task": 500,
    "failed": 500,
    "overloaded": 503,
    "stopping": 503,
    "not_ready": 503,
}
"""HTTP status by name of the error."""


class ServingError(VisadaptError):
    """A request that cannot be answered; the server goes on.

    Args:
        name: one of `STATUS`.
        message: what was wrong, as one sentence.
        remedy: what the client or the operator can do.
        retry_after: seconds after which the same request may succeed; None if it cannot.

    Examples:
        >>> from visadapt.serving import ServingError
        >>> raise ServingError("overloaded", "64 samples are waiting", "send the request again later", retry_after=1.0)
        Traceback (most recent call last):
            ...
        visadapt.serving.refusal.ServingError: 64 samples are waiting
    """

    def __init__(self, name: str, message: str, remedy: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.status = STATUS[name]
        self.remedy = remedy
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle rebuilds the error from: other processes send it with its remedy."""
        return _rebuilt, (self.name, str(self), self.remedy, self.retry_after)

    def json(self) -> dict[str, object]:
        """Return the body of the HTTP response."""
        return {"error": {"name": self.name, "message": str(self), "remedy": self.remedy}}


def _rebuilt(name: str, message: str, remedy: str, retry_after: float | None) -> ServingError:
    return ServingError(name, message, remedy, retry_after=retry_after)
