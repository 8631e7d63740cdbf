"""Interrupts that wait for the end of a block; `signal.raise_signal` is a SIGINT at a known place."""

import os
import signal
import threading

import pytest

from causalrt.runtime.interrupts import allowed, deferred


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def handler_of():
    """Puts a SIGINT handler in place for one test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_is_raised_at_the_end_of_the_outermost_block():
    before, reached = signal.getsignal(signal.SIGINT), []

    def block():
        with deferred():
            with deferred():
                interrupt()
                reached.append("the inner block's end")
            reached.append("the outer block's end")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == ["the inner block's end", "the outer block's end"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_is_raised_at_once():
    before, reached = signal.getsignal(signal.SIGINT), []

    def block():
        with deferred() as interrupts:
            reached.append(interrupts)
            interrupt()
            reached.append("after the first")
            interrupt()
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        block()
    interrupts, *places = reached
    assert places == ["after the first"]
    assert interrupts.broken_off
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_in_the_block_is_the_interrupts_context():
    def block():
        with deferred():
            interrupt()
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as caught:
        block()
    assert isinstance(caught.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("kept", [False, True], ids=["in it", "before it"])
def test_an_interrupt_is_raised_where_it_is_allowed(kept):
    reached = []

    def block():
        with deferred() as interrupts:
            reached.append(interrupts)
            if kept:
                interrupt()
            with allowed():
                reached.append("allowed")
                interrupt()
            reached.append("too far")

    with pytest.raises(KeyboardInterrupt):
        block()
    interrupts, *places = reached
    assert places == ([] if kept else ["allowed"])
    assert not interrupts.broken_off


def test_an_interrupt_after_the_allowed_block_is_deferred_again():
    reached = []

    def block():
        with deferred():
            with allowed():
                pass
            interrupt()
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert reached == ["the end"]


def test_a_handler_that_raises_nothing_runs_at_once(handler_of):
    """A program that counts its interrupts is not interrupted by us, however many there are."""
    counted = []
    handler_of(lambda number, frame: counted.append(number))
    with deferred() as interrupts:
        interrupt()
        interrupt()
        assert len(counted) == 2
    assert not interrupts.broken_off


def test_what_the_handler_raises_is_what_comes_out(handler_of):
    def stop(number, frame):
        raise SystemExit(3)

    handler_of(stop)
    with pytest.raises(SystemExit, match="3"), deferred():
        interrupt()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=str)
def test_a_disposition_without_a_handler_stays(handler_of, handler):
    handler_of(handler)
    with deferred(), allowed():
        assert signal.getsignal(signal.SIGINT) == handler


def test_other_threads_do_not_touch_the_handler():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with deferred(), allowed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_process_that_is_forked_meanwhile_is_interrupted_as_ever():
    """Its main thread is another thread of ours, so that the block never ends there."""
    statuses = []

    def fork():
        pid = os.fork()
        if pid == 0:
            try:
                interrupt()
            except KeyboardInterrupt:
                os._exit(7)
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    with deferred():
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert statuses == [7]
