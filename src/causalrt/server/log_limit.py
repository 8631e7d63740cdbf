"""Rate-limits the log, since any client can cause a message with each connection or request."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

PER_MINUTE = 10
MOST_MESSAGES = 1000


class LogLimit(logging.Filter):
    """Logs each message at most ten times a minute, whatever its arguments; the next one says how many were suppressed."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}  # message -> start of its minute, how often since then

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        now, message = self._clock(), str(record.msg)
        begun, count = self._seen.get(message, (now, 0))
        if now - begun >= 60:
            if count > PER_MINUTE:
                record.msg = f"{message} (and {count - PER_MINUTE} times more in the last {now - begun:.0f} s)"
            begun, count = now, 0
        if len(self._seen) >= MOST_MESSAGES:
            self._seen.clear()
        self._seen[message] = begun, count + 1
        return count < PER_MINUTE


@contextlib.contextmanager
def limited_logs(*names: str) -> Iterator[None]:
    """Apply a `LogLimit` to these loggers within the block."""
    limit = LogLimit()
    for name in names:
        logging.getLogger(name).addFilter(limit)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(limit)
