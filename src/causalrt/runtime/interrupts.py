"""Interrupts (Ctrl-C, a notebook's stop button) during a call that must not stop halfway.

    with deferred():
        send_command()
        read_answer()          # a SIGINT in here is raised as KeyboardInterrupt when the block has ended

Python raises KeyboardInterrupt between any two bytecodes of the main thread. Raised between a command and its answer, it
would leave the answer in the socket, where the next call would take it for its own.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class DeferredInterrupts:
    """A SIGINT handler that keeps back the first exception that the previous handler raises.

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
        """Handle SIGINT from here on."""
        signal.signal(signal.SIGINT, self)

    def uninstall(self) -> None:
        """Give SIGINT back to the previous handler."""
        signal.signal(signal.SIGINT, self._handler)

    def raise_kept(self) -> None:
        """Raise what was kept back, if there is something."""
        kept, self._kept = self._kept, None
        if kept is not None:
            raise kept

    @contextlib.contextmanager
    def raised_at_once(self) -> Iterator[None]:
        """Raise interrupts inside the block immediately, those that were kept back before it included."""
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
    """Within a `deferred` block, raise interrupts at once again while this block runs, which may end anywhere."""
    handler = signal.getsignal(signal.SIGINT)
    if _in_main_thread() and isinstance(handler, DeferredInterrupts):
        with handler.raised_at_once():
            yield
    else:
        yield


def _uninstall_in_child() -> None:
    """The call that deferred interrupts goes on in the parent alone, so the child would keep them back for ever."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, DeferredInterrupts):
        handler.uninstall()


os.register_at_fork(after_in_child=_uninstall_in_child)
