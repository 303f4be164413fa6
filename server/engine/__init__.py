"""What the dispatcher asks of whatever runs the slots, and the plain data that crosses between them.

A slot may be a process on this machine or an actor on another one; the dispatcher chooses it, the engine reaches it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeAlias

from server.ledger.states import NewLog, Outcome, SlotReport


class SlotState(StrEnum):
    """What a slot can do now."""

    STARTING = "starting"  # alive, loading its pipelines
    READY = "ready"  # can take a request
    BUSY = "busy"  # runs one, or holds an outcome that the dispatcher has not acknowledged
    DOWN = "down"  # not reachable


@dataclass(frozen=True, kw_only=True)
class SlotInfo:
    """A slot as the engine last heard of it.

    Attributes:
        id: Name of the slot, stable over restarts of its process.
        device: Torch's name of the device, such as `cpu` or `cuda`.
        weights: Name of the weight set it serves.
        hot: Pipelines that are loaded.
        token: Lease of the run it works on or holds the outcome of; None when it holds none.
        pid: Process id on its machine.
        detail: One line for people: the hardware, or why it is down.
        report: What is inside.
    """

    id: str
    state: SlotState = SlotState.DOWN
    device: str = ""
    weights: str = ""
    hot: frozenset[str] = frozenset()
    token: str | None = None
    pid: int | None = None
    detail: str = ""
    report: SlotReport = field(default_factory=SlotReport)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One attempt at one request; `token` fences it against every other attempt.

    `queued` names the kinds of requests that wait: models that they need are worth keeping.
    """

    request_id: str
    endpoint: str
    token: str
    job: dict[str, Any]
    queued: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; `Work(**...)` reads it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a run reported; the last event of a run carries its `outcome`, every other one a `log`."""

    seq: int
    log: NewLog | None = None
    outcome: Outcome | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Event:
        """From what `to_json` gave."""
        log, outcome = data["log"], data["outcome"]
        return cls(
            seq=data["seq"],
            log=NewLog(**log) if log else None,
            outcome=Outcome(**outcome | {"blobs": tuple(outcome["blobs"])}) if outcome else None,
        )


Emit: TypeAlias = Callable[[NewLog], None]
"""Receives the log lines of a run while it computes."""


class SlotLost(Exception):
    """The slot is gone, or knows nothing of the run: the attempt ended without an outcome."""


class Engine(Protocol):
    """Reaches slots. Every method returns at once or waits for the slot; none chooses one."""

    def slots(self) -> list[SlotInfo]:
        """All slots of the fleet, also those that are down."""

    def run(self, slot_id: str, work: Work) -> AsyncIterator[list[Event]]:
        """Start an attempt and follow it in batches, up to the event with the outcome; `SlotLost` when it dies."""

    def attach(self, slot_id: str, token: str) -> AsyncIterator[list[Event]]:
        """Follow an attempt that somebody else started, from its first event."""

    async def acknowledge(self, slot_id: str, token: str) -> None:
        """Tell a slot that the outcome is safe, so that it forgets the run and takes the next one."""

    async def cancel(self, slot_id: str, token: str) -> None:
        """Ask for a run to stop at its next step."""

    async def order(self, slot_id: str, order_id: str, action: str, pipeline: str) -> str:
        """Have a slot load or unload a pipeline's models, after what it is at; returns what it says of it.

        Raises:
            SlotLost: It is gone before it could say so.
        """

    async def kill(self, slot_id: str) -> None:
        """End the slot's process; whoever supervises it starts a new one."""

    async def close(self) -> None:
        """Let go of the slots and leave them running."""
