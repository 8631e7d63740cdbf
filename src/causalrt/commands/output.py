"""What every command prints with, and the exit codes."""

from collections.abc import Mapping
from typing import TextIO

from causalrt.terminal import printable

EXIT_FAILED, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141


def say(text: str, *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print text without characters that could steer a terminal."""
    print(printable(text), file=file, flush=flush)


def mebibytes(parts: Mapping[str, int]) -> str:
    """Sizes in MiB by name, for example `weights 4.0, kv 1.5`."""
    return ", ".join(f"{name.replace('_bytes', '')} {size / 2**20:,.1f}" for name, size in parts.items())
