"""Wire types that endpoints share, and the bodies of the queue API."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from server.ledger.states import LogRow, RequestRow, State

BLOB = "blob:"
BLOB_STRING = re.compile(rf'(?<!\\)"{BLOB}')
"""In JSON, the beginning of a string that names a file of ours; a quote inside a string is escaped."""

LEVELS = {"DEBUG", "INFO", "WARN", "ERROR", "STDOUT", "STDERR"}


class File(BaseModel):
    """A file that was made."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    url: str = Field(description="The URL where the file can be downloaded from.")
    content_type: str | None = Field(None, description="The mime type of the file.", examples=["image/png"])
    file_name: str | None = Field(
        None,
        description="The name of the file. It will be auto-generated if not provided.",
        examples=["z9RV14K95DvU.png"],
    )
    file_size: int | None = Field(None, description="The size of the file in bytes.", examples=[4404019])


class Image(File):
    """A picture that was made."""

    width: int | None = Field(None, description="The width of the image in pixels.", examples=[1024])
    height: int | None = Field(None, description="The height of the image in pixels.", examples=[1024])


def stored_image(result: Mapping[str, Any]) -> dict[str, Any]:
    """An `Image` of what a slot stored; its URL is completed when the body is sent, see `BLOB`."""
    facts = ("content_type", "file_name", "file_size", "width", "height")
    return {"url": BLOB + result["key"], **{fact: result[fact] for fact in facts}}


def rounded(timings: Mapping[str, float]) -> dict[str, float]:
    """Seconds by stage, to the millisecond."""
    return {stage: round(seconds, 3) for stage, seconds in timings.items()}


class Base(NamedTuple):
    """Where this server is for a caller: `root` of files and REST, `queue` of the queue API; no trailing slash."""

    root: str
    queue: str


def submitted(base: Base, endpoint: str, request_id: str, position: int) -> dict[str, Any]:
    """The answer to a submission."""
    return {
        "status": State.IN_QUEUE.value,
        "request_id": request_id,
        **urls(base, endpoint, request_id),
        "queue_position": position,
    }


def urls(base: Base, endpoint: str, request_id: str) -> dict[str, str]:
    """The three URLs of a request; clients follow them verbatim and compare them with their own."""
    url = f"{base.queue}/{endpoint}/requests/{request_id}"
    return {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def status_body(base: Base, row: RequestRow, logs: Sequence[LogRow] | None) -> dict[str, Any]:
    """The status of a request; `logs` None: not asked for."""
    body: dict[str, Any] = {
        "status": row.state,
        "request_id": row.id,
        **urls(base, row.endpoint, row.id),
        "logs": None if logs is None else [log_entry(line) for line in logs],
    }
    if row.queue_position is not None:
        body["queue_position"] = row.queue_position
    if row.is_completed:
        body["metrics"] = {} if row.inference_s is None else {"inference_time": row.inference_s}
        if row.error is not None:
            body["error"] = row.error
            body["error_type"] = row.error_type
    return body


def log_entry(line: LogRow) -> dict[str, Any]:
    """A log line in today's shape and, under `labels`, in the one that older clients read."""
    level = line.level if line.level in LEVELS else "INFO"
    return {
        "message": line.message,
        "level": level,
        "source": "USER",
        "timestamp": timestamp(line.timestamp),
        "labels": {"level": level, "source": "USER"},
    }


def timestamp(seconds: float) -> str:
    """Unix seconds as RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def file_url(root: str, key: str) -> str:
    """Where the file of a key is served."""
    return f"{root}/files/{key}"


def with_urls(body: Any, root: str) -> Any:
    """A result whose `blob:<key>` strings are URLs below `root`."""
    if isinstance(body, str):
        return file_url(root, body[len(BLOB) :]) if body.startswith(BLOB) else body
    if isinstance(body, dict):
        return {name: with_urls(value, root) for name, value in body.items()}
    if isinstance(body, list):
        return [with_urls(value, root) for value in body]
    return body


def result_bytes(row: RequestRow, root: str) -> bytes:
    """The body of a completed request as the model gave it, its files as URLs."""
    text = row.outcome_json or "{}"
    if row.outcome_status == 200:
        url = json.dumps(file_url(root, ""))[:-1]
        text = BLOB_STRING.sub(lambda _: url, text)
    return text.encode("ascii")


class Fault(BaseModel):
    """One fault of an input."""

    loc: list[str | int]
    msg: str
    type: str
    url: str | None = None
    ctx: dict[str, Any] | None = None
    input: Any = None


class ErrorBody(BaseModel):
    """Every error: a text, or the faults of an input; with fal's word for it where there is one."""

    model_config = ConfigDict(extra="allow")

    detail: str | list[Fault]
    error_type: str | None = None
