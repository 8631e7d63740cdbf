"""A lock that is granted in the order of the requests, so that the sessions of an engine take turns."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

from causalrt.runtime import interrupts

CLOSE_S = 30.0
"""Seconds to wait for a thread whose processes were ended."""


class FairLock:
    """A `threading.Lock` that is granted first come, first served.

    Args:
        interruptible: inside `interrupts.deferred()`, an interrupt still ends the wait for the lock.
    """

    def __init__(self, *, interruptible: bool = False) -> None:
        self._interruptible = interruptible
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Event] = deque()

    def acquire(self, *, timeout_s: float | None = None) -> bool:
        """Acquire the lock and return True, or return False if that takes longer than `timeout_s` (0: do not wait)."""
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
        """Hold the lock in order to close what it guards.

        If another thread holds it, `end` is called to stop that thread's work, which has `CLOSE_S` seconds to notice.
        """
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
        """Release the lock to the next thread in the queue."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._held = False

    def _give_up(self, turn: threading.Event) -> None:
        """Leave the queue; if the lock was granted meanwhile, release it."""
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
