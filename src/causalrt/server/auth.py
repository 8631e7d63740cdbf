"""Bearer tokens from a file: one a line, `name:token` or the token alone; `#` begins a comment line.

Tokens are kept as digests, compared in constant time and never logged. A name tells owners of jobs apart and has the rate.
"""

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from causalrt.errors import ConfigError
from causalrt.regular_files import open_regular_file
from causalrt.server.api_errors import unauthorized

LEAST_CHARS = 16
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
TOKEN = re.compile(r"[\x21-\x39\x3b-\x7e]+")  # printable ASCII without blanks and colons


class Tokens:
    """Who may use the server; one without tokens lets everybody."""

    def __init__(self, owners: Mapping[bytes, str] | None = None) -> None:
        """`owners` maps digests of tokens to names; None lets everybody."""
        self._owners = None if owners is None else dict(owners)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a file that only its owner can.

        Raises:
            ConfigError: missing, readable by others, empty, or with a line that is no token; the line is not shown.
        """
        try:
            with open_regular_file(path) as file:
                mode = os.fstat(file.fileno()).st_mode
                lines = file.read().decode("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = "it is not ASCII text" if isinstance(error, UnicodeDecodeError) else str(error)
            raise ConfigError(f"the tokens in {path} cannot be read: {why}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"{path} holds tokens, and others may read it: chmod 600 {path}")
        owners: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, colon, token = text.rpartition(":")
            name = name if colon else f"token-{_digest(token).hex()[:16]}"  # not the line, which others may take over
            if not NAME.fullmatch(name) or not TOKEN.fullmatch(token) or len(token) < LEAST_CHARS:
                raise ConfigError(
                    f"line {number} of {path} must be NAME:TOKEN or TOKEN, the token at least {LEAST_CHARS} printable "
                    "characters; `openssl rand -hex 24` makes one"
                )
            if _digest(token) in owners or name in owners.values():
                raise ConfigError(f"line {number} of {path} has a name or a token that an earlier line has")
            owners[_digest(token)] = name
        if not owners:
            raise ConfigError(f"{path} holds no token; `openssl rand -hex 24` makes one")
        return cls(owners)

    @property
    def wanted(self) -> bool:
        """Whether a token is needed."""
        return self._owners is not None

    def owner(self, token: str | None) -> str:
        """Whose token it is; `anonymous` where none is needed.

        Raises:
            ApiError: 401.
        """
        if self._owners is None:
            return "anonymous"
        found = None
        presented = _digest(token or "")
        for digest, name in self._owners.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, presented):
                found = name
        if token is None or found is None:
            raise unauthorized()
        return found


def bearer_token(header: str | None) -> str | None:
    """The token of an `Authorization` header, if it has one."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
