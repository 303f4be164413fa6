"""Fixtures for the server's tests: settings in an empty folder, and a ledger there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.ledger import Ledger
from server.ledger.migrate import migrate
from server.settings import Settings


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
