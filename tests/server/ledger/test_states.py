"""Whatever happens in whatever order, each request ends exactly once: random histories against a model of the rules."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from server.ledger import Ledger, NewRequest, Outcome
from server.settings import Settings

Token = tuple[str, str]


class Histories(RuleBasedStateMachine):
    """Submit, claim, complete, requeue and cancel in any order, with tokens old and new."""

    requests = Bundle("requests")
    tokens = Bundle("tokens")

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._loop = asyncio.new_event_loop()
        self._ledger = Ledger.open(Settings(data=Path(self._folder.name)))
        self._state: dict[str, str] = {}
        self._holder: dict[str, str | None] = {}
        self._cancelling: set[str] = set()
        self._ended = 0

    def teardown(self) -> None:
        """Let go of the database."""
        self._ledger.close()
        self._loop.close()
        self._folder.cleanup()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def _end(self, request_id: str) -> None:
        assert self._state[request_id] != "COMPLETED"
        self._state[request_id], self._holder[request_id] = "COMPLETED", None
        self._ended += 1

    @rule(target=requests, priority=st.sampled_from(["normal", "low"]))
    def submit(self, priority: Any) -> str:
        """A new request waits."""
        request_id = f"r{len(self._state)}"
        self._do(
            self._ledger.submit(
                NewRequest(id=request_id, endpoint="e", job={}, priority=priority, webhook_url="http://hook")
            )
        )
        self._state[request_id], self._holder[request_id] = "IN_QUEUE", None
        return request_id

    @rule(target=tokens, request_id=requests)
    def claim(self, request_id: str) -> Token:
        """A slot gets it if, and only if, it waits."""
        token = f"t{time.monotonic_ns()}"
        won = self._do(self._ledger.claim(request_id, "slot", token))
        assert won == (self._state[request_id] == "IN_QUEUE")
        if won:
            self._state[request_id], self._holder[request_id] = "IN_PROGRESS", token
        return request_id, token

    @rule(held=tokens)
    def complete(self, held: Token) -> None:
        """Only the attempt that holds it can end it."""
        request_id, token = held
        won = self._do(self._ledger.complete(request_id, token, Outcome(status=200, body={})))
        assert won == (self._holder[request_id] == token)
        if won:
            self._end(request_id)

    @rule(held=tokens)
    def requeue(self, held: Token) -> None:
        """A lost attempt gives it back, or ends it if it was being cancelled."""
        request_id, token = held
        won = self._do(self._ledger.requeue(request_id, token))
        assert won == (self._holder[request_id] == token)
        if won and request_id in self._cancelling:
            self._end(request_id)
        elif won:
            self._state[request_id], self._holder[request_id] = "IN_QUEUE", None

    @rule(request_id=requests)
    def cancel(self, request_id: str) -> None:
        """The answer tells what was found."""
        answer = self._do(self._ledger.request_cancel(request_id))
        expected = {"IN_QUEUE": "OK", "IN_PROGRESS": "CANCELLATION_REQUESTED", "COMPLETED": "ALREADY_COMPLETED"}
        assert answer == expected[self._state[request_id]]
        if answer == "OK":
            self._end(request_id)
        elif answer == "CANCELLATION_REQUESTED":
            self._cancelling.add(request_id)

    @invariant()
    def the_ledger_agrees(self) -> None:
        """States are as the rules say, and each end has exactly one webhook."""
        for request_id, state in self._state.items():
            row = self._do(self._ledger.get(request_id))
            assert row.state == state and (row.outcome_status is not None) == (state == "COMPLETED")
        assert len(self._do(self._ledger.outbox_due(time.time() + 1, 1000))) == self._ended


TestHistories = Histories.TestCase
TestHistories.settings = profile(max_examples=6, stateful_step_count=20, deadline=None)
