"""Text that goes out to a client and comes back unread and unchanged: `encrypted_content`.

AES-256-GCM under a key that stays on this machine; what another server sealed, or somebody changed, does not open.
"""

from __future__ import annotations

import base64
import hmac
import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ossia.errors import ConfigError

_PREFIX = "ossia1."
_NUM_NONCE_BYTES = 12


class Seal:
    """Seals and opens under one key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._key = key

    def derived(self, purpose: str) -> bytes:
        """Another key of 32 bytes, for one purpose; it tells nothing of this one."""
        return hmac.digest(self._key, purpose.encode(), "sha256")

    @classmethod
    def at(cls, path: Path) -> Seal:
        """The key in a file that only its owner may read; made if it is not there. Raises ConfigError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}")
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(AESGCM.generate_key(256))
            try:
                # The whole key appears under its name at once, or another process's did before.
                os.link(fresh, path)
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
            return cls(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no key of 32 bytes can be kept there: {error}") from None

    @classmethod
    def ephemeral(cls) -> Seal:
        """A key that ends with this process."""
        return cls(AESGCM.generate_key(256))

    def seal(self, data: bytes) -> str:
        nonce = os.urandom(_NUM_NONCE_BYTES)
        return _spelled(nonce + self._cipher.encrypt(nonce, data, None))

    def open(self, text: str) -> bytes | None:
        """What was sealed; None for what this key did not seal."""
        if not text.startswith(_PREFIX):
            return None
        try:
            raw = base64.b64decode(text[len(_PREFIX) :].encode(), altchars=b"-_", validate=True)
            # base64 ignores spare bits of its last letter: the same bytes spelled otherwise are not what was sealed.
            if _spelled(raw) != text:
                return None
            return self._cipher.decrypt(raw[:_NUM_NONCE_BYTES], raw[_NUM_NONCE_BYTES:], None)
        except (ValueError, InvalidTag):
            return None


def _spelled(raw: bytes) -> str:
    return _PREFIX + base64.urlsafe_b64encode(raw).decode()
