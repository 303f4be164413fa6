"""Who may call: keys from the settings, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from server.errors import InvalidCredentials, NotAuthenticated

SCHEMES = ("key", "bearer")


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
