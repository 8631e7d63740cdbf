import time

import torch

from causalrt.runtime.stopwatch import CudaStopwatch, HostStopwatch, stopwatch_for


def test_which_clock():
    assert isinstance(stopwatch_for(torch.device("cpu")), HostStopwatch)
    assert isinstance(stopwatch_for(torch.device("cuda", 1)), CudaStopwatch)


def test_host_time_between_any_two_marks(monkeypatch):
    moments = iter([10.0, 10.25, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    watch = HostStopwatch()
    marks = [watch.mark() for _ in range(3)]
    assert [watch.ms(marks[0], marks[1]), watch.ms(marks[1], marks[2]), watch.ms(marks[0], marks[2])] == [
        250,
        750,
        1000,
    ]


def test_events_are_only_queued_until_their_time_is_asked(monkeypatch):
    """A wait in `mark` would make the host wait for the GPU inside a chunk."""
    recorded = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(self)

        def elapsed_time(self, end):
            return 8.0 * (recorded.index(end) - recorded.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = CudaStopwatch()
    first, second, third = (watch.mark() for _ in range(3))
    assert len(recorded) == 3
    assert (watch.ms(first, second), watch.ms(first, third)) == (8.0, 16.0)
