"""Certificates: made once, right for every name, renewed in time."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from server import tls
from server.settings import Settings
from server.tls import ensure_certificates, names_of


def leaf_of(settings: Settings) -> x509.Certificate:
    """The certificate that is served."""
    return x509.load_pem_x509_certificate(ensure_certificates(settings).chain.read_bytes())


def handshake(settings: Settings, name: str) -> None:
    """A TLS handshake in memory, as a client that trusts our bundle and asks for this name."""
    files = ensure_certificates(settings)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(files.chain, files.key)
    client_context = ssl.create_default_context(cafile=str(files.ca_bundle))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    waiting = [client, server]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
    assert not waiting


def test_every_name_we_go_by_is_covered(settings: Settings) -> None:
    """Local names, the public one, and fal's own; clients verify them with the bundle alone."""
    settings = Settings(data=settings.data, public_url="https://up.example:444/x", host="0.0.0.0")

    names = names_of(leaf_of(settings))

    assert {"localhost", "127.0.0.1", "::1", "up.example", "queue.up.example"} <= set(names)
    assert {"fal.run", "queue.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "v3.fal.media", "fal.media"} <= set(names)
    for name in ("localhost", "127.0.0.1", "::1", "queue.fal.run"):
        handshake(settings, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(settings, "other.example")


def test_certificates_are_made_once(settings: Settings) -> None:
    """A restart serves what clients trust already; keys are readable by their owner only."""
    first = ensure_certificates(settings)
    before = {path.name: path.read_bytes() for path in settings.tls_dir.rglob("*.pem")}
    ensure_certificates(settings)

    assert {path.name: path.read_bytes() for path in settings.tls_dir.rglob("*.pem")} == before
    assert {path.name for path in settings.trust_dir.iterdir()} == {"ca.pem", "ca-bundle.pem"}
    assert first.key.stat().st_mode & 0o077 == 0
    assert (settings.tls_dir / "ca-key.pem").stat().st_mode & 0o077 == 0


def test_a_certificate_near_its_end_is_renewed_under_the_same_authority(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients need not be told."""
    monkeypatch.setattr(tls, "LEAF_LIFE", timedelta(days=20))
    old = leaf_of(settings)
    authority = (settings.trust_dir / "ca.pem").read_bytes()
    monkeypatch.undo()

    new = leaf_of(settings)

    assert old.serial_number != new.serial_number
    assert new.not_valid_after_utc > datetime.now(UTC) + timedelta(days=365)
    assert (settings.trust_dir / "ca.pem").read_bytes() == authority


def test_a_new_name_gets_a_new_certificate(settings: Settings) -> None:
    """Configuring a public host is enough."""
    old = leaf_of(settings)
    new = leaf_of(Settings(data=settings.data, public_url="https://new.example"))
    more = Settings(data=settings.data, tls_names=["upscaler"])

    assert "new.example" in names_of(new) and "new.example" not in names_of(old)
    for name in ("localhost", "upscaler", "queue.upscaler"):
        handshake(more, name)


def test_the_operators_certificate_is_served_as_it_is(settings: Settings, tmp_path: Path) -> None:
    """With a certificate of their own there is no authority of ours."""
    files = ensure_certificates(
        Settings(data=settings.data, tls_cert=tmp_path / "chain.pem", tls_key=tmp_path / "key.pem")
    )

    assert (files.chain, files.ca) == (tmp_path / "chain.pem", None)
    assert not settings.tls_dir.exists()
