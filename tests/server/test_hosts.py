"""One table decides what a request means; these are its rows."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.hosts import Route, resolve
from server.settings import Settings

APP = "fal-ai/creative-upscaler"
SUBMIT = {"image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("host", "path", "route"),
    [
        ("box", f"/{APP}", Route("run", f"/run/{APP}")),
        ("box", f"/run/{APP}/", Route("run", f"/run/{APP}")),
        ("fal.run", f"/{APP}/stream", Route("run", f"/run/{APP}/stream")),
        ("box", f"/queue/{APP}", Route("queue", f"/queue/{APP}")),
        ("queue.fal.run", f"/{APP}", Route("queue", f"/queue/{APP}")),
        ("queue.example.org", f"//{APP}/", Route("queue", f"/queue/{APP}")),
        ("queue.box", f"/run/{APP}", Route("run", f"/run/{APP}")),
        ("queue.box", f"/{APP}/requests/1/status/", Route("queue", f"/queue/{APP}/requests/1/status")),
        (
            "box",
            f"/queue/{APP}/sub/path/requests/1/status/stream",
            Route("queue", f"/queue/{APP}/requests/1/status/stream"),
        ),
        ("box", f"/queue/{APP}/requests/1/response/", Route("queue", f"/queue/{APP}/requests/1")),
        ("box", f"/{APP}/requests/1/cancel", Route("queue", f"/queue/{APP}/requests/1/cancel")),
        ("box", f"/queue/{APP}/requests/1/bogus", Route("queue", f"/queue/{APP}/requests/1/bogus")),
        ("box", f"/queue/{APP}/requests", Route("queue", f"/queue/{APP}/requests")),
        ("queue.box", "/files/out/ab/x.png", Route("rest", "/files/out/ab/x.png")),
        ("box", "/rest/tokens/", Route("rest", "/tokens")),
        ("rest.fal.ai", "/storage/upload/initiate", Route("rest", "/storage/upload/initiate")),
        ("rest.alpha.fal.ai", "/anything", Route("rest", "/anything")),
        ("v3.fal.media", "/files/upload", Route("rest", "/files/upload")),
        ("box", "/.well-known/jwks.json", Route("rest", "/.well-known/jwks.json")),
        ("box", "/health", Route("rest", "/health")),
        ("box", "/", Route("rest", "/")),
    ],
)
def test_a_path_on_a_host_means_one_thing(host: str, path: str, route: Route) -> None:
    """By prefix first, then by our own paths, then by the host's name."""
    assert resolve(host, path) == route


def urls_of(settings: Settings, path: str, headers: dict[str, str]) -> Any:
    """What a submission's URLs are for a caller."""
    with TestClient(create_app(settings), base_url="https://127.0.0.1:8443", client=("10.0.0.9", 5)) as client:
        return client.post(path, json=SUBMIT, headers=headers).json()["status_url"].partition("/requests/")[0]


@pytest.mark.parametrize(
    ("changes", "path", "headers", "base"),
    [
        ({}, f"/queue/{APP}", {"host": "box:8443"}, f"https://box:8443/queue/{APP}"),
        ({}, f"/{APP}", {"host": "queue.fal.run"}, f"https://queue.fal.run/{APP}"),
        ({}, f"/queue/{APP}", {"host": "queue.fal.run"}, f"https://queue.fal.run/queue/{APP}"),
        ({}, f"/queue/{APP}", {"host": "[::1]:8443"}, f"https://[::1]:8443/queue/{APP}"),
        ({}, f"/queue/{APP}", {"host": 'a"b'}, f"https://127.0.0.1:8443/queue/{APP}"),
        ({"public_url": "https://up.example/p/"}, f"/queue/{APP}", {"host": "x"}, f"https://up.example/p/queue/{APP}"),
        ({}, f"/queue/{APP}", {"host": "b", "x-forwarded-host": "evil"}, f"https://b/queue/{APP}"),
        (
            {"trusted_proxies": ["10.0.0.0/8"]},
            f"/queue/{APP}",
            {"host": "b", "x-forwarded-host": "good, b", "x-forwarded-proto": "http"},
            f"http://good/queue/{APP}",
        ),
        (
            {"trusted_proxies": ["192.168.1.1"]},
            f"/queue/{APP}",
            {"host": "b", "x-forwarded-host": "evil", "x-forwarded-proto": "http"},
            f"https://b/queue/{APP}",
        ),
    ],
)
def test_urls_come_from_one_rule(
    app_settings: Settings, changes: dict[str, Any], path: str, headers: dict[str, str], base: str
) -> None:
    """The configured base, else forwarding headers of a trusted proxy, else the request's own scheme and host."""
    settings = Settings(data=app_settings.data, **changes)

    assert urls_of(settings, path, headers) == base


def test_the_proxy_route_answers_itself(client: TestClient) -> None:
    """A client in proxy mode names fal's URLs and gets our answers; its URLs are ours."""
    target = {"x-fal-target-url": f"https://queue.fal.run/{APP}"}
    submitted = client.post("/api/fal/proxy", json=SUBMIT, headers=target).json()
    status = f"https://queue.falrun.com/{APP}/requests/{submitted['request_id']}/status?logs=1"

    answer = client.get("/fal/proxy", headers={"x-fal-target-url": status})

    assert submitted["status_url"].startswith("http://127.0.0.1:8000/queue/")
    assert answer.status_code == 202 and isinstance(answer.json()["logs"], list)


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", None, 400),
        ("GET", "no url", 400),
        ("GET", "http://[", 400),
        ("GET", "https://169.254.169.254/latest/meta-data", 400),
        ("GET", "https://fal.run.evil.example/x", 400),
        ("GET", "https://user@fal.run/x", 400),
        ("GET", "file:///etc/passwd", 400),
        ("GET", "http://127.0.0.1:8000/api/fal/proxy", 400),
        ("GET", "http://127.0.0.1:9999/health", 400),
        ("GET", "http://127.0.0.1:8000/health", 200),
        ("DELETE", "https://fal.run/x", 405),
    ],
)
def test_the_proxy_route_refuses_other_targets(
    client: TestClient, method: str, target: str | None, status: int
) -> None:
    """Only hosts of the table and our own are targets, and only the methods that clients use."""
    headers = {"x-fal-target-url": target} if target else {}

    answer = client.request(method, "/api/fal/proxy", headers=headers)

    assert answer.status_code == status and isinstance(answer.json(), dict)


def test_the_target_header_means_nothing_elsewhere(client: TestClient) -> None:
    """Chained proxies forward it; a normal route must not be led astray."""
    answer = client.post(f"/queue/{APP}", json=SUBMIT, headers={"x-fal-target-url": "https://fal.run/nothing"})

    assert answer.json()["status"] == "IN_QUEUE"
