"""Requests go where they start soonest, in order, and none is passed over for ever."""

from __future__ import annotations

from server.affinity import Place, Placement, Waiting, place


def waiting(*pipelines: str, waited_s: float = 0.0) -> list[Waiting]:
    return [Waiting(request_id=f"r{n}", pipeline=name, waited_s=waited_s) for n, name in enumerate(pipelines)]


def test_nothing_is_placed_without_a_free_slot() -> None:
    """A request waits while every slot is busy."""
    assert place(waiting("sd15"), [Place(slot_id="0", busy_s=3.0)]) == []


def test_requests_are_placed_in_their_order() -> None:
    """With one slot the first in the queue gets it."""
    assert place(waiting("sd15", "sd15"), [Place(slot_id="0", hot=frozenset({"sd15"}))]) == [Placement("r0", "0")]


def test_a_request_takes_the_slot_that_holds_its_pipeline() -> None:
    """Of two free slots the hot one wins, for each of two requests."""
    places = [Place(slot_id="0", hot=frozenset({"sdxl"})), Place(slot_id="1", hot=frozenset({"sd15"}))]

    assert place(waiting("sd15", "sdxl"), places) == [Placement("r0", "1"), Placement("r1", "0")]


def test_waiting_for_a_hot_slot_beats_loading() -> None:
    """A slot that is free in three seconds is better than one that loads for twenty."""
    places = [Place(slot_id="0", hot=frozenset({"sdxl"})), Place(slot_id="1", hot=frozenset({"sd15"}), busy_s=3.0)]

    assert place(waiting("sd15"), places) == []
    assert place(waiting("sd15", "sdxl"), places) == [Placement("r1", "0")]


def test_loading_beats_waiting_for_a_slot_that_is_busy_for_long() -> None:
    """A free slot loads the pipeline when the hot one is busy for minutes."""
    places = [Place(slot_id="0", hot=frozenset({"sdxl"})), Place(slot_id="1", hot=frozenset({"sd15"}), busy_s=90.0)]

    assert place(waiting("sd15"), places) == [Placement("r0", "0")]


def test_a_second_request_does_not_count_on_a_slot_that_the_first_waits_for() -> None:
    """Two requests of the same kind do not both wait for one hot slot while another stands idle."""
    places = [Place(slot_id="0"), Place(slot_id="1", hot=frozenset({"sd15"}), busy_s=3.0)]

    assert place(waiting("sd15", "sd15"), places) == [Placement("r1", "0")]


def test_a_request_that_waited_too_long_takes_any_free_slot() -> None:
    """The wait for a better slot has an end."""
    places = [Place(slot_id="0", hot=frozenset({"sdxl"})), Place(slot_id="1", hot=frozenset({"sd15"}), busy_s=3.0)]

    assert place(waiting("sd15", waited_s=61.0), places) == [Placement("r0", "0")]


def test_twelve_mixed_jobs_on_two_slots_load_nothing_twice() -> None:
    """The mix that made a generic router reload nine times needs no reload at all."""
    holds = {"0": "A", "1": "B"}
    busy = {"0": 0.0, "1": 0.0}
    queue = waiting(*"ABABBAABABB")
    reloads = 0
    while queue:
        places = [Place(slot_id=slot, hot=frozenset({holds[slot]}), busy_s=busy[slot]) for slot in holds]
        for request_id, slot in place(queue, places, load_s=2.0):
            request = next(entry for entry in queue if entry.request_id == request_id)
            reloads += holds[slot] != request.pipeline
            holds[slot], busy[slot] = request.pipeline, 2.5 + 2.0 * (holds[slot] != request.pipeline)
            queue.remove(request)
        step = min((left for left in busy.values() if left > 0.0), default=0.1)
        busy = {slot: max(0.0, left - step) for slot, left in busy.items()}

    assert reloads <= 1
