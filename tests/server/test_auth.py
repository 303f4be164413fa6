"""Keys: which open the door, and what strangers are told."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.auth import Keyring
from server.errors import InvalidCredentials, NotAuthenticated
from server.settings import Settings

APP = "fal-ai/creative-upscaler"


@pytest.mark.parametrize(
    "header", ["Key one", "key one", "KEY  one", "Bearer one", "bearer one", "Key id:secret", "Key zwei-ü"]
)
def test_every_configured_key_opens_in_either_scheme(header: str) -> None:
    """fal's two schemes, in any case, with any of several keys."""
    assert len(Keyring(["one", "id:secret", "zwei-ü"]).identify(header)) == 16


@pytest.mark.parametrize(
    ("header", "error"),
    [
        (None, NotAuthenticated),
        ("", NotAuthenticated),
        ("Key", NotAuthenticated),
        ("Basic one", NotAuthenticated),
        ("one", NotAuthenticated),
        ("Key two", InvalidCredentials),
        ("Key on", InvalidCredentials),
        ("Key onee", InvalidCredentials),
    ],
)
def test_nothing_else_opens(header: str | None, error: type[Exception]) -> None:
    """Missing and wrong keys are told apart."""
    with pytest.raises(error):
        Keyring(["one"]).identify(header)


def test_without_keys_everybody_may_call() -> None:
    """fal's clients always send some key, and curl none; both are let in."""
    assert Keyring([]).identify(None) == ""
    assert Keyring([]).identify("Key whatever") != Keyring([]).identify("Key other")


def test_what_is_open_and_what_is_not(app_settings: Settings) -> None:
    """Models need a key; files, health and readiness do not."""
    settings = Settings(data=app_settings.data, api_keys="one")
    with TestClient(create_app(settings)) as client:
        refused = client.post(f"/{APP}", json={})
        wrong = client.get(f"/queue/{APP}/requests/1/status", headers={"authorization": "Key two"})
        known = client.get(f"/queue/{APP}/requests/1/status", headers={"authorization": "Bearer one"})
        opened = [client.get(path).status_code for path in ("/health", "/ready", "/files/out/ab/x.png")]

    assert refused.status_code == 401 and refused.json()["detail"] == (
        f'Cannot access application "{APP}". Authentication is required to access this application.'
    )
    assert wrong.status_code == 401 and known.status_code == 404
    assert opened == [200, 503, 404]


@pytest.mark.parametrize("query", ["?xfal_jwt_token=1", "?a=fal_jwt_token=", "?fal_jwt_token=", "?fal_jwt_token"])
def test_a_query_that_only_resembles_a_token_is_no_key(app_settings: Settings, query: str) -> None:
    """Strangers are told so, whatever their query looks like."""
    with TestClient(create_app(Settings(data=app_settings.data, api_keys="one"))) as client:
        assert client.get(f"/queue/{APP}/requests/1/status{query}").status_code == 401
