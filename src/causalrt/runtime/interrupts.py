"""Interrupts (Ctrl-C, a notebook's stop button) during calls that must not stop halfway.

    with deferred():
        send_command()
        read_answer()          # a SIGINT in here is raised as KeyboardInterrupt when the block has ended

Python raises KeyboardInterrupt between any two bytecodes of the main thread. Raised between a command and its answer, it
would leave the answer in the socket, where the next call would read it as its own answer.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class DeferredInterrupts:
    """A SIGINT handler that holds back the first exception that the previous handler raises.

    Attributes:
        broken_off: a second interrupt came, and was raised inside the block.
    """

    def __init__(self, handler: Any) -> None:
        self.broken_off = False
        self._handler = handler
        self._raises_at_once = False
        self._kept: BaseException | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a handler that only sets a flag, as asyncio's does at first, takes effect at once."""
        try:
            self._handler(number, frame)
        except BaseException as error:
            if self._raises_at_once:
                raise
            if self._kept is not None:
                self.broken_off = True
                raise
            self._kept = error.with_traceback(None)

    def install(self) -> None:
        """Install this handler for SIGINT."""
        signal.signal(signal.SIGINT, self)

    def uninstall(self) -> None:
        """Restore the previous handler of SIGINT."""
        signal.signal(signal.SIGINT, self._handler)

    def raise_kept(self) -> None:
        """Raise the exception that was held back, if there is one."""
        kept, self._kept = self._kept, None
        if kept is not None:
            raise kept

    @contextlib.contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """Raise interrupts inside the block immediately, including one that was held back before it."""
        self._raises_at_once = True
        try:
            self.raise_kept()
            yield
        finally:
            self._raises_at_once = False


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def deferred() -> Iterator[DeferredInterrupts]:
    """Hold an interrupt that comes inside the block back until the block ends; a second one is raised at once.

    Blocks may be nested: the outermost one raises. Outside the main thread, where Python raises no interrupts, and where
    SIGINT is ignored or ends the process, the block has no effect.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or not callable(handler):
        yield DeferredInterrupts(None)
    elif isinstance(handler, DeferredInterrupts):
        yield handler
    else:
        interrupts = DeferredInterrupts(handler)
        try:
            interrupts.install()
            yield interrupts
        finally:
            interrupts.uninstall()
            interrupts.raise_kept()


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Raise interrupts at once while this block runs inside a `deferred` block."""
    handler = signal.getsignal(signal.SIGINT)
    if _in_main_thread() and isinstance(handler, DeferredInterrupts):
        with handler.raised_at_once():
            yield
    else:
        yield


def _uninstall_in_child() -> None:
    """Restore the handler in a forked child: the deferring call continues in the parent only."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, DeferredInterrupts):
        handler.uninstall()


os.register_at_fork(after_in_child=_uninstall_in_child)
