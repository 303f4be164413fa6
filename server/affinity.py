"""Which request goes to which slot: a pure function, so that the policy is read and tested without a server.

Loading a pipeline takes longer than most requests, so a request is worth more on a slot that holds its pipeline,
and may even wait for one that is busy; but never for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOAD_S = 20.0
"""Seconds it costs to bring a pipeline onto a slot: disk to device for a full set of weights."""

MAX_WAIT_S = 60.0
"""Seconds after which a request stops waiting for a better slot and takes the next free one."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A queued request; `waited_s` counts seconds since it was queued."""

    request_id: str
    pipeline: str
    waited_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """A slot; `hot` names the pipelines it holds, `busy_s` is how many seconds it will stay busy, 0 when it is free."""

    slot_id: str
    hot: frozenset[str] = frozenset()
    busy_s: float = 0.0


class Placement(NamedTuple):
    """One decision."""

    request_id: str
    slot_id: str


def cost_s(request: Waiting, place: Place, load_s: float = LOAD_S) -> float:
    """Seconds until the request could start computing on this slot."""
    return place.busy_s + (0.0 if request.pipeline in place.hot else load_s)


def place(
    queued: Sequence[Waiting], places: Sequence[Place], *, load_s: float = LOAD_S, max_wait_s: float = MAX_WAIT_S
) -> list[Placement]:
    """Decide what starts now.

    Requests are taken in the order given. Each takes the slot on which it would start first; when that one is busy it
    keeps waiting and leaves the free slots to those behind it, unless it waited longer than `max_wait_s`.

    Args:
        queued: Requests in dispatch order.
        places: All slots, free and busy.
        load_s: Seconds to load a pipeline.
        max_wait_s: The bound on being passed over.

    Returns:
        At most one request per free slot.
    """
    open_places = {place.slot_id: place for place in places}
    decisions: list[Placement] = []
    for request in queued:
        free = [place for place in open_places.values() if place.busy_s == 0.0]
        if not free:
            break
        candidates = free if request.waited_s > max_wait_s else list(open_places.values())
        best = min(candidates, key=lambda candidate: cost_s(request, candidate, load_s))
        if best.busy_s == 0.0:
            decisions.append(Placement(request.request_id, best.slot_id))
        # Taken, or spoken for by a request that waits for it: the next one reckons without this slot.
        del open_places[best.slot_id]
    return decisions
