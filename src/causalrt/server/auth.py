"""Bearer tokens from a file: one per line, `name:token` or only the token; lines that begin with `#` are comments.

Tokens are kept as digests, compared in constant time and never logged. Jobs and rate limits belong to the name of a token.
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
    """The tokens that give access to the server; without any, everybody has access."""

    def __init__(self, owners: Mapping[bytes, str] | None = None) -> None:
        """`owners` maps digests of tokens to names; None gives everybody access."""
        self._owners = None if owners is None else dict(owners)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read the tokens from a file that only its owner may read.

        Raises:
            ConfigError: the file is missing, readable by others or empty, or a line is not a token; the line is not shown.
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
            name = (
                name if colon else f"token-{_digest(token).hex()[:16]}"
            )  # not the line number, which another token could get
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
        """Whether requests need a token."""
        return self._owners is not None

    def owner(self, token: str | None) -> str:
        """Return the name of a token; `anonymous` where none is needed.

        Raises:
            ApiError: 401, the token is missing or unknown.
        """
        if self._owners is None:
            return "anonymous"
        found = None
        presented = _digest(token or "")
        for digest, name in self._owners.items():  # compare all of them, so that the time reveals nothing
            if hmac.compare_digest(digest, presented):
                found = name
        if token is None or found is None:
            raise unauthorized()
        return found


def bearer_token(header: str | None) -> str | None:
    """Return the token of an `Authorization` header, or None if it has none."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()
