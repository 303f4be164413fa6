"""Fixtures for the server's tests: settings in an empty folder, and a ledger there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from starlette.testclient import TestClient

from server.app import create_app
from server.ledger import Ledger
from server.ledger.migrate import migrate
from server.settings import Settings
from tests.server.fake_slot import FakeSlot


@pytest.fixture(scope="session", autouse=True)
def plain_logs() -> None:
    """Log lines as a server writes them: drawing a traceback for a terminal takes seconds."""
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a server that nobody configured, in a folder of its own."""
    for name in Settings.model_fields:
        monkeypatch.delenv(f"UPSCALER_{name.upper()}", raising=False)
    return Settings(data=tmp_path / "data")


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger's file, made once: running the migrations takes longer than most tests."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite3"
    migrate(path)
    return path


@pytest.fixture
def ledger(settings: Settings, migrated: Path) -> Iterator[Ledger]:
    """An open ledger."""
    settings.make_folders()
    shutil.copy(migrated, settings.ledger_path)
    ledger = Ledger.open(settings)
    yield ledger
    ledger.close()


@pytest.fixture
def app_settings(settings: Settings, migrated: Path) -> Settings:
    """Settings of a gateway whose ledger exists already."""
    settings.make_folders()
    shutil.copy(migrated, settings.ledger_path)
    return settings


@pytest.fixture
def client(app_settings: Settings) -> Iterator[TestClient]:
    """A client of a gateway without keys."""
    with TestClient(create_app(app_settings), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture
def slot(app_settings: Settings) -> Iterator[FakeSlot]:
    """A slot that makes no pictures, on the ledger of the same server."""
    slot = FakeSlot(app_settings)
    yield slot
    slot.close()
