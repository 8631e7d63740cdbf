"""Text that could steer a terminal is shown instead."""

import logging

import pytest
from rich.table import Table

from causalrt.terminal import PrintableConsole, printable, printable_handler

TITLE = "\x1b]0;owned\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (TITLE, r"\x1b]0;owned\x07"),
        ("\x9b31m", r"\u009b31m"),
        ("a\rb\x08c\x7f", r"a\x0db\x08c\u007f"),
        ("fox\u202egpj.exe\u2066", r"fox\u202egpj.exe\u2066"),
        ("bad name \udcff", r"bad name \udcff"),
        ("two lines\n\tof naïve 日本語 🦊 [red]", "two lines\n\tof naïve 日本語 🦊 [red]"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_tables(capsys):
    table = Table(title=f"title {TITLE}")
    table.add_column(f"head {TITLE}")
    table.add_row(f"[bold]{TITLE}")
    PrintableConsole().print(table)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count(r"\x1b]0;owned\x07") == 3
    assert "[bold]" in out


def test_log_lines(capsys):
    import sys

    handler = printable_handler(sys.stderr, "%(levelname)s %(message)s")
    handler.handle(logging.LogRecord("n", logging.WARNING, "p", 1, "%s", (TITLE,), None))
    handler.handle(logging.LogRecord("n", logging.WARNING, "p", 1, "%s", ("a\nERROR forged",), None))
    assert capsys.readouterr().err == "WARNING \\x1b]0;owned\\x07\nWARNING a\n    ERROR forged\n"
