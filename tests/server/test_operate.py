"""The operator's commands: whom they tell the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.operate import OperationFailed, reach

ELSEWHERE = "http://upscaler.example:8000"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("UPSCALER_OPERATOR_KEY", raising=False)
    monkeypatch.setenv("UPSCALER_DATA", str(tmp_path))
    (tmp_path / "operator.key").write_text("of the server on this machine")


def test_the_key_of_this_machine_goes_to_no_other(tmp_path: Path) -> None:
    """It is sent elsewhere only when its folder is named together with the address."""
    with pytest.raises(OperationFailed, match="set UPSCALER_OPERATOR_KEY"), reach(None, ELSEWHERE):
        pass
    with reach(tmp_path, ELSEWHERE) as server:
        headers = server._client.headers

    assert headers["authorization"] == "Key of the server on this machine"


def test_the_key_of_the_environment_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is how another machine is reached."""
    monkeypatch.setenv("UPSCALER_OPERATOR_KEY", "of the server elsewhere")
    with reach(None, ELSEWHERE) as server:
        assert server._client.headers["authorization"] == "Key of the server elsewhere"
