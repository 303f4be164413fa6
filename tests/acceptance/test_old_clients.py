"""Earlier releases of fal-client, unmodified: with FAL_RUN_HOST alone, and with nothing but a proxy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.clients import confined, installed
from tests.acceptance.live import LiveServer, finish

Arguments = Callable[..., dict[str, Any]]
RELEASES = ("0.4.2", "0.10.0", "0.13.2")


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Path:
    """The folder of a release."""
    return installed(f"fal-client=={request.param}")


@pytest.fixture
def by_name(paced: LiveServer, release: Path) -> dict[str, str]:
    """An environment with FAL_RUN_HOST alone: the client puts `queue.` before it and asks the DNS."""
    environment = paced.client_environment
    host = environment["FAL_RUN_HOST"].removesuffix("/run")
    kept = {name: value for name, value in environment.items() if not name.startswith("FAL_")}
    return confined(kept | {"FAL_RUN_HOST": host, "FAL_KEY": environment["FAL_KEY"]}, release)


@pytest.fixture
def by_proxy(paced: LiveServer, release: Path) -> dict[str, str]:
    """An environment in which the client believes to talk to fal."""
    return confined(paced.proxied_environment, release)


def use(paced: LiveServer, environment: dict[str, str], verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the old client in this environment got; it cannot have left the machine."""
    answer = finish(paced.client(verb, json.dumps(arguments), program="old_client.py", environment=environment))
    assert Path(answer["package"]).is_relative_to(environment["PYTHONPATH"].split(":")[1])
    return answer


def check(answer: dict[str, Any], root: str) -> None:
    """Every way to a picture led to one, under URLs of the host that was called."""
    for result in (answer["run"], answer["queue"]["result"], answer["subscribe"], answer["queue_async"]["result"]):
        assert (result["image"]["width"], result["seed"]) == (128, 1)
        assert result["image"]["url"].startswith("https://") and root in result["image"]["url"]
    assert answer["queue"]["again"] == answer["queue"]["result"]
    assert answer["queue"]["same_urls"]
    for name in ("queue", "queue_async"):
        assert answer[name]["events"][-1] == "Completed"
        assert set(answer[name]["events"]) <= {"Queued", "InProgress", "Completed"}


def test_one_variable_is_enough(paced: LiveServer, by_name: dict[str, str], arguments: Arguments) -> None:
    """With FAL_RUN_HOST set and `queue.` resolved, run, submit and subscribe work, sync and async."""
    answer = use(paced, by_name, "use", arguments())

    check(answer, f"localhost:{paced.tls_port}/files/")


def test_a_proxy_is_enough(paced: LiveServer, by_proxy: dict[str, str], arguments: Arguments) -> None:
    """Without any address of ours, by the CONNECT proxy, they work under fal's own names."""
    answer = use(paced, by_proxy, "use", arguments())

    check(answer, "fal.run/files/")


def test_uploads_come_here(paced: LiveServer, by_proxy: dict[str, str], arguments: Arguments) -> None:
    """Whatever host a release uploads to, the file arrives here and reads back byte for byte."""
    answer = use(paced, by_proxy, "upload", {})

    assert answer["same"]
    assert "/files/" in answer["url"]
