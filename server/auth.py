"""Who may call: keys from the settings, compared in constant time, tickets that we signed, the operator's own key."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Sequence
from typing import Any

from server.errors import InvalidCredentials, NotAuthenticated, NotOperator
from server.ledger import Ledger
from server.settings import Settings

SCHEMES = ("key", "bearer")
SECRET_NAME = "ticket_secret"
NOTHING = hashlib.sha256(b"").digest()


class Keyring:
    """The keys that open this server; without any it is open."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests of one length: comparing them tells nothing about a key's length or its first letters.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._digests

    def identify(self, authorization: str | None, subject: str = "") -> str:
        """A fingerprint of the caller's key, empty for a caller without one.

        Args:
            authorization: The header, `Key <key>` or `Bearer <key>`; the scheme in any case.
            subject: What is called, for the message.

        Raises:
            NotAuthenticated: A key is needed and none is given.
            InvalidCredentials: The key is none of ours.
        """
        key = presented_key(authorization)
        if key is None:
            if self.is_open:
                return ""
            raise NotAuthenticated(subject or "Authorization header is required")
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not self.is_open and not any(matches):
            raise InvalidCredentials
        return digest.hex()[:16]


class OperatorKey:
    """The one key that opens what is for the operator. It is always wanted: also on a server without keys for callers.

    Whoever may read the data folder has it; nobody else on this machine, and no page in a browser of this machine,
    whatever name it made this address go by.
    """

    def __init__(self, key: str) -> None:
        self._digest = hashlib.sha256(key.encode()).digest()

    @classmethod
    def open(cls, settings: Settings) -> OperatorKey:
        """The key of the settings, or of the data folder, where it is made at first use."""
        key = known_operator_key(settings)
        if not key:
            # Whole or not at all: a disk that is full at the first start leaves no empty file behind, which would lock
            # the operator out for good.
            key, path = secrets.token_urlsafe(32), settings.operator_key_path
            draft = path.with_name(f"{path.name}.draft")
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(key)
            draft.replace(path)
        return cls(key)

    def check(self, authorization: str | None) -> None:
        """Raise NotOperator unless the header, `Key <key>` or `Bearer <key>`, has it."""
        digest = hashlib.sha256((presented_key(authorization) or "").encode("utf-8", "replace")).digest()
        if not hmac.compare_digest(digest, self._digest) or digest == NOTHING:
            raise NotOperator


def known_operator_key(settings: Settings) -> str | None:
    """The operator's key, for who may know it; None where no server has made one yet, or it may not be read."""
    if settings.operator_key is not None:
        return settings.operator_key.get_secret_value()
    with contextlib.suppress(OSError):
        return settings.operator_key_path.read_text().strip()
    return None


def presented_key(authorization: str | None) -> str | None:
    """The key in an Authorization header; None without one, or with a scheme that is not fal's."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() if scheme.lower() in SCHEMES and key.strip() else None


class Tickets:
    """Facts that we sign and callers carry: an upload's place, a short-lived token. Nothing about them is stored."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    @classmethod
    async def open(cls, ledger: Ledger) -> Tickets:
        """With the secret of this server, made at first use and kept in the ledger."""
        known = await ledger.kv_get(SECRET_NAME) or await ledger.kv_add(SECRET_NAME, secrets.token_hex(32))
        return cls(bytes.fromhex(known))

    def issue(self, purpose: str, life_s: float, **facts: Any) -> str:
        """A ticket, in characters that fit into a URL."""
        text = json.dumps({"for": purpose, "until": time.time() + life_s, **facts}, separators=(",", ":"))
        payload = _base64(text.encode())
        return f"{payload}.{_base64(self._sign(payload))}"

    def read(self, purpose: str, ticket: str) -> dict[str, Any]:
        """The facts of a ticket.

        Raises:
            InvalidCredentials: We did not issue it, not for this, or it has run out.
        """
        payload, _, signature = ticket.partition(".")
        expected = _base64(self._sign(payload))
        if not hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")):
            raise InvalidCredentials("The token is not valid")
        facts: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        if facts["for"] != purpose or facts["until"] < time.time():
            raise InvalidCredentials("The token is not valid for this, or not any more")
        return facts

    def _sign(self, payload: str) -> bytes:
        return hmac.digest(self._secret, payload.encode("utf-8", "replace"), "sha256")


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
