"""A lock that is given to whoever has waited longest, so that sessions on one engine really take turns."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

from causalrt.runtime import interrupts

CLOSE_S = 30.0
"""How long to wait for a thread whose processes were ended."""


class FairLock:
    """Like `threading.Lock`, but first come, first served.

    Args:
        interruptible: inside `interrupts.deferred()`, an interrupt still ends the wait for the lock.
    """

    def __init__(self, *, interruptible: bool = False) -> None:
        self._interruptible = interruptible
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, *, timeout_s: float | None = None) -> bool:
        """Take it, or say that others have held it for `timeout_s` (0: hold it now)."""
        turn = threading.Event()
        try:
            with self._mutex:
                if not self._held:
                    self._held = True
                    return True
                if timeout_s == 0:
                    return False
                self._waiting.append(turn)
            with interrupts.allowed() if self._interruptible else contextlib.nullcontext():
                granted = turn.wait(timeout_s)
            if granted:
                return True
        except BaseException:
            self._give_up(turn)
            raise
        self._give_up(turn)
        return False

    @contextlib.contextmanager
    def after_ending(self, end: Callable[[], None]) -> Iterator[None]:
        """Hold it to close what it guards; whoever holds it meanwhile has that ended by `end`, and so much time to notice."""
        held = self.acquire(timeout_s=0)
        if not held:
            end()
            held = self.acquire(timeout_s=CLOSE_S)
        try:
            yield
        finally:
            if held:
                self.release()

    def release(self) -> None:
        """Hand it to the next one in the queue."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False

    def _give_up(self, turn: threading.Event) -> None:
        """A thread leaves the queue; if its turn had come, it passes it on."""
        with self._mutex:
            if turn in self._waiting:
                self._waiting.remove(turn)
                return
        if turn.is_set():
            self.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
