import threading
import time

import pytest

from causalrt.runtime.fair_lock import FairLock


def waiting(lock, count):
    deadline = time.monotonic() + 5
    while len(lock._waiting) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(lock._waiting) == count


def test_first_come_first_served():
    lock, order, threads = FairLock(), [], []

    def take(name):
        with lock:
            order.append(name)

    lock.acquire()
    for name in range(5):
        threads.append(threading.Thread(target=take, args=(name,)))
        threads[-1].start()
        waiting(lock, name + 1)
    assert lock.acquire(timeout_s=0) is False
    lock.release()
    for thread in threads:
        thread.join(5)
    assert order == [0, 1, 2, 3, 4]
    assert lock.acquire(timeout_s=0) is True


def test_one_at_a_time():
    lock, inside, most = FairLock(), [], []

    def work():
        for _ in range(200):
            with lock:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (max(most), len(most)) == (1, 800)


@pytest.mark.parametrize("granted", [False, True], ids=["in the queue", "as its turn comes"])
def test_an_interrupted_thread_gives_its_turn_away(monkeypatch, granted):
    lock = FairLock()
    lock.acquire()

    class Interrupted(threading.Event):
        def wait(self, timeout=None):
            if granted:
                lock.release()
                assert self.is_set()
            raise KeyboardInterrupt

    monkeypatch.setattr("causalrt.runtime.fair_lock.threading.Event", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    if not granted:
        lock.release()
    assert lock.acquire(timeout_s=0) is True


def test_a_thread_that_waits_for_a_while():
    lock = FairLock()
    lock.acquire()
    assert lock.acquire(timeout_s=0.01) is False
    lock.release()
    assert lock.acquire(timeout_s=0.01) is True
