"""Who may call: keys from the settings, compared in constant time, and tickets that we signed ourselves."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from server.errors import InvalidCredentials, NotAuthenticated
from server.ledger import Ledger

SCHEMES = ("key", "bearer")
SECRET_NAME = "ticket_secret"


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
