"""fal-client's ways to wait, or not to, hold against this server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.acceptance.live import LiveServer, finish

ENDPOINT = "fal-ai/creative-upscaler"
NUM_CLIENTS = 32
Arguments = Callable[..., dict[str, Any]]
Ask = Callable[[str, object], Any]


@pytest.fixture
def ask(paced: LiveServer) -> Ask:
    """What a verb of `patient_client.py` prints."""
    return lambda verb, arguments: finish(paced.client(verb, json.dumps(arguments), program="patient_client.py"))


def test_a_start_timeout(ask: Ask, paced: LiveServer, arguments: Arguments) -> None:
    """What cannot start in time is a 504 that names the user's wish, from the queue and from run, without retries."""
    with paced.occupied(ENDPOINT, arguments(num_inference_steps=200)):
        answers = ask("start_late", arguments())

    for answer in answers:
        assert (answer["status"], answer["type"], answer["timeout_type"]) == (504, "request_timeout", "user")
        assert answer["seconds"] < 10.0, "one attempt; ten take 51 s"


def test_a_start_timeout_that_was_kept(ask: Ask, arguments: Arguments) -> None:
    """What did start in time may take as long as it takes."""
    answer = ask("start_in_time", arguments(num_inference_steps=30))

    assert answer["result"]["seed"] == 1


def test_a_client_timeout(ask: Ask, paced: LiveServer, arguments: Arguments) -> None:
    """The client gets its error, the request is cancelled, and the client's process, which polls on, can end."""
    answer = ask("give_up", arguments(num_inference_steps=200))

    status = paced.wait_for_end(f"{paced.url}/queue/{ENDPOINT}/requests/{answer['request_id']}/status")
    assert 2.0 <= answer["seconds"] < 6.0
    assert status["error_type"] == "client_cancelled"


def test_standing_in_line(ask: Ask, arguments: Arguments) -> None:
    """With a request ahead the client sees its place, then its run, then its end with the seconds it took."""
    work = {"ahead": arguments(num_inference_steps=200), "input": arguments(num_inference_steps=20)}

    events = ask("stand_in_line", work)

    names = [name for name, _, _ in events]
    assert events[0][0] == "Queued" and events[0][1] in (0, 1), "a request that runs is not counted"
    assert sorted(names, key=["Queued", "InProgress", "Completed"].index) == names
    assert "InProgress" in names and names[-1] == "Completed"
    assert events[-1][2]["inference_time"] > 0


def test_stream(ask: Ask, arguments: Arguments) -> None:
    """Every event of a stream parses, the last one is the output; where there is no stream the client says so."""
    answer = ask("stream", arguments())

    assert answer["events"][-1]["image"]["width"] == 128
    assert all(isinstance(event, dict) and event for event in answer["events"])
    assert answer["unknown"] == "SSEError"


def test_a_crowd_at_one_request(ask: Ask, arguments: Arguments, record_property: Callable[[str, object], None]) -> None:
    """32 clients that poll one running request at their default rate all get its one result."""
    answer = ask("crowd", {"input": arguments(num_inference_steps=60), "clients": NUM_CLIENTS})

    seconds = answer["seconds"]
    record_property("status_p99_s", seconds[int(len(seconds) * 0.99)])
    assert len(answer["results"]) == NUM_CLIENTS
    assert all(result == answer["results"][0] for result in answer["results"])
