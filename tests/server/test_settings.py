"""Where settings come from, and the folders that follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.settings import Settings


def test_constructor_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest source of a setting wins."""
    (tmp_path / "upscaler.toml").write_text(
        'port = 1\ntls_port = 2\nslots = 3\nfetch_allow_hosts = ["nas", "box:9000"]'
    )
    monkeypatch.setenv("UPSCALER_TLS_PORT", "22")
    monkeypatch.setenv("UPSCALER_SLOTS", "33")

    settings = Settings(data=tmp_path, slots=333)

    assert (settings.port, settings.tls_port, settings.slots, settings.host) == (1, 22, 333, "127.0.0.1")
    assert settings.fetch_allow_hosts == ["nas", "box:9000"]


@pytest.mark.parametrize("text", ["one, two:three ,", '["one", "two:three"]'])
def test_lists_in_the_environment_are_comma_separated_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Both spellings of a list give the same list."""
    monkeypatch.setenv("UPSCALER_API_KEYS", text)

    assert Settings(data=tmp_path).api_keys == ["one", "two:three"]


def test_a_file_elsewhere_is_named_by_upscaler_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UPSCALER_CONFIG replaces the file in the data folder."""
    (tmp_path / "other.toml").write_text('weights = "pocket"')
    monkeypatch.setenv("UPSCALER_CONFIG", str(tmp_path / "other.toml"))

    assert Settings(data=tmp_path / "data").weights == "pocket"


def test_a_misspelt_setting_in_the_file_is_an_error(tmp_path: Path) -> None:
    """Nothing in the file is silently ignored."""
    (tmp_path / "upscaler.toml").write_text("prot = 9000")

    with pytest.raises(ValidationError, match="prot"):
        Settings(data=tmp_path)


def test_a_proxy_that_is_no_address_is_an_error(tmp_path: Path) -> None:
    """Said at start, not by every request."""
    with pytest.raises(ValidationError, match="such as 10.0.0.0/8, got 'nginx'"):
        Settings(data=tmp_path, trusted_proxies=["127.0.0.1", "nginx"])


@pytest.mark.parametrize(("given", "missing"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_half_a_certificate_is_an_error(tmp_path: Path, given: str, missing: str) -> None:
    """An operator who forgot one of the two must not be served with a certificate of ours."""
    with pytest.raises(ValidationError, match=f"{given} is of no use without {missing}"):
        Settings(data=tmp_path, **{given: tmp_path / "file.pem"})


def test_a_deep_data_folder_gets_short_socket_paths(tmp_path: Path) -> None:
    """Unix sockets fit their 107 bytes wherever the data lies, and stay where they were."""
    deep = tmp_path / ("d" * 120)

    first, again = Settings(data=deep), Settings(data=deep)

    assert len(str(first.run_dir / "slot-10000000.sock")) < 100
    assert first.run_dir == again.run_dir
    assert Settings(data="/srv/upscaler").run_dir == Path("/srv/upscaler/run")
