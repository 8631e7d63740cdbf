"""Progress of long work on stderr: bars on a terminal, and lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from causalrt.progress import Progress as OnProgress
from causalrt.terminal import PrintableConsole, printable

LINE_EVERY_S = 20.0
"""Without a terminal, a stage reports its progress at this interval."""


@contextmanager
def shown_progress() -> Iterator[OnProgress]:
    """Show a bar for each stage, or, without a terminal, a line when a stage ends."""
    console = PrintableConsole(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<22}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=console)
    bars: dict[str, Any] = {}

    def update(stage: str, done: int, total: int) -> None:
        progress.start()
        if stage not in bars or progress.tasks[bars[stage]].finished:
            bars[stage] = progress.add_task(printable(stage), total=total)
        progress.update(bars[stage], completed=done, total=total)

    try:
        yield update
    finally:
        if bars:
            progress.stop()


def _lines(console: PrintableConsole) -> OnProgress:
    began: dict[str, float] = {}
    said: dict[str, float] = {}

    def update(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        start = began.setdefault(stage, now)
        if done >= total:
            console.print(f"{stage}: {done}/{total}, done in {now - start:.1f} s", soft_wrap=True)
            del began[stage]
            said.pop(stage, None)
        elif now - said.setdefault(stage, start) >= LINE_EVERY_S:
            said[stage] = now
            console.print(f"{stage}: {done}/{total} after {now - start:.0f} s", soft_wrap=True)

    return update
