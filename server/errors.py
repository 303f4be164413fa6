"""From our exceptions to fal's error bodies: two tables, and nothing else decides a status.

fal has two shapes. Errors of a model are `{"detail": [item, ...]}`, one item per fault, each with a type from fal's
list. Errors of the platform are `{"detail": "text"}`, with an `error_type` where fal names one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from server.ledger.ledger import compact_json
from server.ledger.sqlite import LedgerUnavailable
from server.ledger.states import Outcome
from server.storage import StorageUnavailable

DOCS = "https://docs.fal.ai/errors#"
MAX_ECHO = 1000  # characters of a faulty value that are sent back
MAX_ECHO_DEPTH = 8
DOWNLOAD_FAILED = "Failed to download the file. Please check if the URL is accessible and try again."

# Types that fal answers with another status than 422, and may be retried by the caller.
MODEL_ERRORS: Mapping[str, tuple[int, bool]] = {
    "internal_server_error": (500, True),
    "generation_timeout": (504, True),
    "downstream_service_error": (500, True),
    "downstream_service_unavailable": (500, True),
}


def detail_item(
    type: str,
    msg: str,
    *,
    loc: Sequence[str | int] = ("body",),
    ctx: Mapping[str, Any] | None = None,
    input: Any = None,
) -> dict[str, Any]:
    """One fault in fal's words; `ctx` and `input` are left out when there is nothing to say."""
    item: dict[str, Any] = {"loc": list(loc), "msg": msg, "type": type, "url": DOCS + type}
    if ctx:
        item["ctx"] = echo(dict(ctx))
    if input is not None:
        item["input"] = echo(input)
    return item


def model_error(
    type: str,
    msg: str,
    *,
    loc: Sequence[str | int] = ("body",),
    ctx: Mapping[str, Any] | None = None,
    input: Any = None,
) -> Outcome:
    """How a request ends that a model could not serve; the status follows from fal's type."""
    return model_errors([detail_item(type, msg, loc=loc, ctx=ctx, input=input)])


def model_errors(items: Sequence[Mapping[str, Any]]) -> Outcome:
    """How a request with several faults ends."""
    status, retryable = MODEL_ERRORS.get(items[0]["type"], (422, False))
    return Outcome(
        status=status,
        body={"detail": list(items)},
        error=str(items[0]["msg"]),
        error_type=str(items[0]["type"]),
        headers=retry_headers(retryable) | ({"X-Fal-Billable-Units": "0"} if status == 422 else {}),
    )


def retry_headers(retryable: bool) -> dict[str, str]:
    """Whether the same request may succeed later, under both names that fal has used."""
    value = "true" if retryable else "false"
    return {"X-Fal-Retryable": value, "X-Fal-Needs-Retry": value}


def echo(value: Any, depth: int = 0) -> Any:
    """A caller's value as JSON that can be sent back: finite, ASCII-safe, not deep and not long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return value if len(value) <= MAX_ECHO else value[:MAX_ECHO] + "…"
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 10**300 else "a very large integer"
    if depth >= MAX_ECHO_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {str(key)[:MAX_ECHO]: echo(member, depth + 1) for key, member in list(value.items())[:50]}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [echo(member, depth + 1) for member in list(value)[:50]]
    return str(value)[:MAX_ECHO]


class InvalidInput(Exception):
    """The payload does not fit the endpoint's input; `items` are the faults in fal's words."""

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        super().__init__("; ".join(str(item["msg"]) for item in items))
        self.items = list(items)

    @classmethod
    def of(cls, error: ValidationError, *, where: str = "body") -> InvalidInput:
        """From pydantic's own findings, whose types fal passes on."""
        return cls(
            [
                detail_item(
                    found["type"],
                    found["msg"],
                    loc=(where, *found["loc"]),
                    ctx=found.get("ctx"),
                    input=found["input"],
                )
                for found in error.errors(include_url=False)
            ]
        )


