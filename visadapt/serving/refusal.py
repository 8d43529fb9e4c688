"""The errors of serving: each has a name, an HTTP status and a remedy."""

from __future__ import annotations

from visadapt.errors import VisadaptError

STATUS = {
    "unauthorized": 401,
    "unknown_task": 404,
    "not_found": 404,
    "method_not_allowed": 405,
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
        name: one of :data:`STATUS`.
        message: what was wrong, as one sentence.
        remedy: what the client or the operator can do.
        retry_after: seconds after which the same request may succeed; None if it cannot.
    """

    def __init__(self, name: str, message: str, remedy: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.status = STATUS[name]
        self.remedy = remedy
        self.retry_after = retry_after

    def json(self) -> dict[str, object]:
        """Return the body of the HTTP response."""
        return {"error": {"name": self.name, "message": str(self), "remedy": self.remedy}}
