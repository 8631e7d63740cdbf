"""When a step is captured and when it is replayed, told by a recorder in the place of `torch.cuda`."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from causalrt.config import override
from causalrt.engines.cuda_graphs import CudaGraphs
from causalrt.errors import ExecutorError
from causalrt.layout import history_lengths, slots_from_config
from causalrt.recipes import recipe

GPU = torch.device("cuda", 0)
POOL = 7
TOTAL_BYTES, GRAPH_BYTES, POOL_BYTES = 2**40, 3 * 2**20, 5 * 2**20


class Recorder:
    """What is done to streams and graphs, in order; streams and graphs go by number."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.alive: set[int] = set()
        self.stream = "main"
        self.capturing: int | None = None
        self._streams, self._graphs = itertools.count(), itertools.count()
        recorder = self

        class Stream:
            def __init__(self, device: torch.device) -> None:
                assert device == GPU
                self.name = f"side {next(recorder._streams)}"

            def wait_stream(self, other: Any) -> None:
                recorder.events.append((self.name, "waits for", other.name))

        class Main(Stream):
            def __init__(self) -> None:
                self.name = "main"

        class CUDAGraph:
            def __init__(self) -> None:
                self.number = next(recorder._graphs)
                recorder.alive.add(self.number)

            def replay(self) -> None:
                assert recorder.capturing is None
                recorder.events.append((recorder.stream, "replays", self.number))

            def __del__(self) -> None:
                recorder.alive.discard(self.number)

        @contextlib.contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, recorder.stream = recorder.stream, chosen.name
            try:
                yield
            finally:
                recorder.stream = before

        @contextlib.contextmanager
        def graph(captured: CUDAGraph, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            assert pool == POOL  # one for all graphs
            assert capture_error_mode == "thread_local"  # other threads (NCCL's watchdog) may call CUDA meanwhile
            before, recorder.stream = recorder.stream, stream.name
            recorder.capturing = captured.number
            try:
                yield
            finally:
                recorder.stream, recorder.capturing = before, None

        self.functions: dict[str, Any] = {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "graph": graph,
            "current_stream": lambda device: Main(),
            "graph_pool_handle": lambda: POOL,
            "mem_get_info": lambda device: (TOTAL_BYTES - len(self.alive) * (GRAPH_BYTES + POOL_BYTES), TOTAL_BYTES),
            "memory_reserved": lambda device: len(self.alive) * POOL_BYTES,
        }

    def work(self) -> None:
        what = "runs" if self.capturing is None else f"captures into {self.capturing}"
        self.events.append((self.stream, what, "work"))

    def take(self) -> list[Any]:
        taken, self.events = self.events, []
        return taken


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for name, function in made.functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return made


def test_a_new_key_is_run_aside_then_captured_then_replayed(recorder: Recorder) -> None:
    graphs = CudaGraphs(GPU)
    graphs.run("a", recorder.work)
    assert recorder.take() == [
        ("side 0", "waits for", "main"),
        ("side 0", "runs", "work"),
        ("main", "waits for", "side 0"),
        ("side 0", "captures into 0", "work"),
        ("main", "replays", 0),
    ]


def test_a_known_key_is_replayed_and_nothing_else(recorder: Recorder) -> None:
    graphs = CudaGraphs(GPU)
    for key in ("a", "b"):
        graphs.run(key, recorder.work)
    recorder.take()
    for key in ("a", "b", "a"):
        graphs.run(key, recorder.work)
    assert recorder.take() == [("main", "replays", number) for number in (0, 1, 0)]


def test_keys_are_equal_by_value(recorder: Recorder) -> None:
    graphs = CudaGraphs(GPU)
    graphs.run((1, 2), recorder.work)
    recorder.take()
    graphs.run(tuple(range(1, 3)), recorder.work)
    assert recorder.take() == [("main", "replays", 0)]


def test_graphs_of_a_memory_that_has_moved_are_dropped(recorder: Recorder) -> None:
    graphs = CudaGraphs(GPU)
    for memory in (0, 1):
        graphs.bind(memory, (memory, 10))
        graphs.run((memory, 7), recorder.work)
    graphs.bind(0, (0, 10))
    recorder.take()
    graphs.run((0, 7), recorder.work)
    assert recorder.take() == [("main", "replays", 0)]
    graphs.bind(0, (99, 10))
    assert recorder.alive == {1}
    graphs.run((1, 7), recorder.work)
    assert recorder.take() == [("main", "replays", 1)]
    graphs.run((0, 7), recorder.work)
    assert ("side 0", "captures into 2", "work") in recorder.take()


def test_all_are_captured_on_one_stream(recorder: Recorder) -> None:
    """torch gives memory that was freed on one stream to no other, one pool or not."""
    graphs = CudaGraphs(GPU)
    for key in "abc":
        graphs.run(key, recorder.work)
    captured = [stream for stream, what, _ in recorder.take() if what.startswith("captures")]
    assert captured == ["side 0"] * 3


@pytest.mark.parametrize(("world_size", "sessions"), [(1, 12), (8, 68)])
def test_every_session_keeps_its_graphs(recorder: Recorder, world_size: int, sessions: int) -> None:
    """As many sessions as 80 GiB hold of the released model: each has a graph for each KV length, captured once."""
    config = override(recipe("wan_1_3b_480p"), {"build.world_size": str(world_size)})
    plan = slots_from_config(config)
    lengths = {plan.valid_frames(first) * config.tokens_per_frame for first in history_lengths(config)}
    assert len(lengths) == 7
    graphs = CudaGraphs(GPU)
    keys = list(itertools.product(range(sessions), lengths))
    for _ in range(3):
        for key in keys:
            graphs.run(key, recorder.work)
    assert len(recorder.alive) == len(keys) == 7 * sessions
    done = [what for _, what, _ in recorder.take()]
    assert done.count("runs") == len(keys)
    assert done.count("replays") == 3 * len(keys)


def test_what_the_driver_takes_for_graphs_is_counted(recorder: Recorder) -> None:
    """Memory that torch's allocator takes meanwhile is its own: the pool that all graphs shard."""
    graphs = CudaGraphs(GPU)
    for memory in range(3):
        graphs.run((memory, 7), recorder.work)
    assert graphs.held_bytes == 3 * GRAPH_BYTES
    graphs.run((0, 7), recorder.work)
    assert graphs.held_bytes == 3 * GRAPH_BYTES


@pytest.mark.parametrize("fails_on", [1, 2], ids=["warm-up", "capture"])
def test_work_that_fails_leaves_no_graph(recorder: Recorder, fails_on: int) -> None:
    graphs, calls = CudaGraphs(GPU), itertools.count(1)

    def fail() -> None:
        if next(calls) == fails_on:
            raise RuntimeError("out of memory, say")
        recorder.work()

    with pytest.raises(RuntimeError, match="out of memory"):
        graphs.run("a", fail)
    assert not any(what == "replays" for _, what, _ in recorder.take())
    graphs.run("a", recorder.work)
    assert [what for _, what, _ in recorder.take()][-2:] == [f"captures into {fails_on - 1}", "replays"]


@pytest.mark.parametrize("ending", [None, "operation failed due to a previous error during capture"])
def test_a_capture_that_fails_says_how_to_do_without(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, ending: str | None
) -> None:
    """torch may end the capture with an error of its own, which hides the first; the first is what is told."""

    def fail() -> None:
        if recorder.capturing is not None:
            raise ValueError("stage 3 synchronises")

    right = torch.cuda.graph

    @contextlib.contextmanager
    def ends_badly(*arguments: Any, **options: Any) -> Iterator[None]:
        try:
            with right(*arguments, **options):
                yield
        except ValueError:
            if ending is not None:
                raise RuntimeError(ending) from None
            raise

    monkeypatch.setattr(torch.cuda, "graph", ends_badly)
    with pytest.raises(
        ExecutorError, match=r"\(ValueError: stage 3 synchronises\).*`--cuda-graphs off`.*cuda_graphs=False"
    ):
        CudaGraphs(GPU).run("a", fail)


def test_an_interrupt_of_a_capture_stays_one(recorder: Recorder) -> None:
    def interrupted() -> None:
        if recorder.capturing is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaGraphs(GPU).run("a", interrupted)


@pytest.mark.parametrize(("device", "enabled"), [(torch.device("cpu"), True), (GPU, False)])
def test_without_graphs_work_is_run_each_time(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, enabled: bool
) -> None:
    def refuse(*args: object, **kwargs: object) -> Callable[[], None]:
        raise AssertionError("no stream and no graph is wanted here")

    for name in ("Stream", "CUDAGraph", "graph", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    graphs, count = CudaGraphs(device, enabled=enabled), itertools.count()
    assert not graphs.enabled
    for _ in range(3):
        graphs.run("a", lambda: next(count))
    assert next(count) == 3
