"""Text for a terminal, in which characters that could steer the terminal are shown as escapes.

Names of tensors and files, and messages made of them, come from others. A control character in them could move the cursor,
change the title of the window, or make a terminal answer as if keys had been pressed.
"""

import logging
import re
from typing import IO, Any

from rich.console import Console
from rich.text import Text

# C0 controls except tab and line feed, DEL, C1 controls, marks and overrides of direction, line separators, surrogates.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with characters that steer a terminal shown as `\x1b` or `\u202e`."""

    def shown(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"  # the second form is valid in JSON, too

    return _STEERING.sub(shown, text)


class PrintableConsole(Console):
    """A console that makes all text `printable`, table cells included, and interprets no markup."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False)

    def render_str(self, text: str, **settings: Any) -> Text:
        """See `Console.render_str`."""
        return super().render_str(printable(text), **settings)


class PrintableFormatter(logging.Formatter):
    """Formats log records as `printable` text; further lines are indented, so that none can pass for another record."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return printable(super().format(record)).replace("\n", "\n    ")


def printable_handler(stream: IO[str], line_format: str) -> logging.Handler:
    """A log handler that writes `printable` text to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter(line_format))
    return handler
