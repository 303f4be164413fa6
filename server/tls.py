"""Certificates: an authority of our own, made at first start, and one certificate for all names we go by.

fal's Python client speaks https only. A user points `SSL_CERT_FILE` at `ca-bundle.pem` (the public authorities and
ours) or Node's `NODE_EXTRA_CA_CERTS` at `ca.pem`, and is done; the certificate also covers fal's own host names, for
clients that reach us under those by DNS or through a CONNECT proxy.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from server.hosts import FAL_HOSTS, MEDIA_HOSTS
from server.settings import Settings

CA_LIFE = timedelta(days=3650)
LEAF_LIFE = timedelta(days=397)  # browsers refuse longer ones
RENEW_BEFORE = timedelta(days=30)
CLOCK_SKEW = timedelta(hours=24)


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """Files (PEM): what the server shows and what clients trust."""

    chain: Path
    key: Path
    ca: Path | None
    ca_bundle: Path | None


def ensure_certificates(settings: Settings) -> Certificates:
    """The certificates to serve with: the operator's, else ours, made or renewed where needed."""
    if settings.tls_cert and settings.tls_key:
        return Certificates(chain=settings.tls_cert, key=settings.tls_key, ca=None, ca_bundle=None)
    folder = settings.tls_dir
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings.trust_dir.mkdir(mode=0o755, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        authority = _ensure_authority(folder, settings.trust_dir)
        _ensure_leaf(folder, authority, alternative_names(settings))
    return Certificates(
        chain=folder / "server.pem",
        key=folder / "server-key.pem",
        ca=settings.trust_dir / "ca.pem",
        ca_bundle=settings.trust_dir / "ca-bundle.pem",
    )


def alternative_names(settings: Settings) -> list[str]:
    """Every name and address that a client may know us by."""
    public = urlsplit(settings.public_url).hostname if settings.public_url else None
    machine = socket.gethostname().lower()
    listening = settings.host if settings.host not in ("", "0.0.0.0", "::") else None
    names = ["localhost", "queue.localhost", "127.0.0.1", "::1", machine, f"queue.{machine}"]
    for name in (public, listening, *settings.tls_names):
        if name and name not in names:
            names += [name] if _is_address(name) or name == "localhost" else [name, f"queue.{name}"]
    return list(dict.fromkeys([*names, *FAL_HOSTS, *MEDIA_HOSTS]))


def own_hosts(settings: Settings) -> list[str]:
    """Host and port, as they stand in URLs, of everything that a client may reach us by; all in lower case."""
    names = [f"[{name}]" if ":" in name else name.lower() for name in alternative_names(settings)]
    ports = [f":{port}" for port in (settings.port, settings.tls_port) if port]
    public = [urlsplit(settings.public_url).netloc.lower()] if settings.public_url else []
    return [*public, *(name + port for name in names for port in ("", *ports))]


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _ensure_authority(folder: Path, trust: Path) -> _Authority:
    certificate_path, key_path = trust / "ca.pem", folder / "ca-key.pem"
    if certificate_path.exists() and key_path.exists():
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        if not _is_due(certificate):
            key = load_pem_private_key(key_path.read_bytes(), password=None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            authority = _Authority(certificate, key)
            _write_bundle(trust, authority)
            return authority
    authority = _make_authority()
    _write(key_path, _pem(authority.key), mode=0o600)
    _write(certificate_path, authority.certificate.public_bytes(Encoding.PEM))
    _write_bundle(trust, authority)
    return authority


def _write_bundle(trust: Path, authority: _Authority) -> None:
    roots = Path(certifi.where()).read_bytes().rstrip() + b"\n"
    bundle = roots + authority.certificate.public_bytes(Encoding.PEM)
    path = trust / "ca-bundle.pem"
    if not path.exists() or path.read_bytes() != bundle:
        _write(path, bundle)


def _ensure_leaf(folder: Path, authority: _Authority, names: Sequence[str]) -> None:
    chain_path, key_path = folder / "server.pem", folder / "server-key.pem"
    if chain_path.exists() and key_path.exists():
        leaf = x509.load_pem_x509_certificate(chain_path.read_bytes())
        is_ours = leaf.issuer == authority.certificate.subject and _is_signed_by(leaf, authority)
        if is_ours and not _is_due(leaf) and set(names) <= set(names_of(leaf)):
            return
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = _make_leaf(key, authority, names)
    _write(key_path, _pem(key), mode=0o600)
    _write(chain_path, leaf.public_bytes(Encoding.PEM) + authority.certificate.public_bytes(Encoding.PEM))


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def _make_authority() -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    # Two servers' authorities may lie in one trust store: equal names would confuse the search for the issuer.
    name = _name(f"creative-upscaler local authority {os.urandom(4).hex()}")
    certificate = (
        _builder(name, name, key.public_key(), CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Authority(certificate, key)


def _make_leaf(key: ec.EllipticCurvePrivateKey, authority: _Authority, names: Sequence[str]) -> x509.Certificate:
    issuer = authority.key.public_key()
    return (
        _builder(_name("creative-upscaler"), authority.certificate.subject, key.public_key(), LEAF_LIFE)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life - CLOCK_SKEW)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_due(certificate: x509.Certificate) -> bool:
    return datetime.now(UTC) > certificate.not_valid_after_utc - RENEW_BEFORE


def _is_signed_by(leaf: x509.Certificate, authority: _Authority) -> bool:
    try:
        leaf.verify_directly_issued_by(authority.certificate)
    except Exception:  # one of several, depending on what does not match
        return False
    return True


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    draft.replace(path)
