"""The states of a request and the rows that cross the ledger's border.

Times are Unix seconds. A request moves so, and in no other way:

    submit ──> IN_QUEUE ──claim──> IN_PROGRESS ──complete──> COMPLETED
                  │  ^                  │
                  │  └─────requeue──────┘       the slot died or was stopped; the attempt counts
                  ├──request_cancel──> COMPLETED  (client_cancelled)
                  └──expire_start────> COMPLETED  (request_timeout)
    submit ──────────────────────────> COMPLETED  (refused at admission)
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal

CancelAnswer = Literal["OK", "CANCELLATION_REQUESTED", "ALREADY_COMPLETED", "NOT_FOUND"]


class State(StrEnum):
    """Where a request stands; the words are fal's and there are no others."""

    IN_QUEUE = "IN_QUEUE"
    """Accepted and durable; nobody works on it."""
    IN_PROGRESS = "IN_PROGRESS"
    """A slot holds it, under the token of its row."""
    COMPLETED = "COMPLETED"
    """Over, well or badly: there is an outcome."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a request ended: the answer that the result route replays.

    Attributes:
        status: HTTP status of the answer.
        body: JSON body of the answer. Files of ours appear as `blob:<key>`.
        error: One line for people; None when it went well.
        error_type: fal's word for the failure.
        inference_s: Seconds of the pipeline.
        headers: More headers of the answer.
        blobs: Keys of the files it made; they live as long as the request does.
        timings: Seconds by stage, for the figures; not kept with the request.
    """

    status: int
    body: dict[str, Any]
    error: str | None = None
    error_type: str | None = None
    inference_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    blobs: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """A request at admission.

    Attributes:
        job: What a slot is to do; None only together with an outcome.
        start_deadline: Unix time after which it may not start any more.
        caller: Fingerprint of the caller's key.
        store_io: Whether input and output outlive delivery.
        base_url: Public base of the URLs for this caller, for its webhook.
        expires_s: Seconds that its files are kept after completion; None: as long as the request.
        outcome: Given when it failed at admission already; it is born COMPLETED.
        logs: First log lines.
        blobs: Keys of its input files.
        retry: Whether another attempt may follow a lost slot.
    """

    id: str
    endpoint: str
    job: dict[str, Any] | None
    priority: Literal["normal", "low"] = "normal"
    start_deadline: float | None = None
    webhook_url: str | None = None
    caller: str = ""
    store_io: bool = True
    base_url: str = ""
    expires_s: float | None = None
    outcome: Outcome | None = None
    logs: tuple[NewLog, ...] = ()
    blobs: tuple[str, ...] = ()
    retry: bool = True


@dataclass(frozen=True)
class NewLog:
    """One line for the request's log; `event_seq` is the slot's number of the event it came from, 0 for ours."""

    timestamp: float
    level: str
    message: str
    event_seq: int = 0


@dataclass(frozen=True)
class LogRow:
    """One line of a request's log; `seq` counts from 1 within the request."""

    seq: int
    timestamp: float
    level: str
    message: str


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A request as the ledger knows it; fields in the order of the statement that reads it."""

    seq: int
    id: str
    endpoint: str
    state: str
    priority: str
    created: float
    started: float | None
    finished: float | None
    start_deadline: float | None
    caller: str
    store_io: bool
    base_url: str
    retry: bool
    webhook_url: str | None
    attempt: int
    slot: str | None
    token: str | None
    event_seq: int
    cancel_requested: bool
    outcome_status: int | None
    outcome_json: str | None
    outcome_headers: str | None
    error: str | None
    error_type: str | None
    inference_s: float | None
    queue_position: int | None = None
    job_json: str | None = None

    @property
    def job(self) -> dict[str, Any] | None:
        """What the slot is to do; known of rows from the queue only."""
        return json.loads(self.job_json) if self.job_json else None

    @property
    def outcome_body(self) -> dict[str, Any] | None:
        """The answer of a completed request."""
        return json.loads(self.outcome_json) if self.outcome_json else None

    @property
    def is_completed(self) -> bool:
        """Whether it is over."""
        return self.state == State.COMPLETED.value


@dataclass(frozen=True)
class QueueRow:
    """How many requests of a kind wait or run, and when the oldest of them came, Unix seconds."""

    endpoint: str
    state: str
    priority: str
    number: int
    oldest: float


@dataclass(frozen=True)
class Backlog:
    """How many webhooks wait for their delivery, and since when the oldest does, Unix seconds."""

    number: int
    oldest: float | None


@dataclass(frozen=True)
class OutboxRow:
    """A webhook to deliver; its content is the request's outcome."""

    request_id: str
    url: str
    tries: int
    created: float
    next_try: float
    last_status: int | None


class Mode(StrEnum):
    """What the operator lets the server do; it is kept over restarts."""

    RUNNING = "running"
    """Requests are taken and started."""
    PAUSED = "paused"
    """Requests are taken and wait; what runs ends."""
    DRAINING = "draining"
    """No request is taken; what waits and what runs ends."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in a slot's memory.

    Attributes:
        name: Which one.
        level: Where it is: `device`, or `host` memory.
        size_bytes: Of its numbers.
        users: Pipelines whose latest requests used it.
    """

    name: str
    level: str
    size_bytes: int
    users: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SlotReport:
    """What is inside a slot.

    Attributes:
        serves: Pipelines that can work.
        failed: Pipelines that cannot, and why.
        models: What is loaded.
        counts: Events since the slot began, by name.
        memory: Bytes by name; does not count when reports are compared, for it never stands still.
    """

    serves: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    models: tuple[LoadedModel, ...] = ()
    counts: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SlotReport:
        """From what `to_json` gave; what is missing is empty."""
        models = tuple(LoadedModel(**one | {"users": tuple(one["users"])}) for one in data.get("models", ()))
        return cls(**data | {"serves": tuple(data.get("serves", ())), "models": models})


@dataclass(frozen=True)
class SlotRow:
    """What a slot last said of itself."""

    id: str
    state: Literal["starting", "ready", "busy", "down"]
    device: str
    weights: str
    detail: str = ""
    heartbeat: float = 0.0
    report_json: str = "{}"

    @property
    def report(self) -> SlotReport:
        """What is inside it."""
        return SlotReport.from_json(json.loads(self.report_json))


@dataclass(frozen=True)
class Order:
    """What the operator wants of slots; `slot` and `pipeline` empty: all of them.

    `answers` are JSON: what each slot said, by its id; None while it is not done.
    """

    id: str
    action: Literal["preload", "unload"]
    pipeline: str
    slot: str
    created: float
    answers_json: str | None = None

    @property
    def answers(self) -> dict[str, str] | None:
        """What each slot said; None while it is not done."""
        return json.loads(self.answers_json) if self.answers_json else None


@dataclass(frozen=True)
class Blob:
    """A stored file and until when somebody wants it; `expires` None: as long as its holder."""

    key: str
    holder: str
    expires: float | None = None