class GatewayError(Exception):
    """The request cannot be answered as asked; the class says how, the docstring is the default message."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").splitlines()[0])


class RequestNotFound(GatewayError):
    """Request not found"""


class ApplicationNotFound(GatewayError):
    """No application has that name."""

    def __init__(self, application: str) -> None:
        super().__init__(f'Application "{application}" not found')


class PathNotFound(GatewayError):
    """Nothing is served under that path."""

    def __init__(self, path: str) -> None:
        super().__init__(f"Path {path} not found")


class FileMissing(GatewayError):
    """File not found"""


class MethodNotAllowed(GatewayError):
    """Method Not Allowed"""


class StillInProgress(GatewayError):
    """Request is still in progress"""

    def __init__(self, request_id: str) -> None:
        super().__init__()
        self.request_id = request_id


class NotAuthenticated(GatewayError):
    """Authentication is required to access this application."""


class InvalidCredentials(GatewayError):
    """Invalid key credentials; create one with the operator of this server."""


class ClientDisconnected(GatewayError):
    """The client hung up before the answer."""


class QueueFull(GatewayError):
    """The queue is longer than the request allows."""


class Draining(GatewayError):
    """This server finishes what it has and takes no more requests; try again later, or another one."""


class NotOperator(GatewayError):
    """This is for the operator of the server, whose key is in the file operator.key of its data folder."""


class UnknownSubject(GatewayError):
    """There is no such endpoint or slot."""


class BodyTooLarge(GatewayError):
    """The request body is too large."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The request body is larger than {max_bytes} bytes; upload the file and pass its URL.")
        self.max_bytes = max_bytes


class BadRequest(GatewayError):
    """The request cannot be understood."""


class RangeNotSatisfiable(GatewayError):
    """The file ends before the range begins."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.size_bytes = size_bytes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Status and headers of an error; `error_type` is fal's word for it."""

    status: int
    error_type: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


ANSWERS: Mapping[type[Exception], Answer] = {
    RequestNotFound: Answer(status=404),
    ApplicationNotFound: Answer(status=404),
    PathNotFound: Answer(status=404, headers={"X-Fal-Billable-Units": "0"}),
    FileMissing: Answer(status=404),
    MethodNotAllowed: Answer(status=405),
    # Not 409, 408 or 429, which clients repeat for a minute; not 2xx, which they take for the result.
    StillInProgress: Answer(status=400),
    NotAuthenticated: Answer(status=401, headers={"WWW-Authenticate": "Key"}),
    InvalidCredentials: Answer(status=401, headers={"WWW-Authenticate": "Key"}),
    ClientDisconnected: Answer(status=499, error_type="client_disconnected"),
    QueueFull: Answer(status=429, error_type="concurrent_requests_limit", headers={"X-Fal-Needs-Retry": "1"}),
    Draining: Answer(
        status=503,
        error_type="runner_scheduling_failure",
        headers={"Retry-After": "30", "X-Fal-Needs-Retry": "1"},
    ),
    NotOperator: Answer(status=401, headers={"WWW-Authenticate": "Key"}),
    UnknownSubject: Answer(status=404),
    BodyTooLarge: Answer(status=413, error_type="bad_request"),
    BadRequest: Answer(status=400, error_type="bad_request"),
    RangeNotSatisfiable: Answer(status=416),
    LedgerUnavailable: Answer(status=503, error_type="internal_error", headers={"Retry-After": "5"}),
    StorageUnavailable: Answer(status=503, error_type="internal_error", headers={"Retry-After": "5"}),
}
INTERNAL = Answer(status=500, error_type="internal_error")


def answer_to(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an exception; unknown ones are an internal error without particulars."""
    if isinstance(error, InvalidInput):
        outcome = model_errors(error.items)
        return outcome.status, outcome.body, dict(outcome.headers)
    answer = next((ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS), INTERNAL)
    detail = "Internal Server Error" if answer is INTERNAL else str(error)
    if isinstance(error, (LedgerUnavailable, StorageUnavailable)):
        detail = "The request could not be recorded; try again later."
    body: dict[str, Any] = {"detail": detail}
    headers = dict(answer.headers)
    if isinstance(error, RequestNotFound):
        body = {"status": "NOT_FOUND", **body}
    if isinstance(error, StillInProgress):
        headers["x-fal-request-id"] = error.request_id
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.size_bytes}"
    if answer.error_type:
        body["error_type"] = answer.error_type
        headers["X-Fal-Error-Type"] = answer.error_type
    return answer.status, body, headers


def to_json(value: Any) -> bytes:
    """Compact JSON in ASCII: no chunk of a stream can split a character, and lone surrogates stay escaped."""
    return compact_json(value).encode("ascii")
