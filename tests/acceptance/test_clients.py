"""fal-client, unmodified and configured by environment variables alone, works against this server over TLS."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.acceptance.live import LiveServer, finish

Arguments = Callable[..., dict[str, Any]]
both = pytest.mark.parametrize("kind", ["sync", "async"])


def check_result(result: dict[str, Any], server: LiveServer) -> None:
    """The output is fal's, and its URL gives the picture to anybody."""
    image = result["image"]
    assert (image["width"], image["height"], image["content_type"], result["seed"]) == (128, 96, "image/png", 1)
    assert image["url"].startswith(f"https://localhost:{server.tls_port}/files/")
    data = server.get(urlsplit(image["url"]).path).content
    assert len(data) == image["file_size"]
    assert Image.open(io.BytesIO(data)).size == (128, 96)


@both
def test_run(kind: str, server: LiveServer, arguments: Arguments) -> None:
    """`run` answers with the picture."""
    answer = finish(server.client(kind, "run", json.dumps(arguments())))

    check_result(answer["result"], server)


@both
def test_submit_and_iter_events(kind: str, server: LiveServer, arguments: Arguments) -> None:
    """`submit` gives a handle whose events tell the stages as they come, and whose result stays there."""
    answer = finish(server.client(kind, "submit", json.dumps(arguments())))

    names = [name for name, _ in answer["events"]]
    assert answer["first"][0] in ("Queued", "InProgress")
    assert names[-1] == "Completed" and set(names) <= {"Queued", "InProgress", "Completed"}
    assert any("denoise" in line for line in answer["events"][-1][1])
    assert all(
        earlier[1] == later[1][: len(earlier[1])]
        for earlier, later in zip(answer["events"], answer["events"][1:], strict=False)
    )
    check_result(answer["result"], server)
    assert answer["again"] == answer["result"]


@both
def test_subscribe_with_logs(kind: str, server: LiveServer, arguments: Arguments) -> None:
    """`subscribe` reports its request id and log lines, then returns the picture."""
    text = json.dumps(arguments(num_inference_steps=12, unheard_of=1))

    answer = finish(server.client(kind, "subscribe", text))

    lines = [line for _, lines in answer["updates"] for line in lines]
    assert len(answer["ids"]) == 1
    assert any("pocket weights" in line for line in lines)
    assert any("unheard_of" in line for line in lines)
    check_result(answer["result"], server)


@both
def test_cancel(kind: str, server: LiveServer, arguments: Arguments) -> None:
    """A running request that is cancelled is soon over, as fal's error, and the next one runs."""
    text = json.dumps(arguments(creativity=1, num_inference_steps=200))

    answer = finish(server.client(kind, "cancel", text))

    assert (answer["status"], answer["type"]) == (499, "client_cancelled")
    assert answer["seconds"] < 20.0, "a step or two; test_kills.py measures it against steps of a known length"
    assert finish(server.client(kind, "run", json.dumps(arguments())))["result"]


@both
def test_invalid_input_raises_fals_error(kind: str, server: LiveServer, arguments: Arguments) -> None:
    """The client raises its own error with fal's list of faults, from run and from the queue alike."""
    for verb in ("run", "subscribe"):
        answer = finish(server.client(kind, verb, json.dumps(arguments(scale=9))))

        (item,) = answer["detail"]
        assert (answer["status"], item["type"], item["loc"]) == (422, "less_than_equal", ["body", "scale"])


def test_the_same_seed_gives_the_same_bytes(server: LiveServer, arguments: Arguments) -> None:
    """A picture depends on its request and on nothing that ran before."""
    pictures = []
    for other in (2, 3):
        answer = server.run("fal-ai/creative-upscaler", arguments()).json()
        pictures.append(server.get(urlsplit(answer["image"]["url"]).path).content)
        server.run("fal-ai/creative-upscaler", arguments(seed=other))

    assert pictures[0] == pictures[1]
