"""The TensorRT executor up to TensorRT itself, which needs a GPU: a stand-in with TensorRT's rules runs the graphs.

What is left to a GPU: TensorRT's own kernels, CUDA graphs and streams, NCCL.
"""

import dataclasses
import functools
import gc
import inspect
import logging
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx.compose
import pytest
import torch
from support import GOLDEN, tensorrt_stand_in
from support.rank_threads import ThreadCollectives, run_ranks
from support.stand_in_bundles import CAPABILITY, STAND_INS, TARGET, build_stand_in
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalrt.engines import tensorrt, tensorrt_flavour
from causalrt.engines.base import SessionView
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.make import make_executor
from causalrt.engines.tensorrt import TensorRTExecutor
from causalrt.engines.tensorrt_engine import EngineLoader, LoadedEngine
from causalrt.errors import ExecutorError
from causalrt.proof.compare import largest_errors
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.recording import Recording, open_recording
from causalrt.proof.rollouts import Outputs
from causalrt.runtime.collectives import CAPSULE_NAME, LocalCollectives, capsule
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.noise import RecordedNoise, SeededNoise
from causalrt.runtime.requests import checked_initial_latents
from causalrt.runtime.rollout import Rollout
from causalrt.runtime.session_buffers import SessionBufferPool, SessionBuffers
from causalrt.runtime.warm_up import warm_up

FLAVOUR_OF_CASE = {"B": "tensorrt_rtx", "D": "tensorrt", "J": "tensorrt_rtx", "J2": "tensorrt", "R": "tensorrt_rtx"}
CPU = torch.device("cpu")
LOWERINGS = ("engine", "runtime")

Replays = Callable[..., tuple[Recording, Bundle]]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of the target is here, as far as anyone asks; the executor's tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> Replays:
    """`replays(case, world_size, collectives, fused=False)`: a recording and its bundle, built once."""
    made: dict[tuple[str, int, str, bool], tuple[Recording, Bundle]] = {}
    first: dict[str, Path] = {}

    def replay(case: str, world_size: int, collectives: str, *, fused: bool = False) -> tuple[Recording, Bundle]:
        key = case, world_size, collectives, fused
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            recording = open_recording(GOLDEN / f"{case}.safetensors", world_size=world_size)
            bundle = build_stand_in(
                recording.config,
                checkpoint=recording.write_checkpoint(folder / "checkpoint.safetensors"),
                out=folder / "bundle",
                collectives=collectives,  # type: ignore[arg-type]
                flavour="tensorrt" if fused else FLAVOUR_OF_CASE[case],
                fused=fused,
                small_graphs=first.get(case),
            )
            first.setdefault(case, bundle)
            made[key] = recording, open_bundle(bundle)
        return made[key]

    return replay


def make(bundle: Bundle, collectives: Any) -> TensorRTExecutor:
    (name,) = bundle.engines
    return TensorRTExecutor(STAND_INS[name], bundle, collectives, device=CPU)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels of the stand-in do not go into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "causalrt" / "kernels"


POOLS: weakref.WeakKeyDictionary[TensorRTExecutor, SessionBufferPool] = weakref.WeakKeyDictionary()
"""Of each executor, as a rank keeps them."""


def open_session(
    executor: TensorRTExecutor, collectives: Any, bundle: Bundle, *, text: torch.Tensor, noise: Any
) -> Rollout:
    model = bundle.config.model
    padded = torch.zeros(model.text_len, model.text_dim)
    padded[: len(text)] = text
    buffers = POOLS.setdefault(executor, SessionBufferPool(executor, bundle.config, bundle.layout)).take()
    return Rollout(executor, collectives, bundle.config, bundle.layout, text=padded, noise=noise, buffers=buffers)


def play(session: Rollout, index: int) -> dict[str, torch.Tensor]:
    """Generate a chunk; on rank 0, what each forward computed, under a recording's names."""
    latents: list[torch.Tensor] = []
    _, records = session.chunk(index, context_pass=True, record=True, deliver=lambda rows, times: latents.append(rows))
    outputs = {f"out.c{index}": rows for rows in latents}
    for k, record in enumerate(records):
        name = f"out.c{index}.ctx" if record.x0 is None else f"out.c{index}.s{k}"
        outputs[f"{name}.flow"] = record.flow
        if record.x0 is not None:
            outputs[f"{name}.x0"] = record.x0
    return outputs


# Numbers


@pytest.mark.parametrize(
    ("case", "world_size", "fused", "collectives"),
    [
        ("B", 8, False, "engine"),
        ("B", 8, False, "runtime"),
        ("D", 8, False, "runtime"),
        ("J", 1, False, "engine"),
        ("J", 2, True, "engine"),
        ("J2", 8, False, "runtime"),
        ("R", 1, False, "runtime"),
        ("R", 2, True, "engine"),
        *(
            pytest.param(*rollout, marks=pytest.mark.slow)
            for rollout in (
                ("B", 1, True, "runtime"),
                ("B", 2, False, "engine"),
                ("B", 8, True, "runtime"),
                ("D", 8, True, "engine"),
                ("J", 8, False, "engine"),
                ("J2", 8, False, "engine"),
                ("R", 2, True, "runtime"),
                ("R", 8, False, "engine"),
            )
        ),
    ],
)
def test_rollout_is_the_recorded_one(
    replays: Replays, case: str, world_size: int, fused: bool, collectives: str
) -> None:
    """B: 12 heads, so that 8 ranks cut some. D: one frame a chunk, padded ranks. R: a sink and a ring that goes round.

    J, J2: a first chunk of one frame, generated and given.
    """
    recording, bundle = replays(case, world_size, collectives, fused=fused)
    steps = len(bundle.config.sampler.steps)
    exchanges = 2 * bundle.config.model.num_layers if world_size > 1 else 0

    def replay(ranks: ThreadCollectives) -> Outputs:
        executor, outputs = make(bundle, ranks), {}
        assert executor.whole_slots == (fused or collectives == "engine")
        for element in range(recording.batch_size):
            text, noise = recording.prompt(element), RecordedNoise(recording.noise(element))
            session = open_session(executor, ranks, bundle, text=text, noise=noise)
            for index, rows in enumerate(checked_initial_latents(bundle.config, recording.given(element))):
                for record in session.take_initial(rows, record=True):
                    outputs[f"element {element} out.g{index}.ctx.flow"] = record.flow
                ranks.take_traffic()
            for index in range(recording.num_chunks):
                outputs |= {f"element {element} {name}": tensor for name, tensor in play(session, index).items()}
                if (
                    collectives == "runtime"
                ):  # what the context pass added; the denoising steps' was taken by the rollout
                    assert ranks.take_traffic().all_to_all_calls == exchanges
        forwards = recording.batch_size * (recording.num_given + recording.num_chunks * (steps + 1))
        engines = len(bundle.steps)
        assert ranks.nccl.joined == (engines if collectives == "engine" and world_size > 1 else 0)
        assert ranks.nccl.exchanges == (forwards * exchanges if collectives == "engine" else 0)
        return outputs

    outputs = run_ranks(world_size, replay)[0]
    for name, error in largest_errors(outputs, recording.outputs()).items():
        assert error.error <= TOLERANCE, f"{name}: {error.error:.2e} at {error.name}"


@pytest.mark.parametrize("collectives", LOWERINGS)
def test_sessions_keep_apart(replays: Replays, collectives: str) -> None:
    """One after another, and taking turns by chunk, on one executor: equal to the last bit."""
    _, bundle = replays("R", 2, collectives)
    model, chunks = bundle.config.model, range(4)

    def run(ranks: ThreadCollectives) -> None:
        executor = make(bundle, ranks)

        def begin(seed: int) -> Rollout:
            text = torch.randn(5, model.text_dim, generator=torch.Generator().manual_seed(seed))
            return open_session(executor, ranks, bundle, text=text, noise=SeededNoise(seed))

        def equal(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
            return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a)

        alone = []
        for seed in (1, 2):
            session = begin(seed)
            alone.append([play(session, index) for index in chunks])
        sessions = begin(1), begin(2)
        turns = [[play(session, index) for session in sessions] for index in chunks]
        if ranks.rank == 0:
            assert not equal(*alone)
            assert equal(alone[0], [turn[0] for turn in turns])
            assert equal(alone[1], [turn[1] for turn in turns])

    run_ranks(2, run)


# Memory


class Allocations(TorchDispatchMode):
    """Ops that make new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given for x in tree_leaves(made)):
            self.found.append(str(func))
        return made


def addresses(executor: TensorRTExecutor) -> list[dict[str, int]]:
    """Of every tensor of every engine, as TensorRT has them."""
    return [
        {name: engine._context.get_tensor_address(name) for name in engine.names} for engine in executor._set.engines
    ]


def all_slots(slots: KVSlots) -> list[torch.Tensor]:
    return [tensor for layer in slots._pairs for pair in layer for tensor in pair]


@pytest.mark.parametrize("collectives", LOWERINGS)
def test_a_step_allocates_nothing_and_writes_staging_alone(replays: Replays, collectives: str) -> None:
    _, bundle = replays("R", 2, collectives)
    config = bundle.config
    staged, first_frame = config.tokens_per_chunk, 2 * config.video.chunk_frames

    def run(ranks: ThreadCollectives) -> None:
        executor = make(bundle, ranks)
        session = open_session(
            executor, ranks, bundle, text=torch.randn(3, config.model.text_dim), noise=SeededNoise(0)
        )
        for index in range(2):
            play(session, index)
        slots, prompt = session.slots, session.buffers.prompt
        executor.bind(session.buffers.view(first_frame))
        bound, before = addresses(executor), [tensor.clone() for tensor in all_slots(slots)]
        before_prompt = {name: tensor.clone() for name, tensor in prompt.items()}
        x = torch.randn(bundle.layout.local_tokens, config.model.patch_features)
        flows, written = [], []
        for k in (0, 1):
            with Allocations() as allocations:
                flow = executor.step(x, session._times[k], first_frame)
            assert allocations.found == []
            assert addresses(executor) == bound
            flows.append((flow.data_ptr(), flow.clone()))
            written.append([tensor.clone() for tensor in all_slots(slots)])
        assert flows[0][0] == flows[1][0]
        assert not torch.equal(flows[0][1], flows[1][1])
        for old, once, twice in zip(before, *written, strict=True):
            for new in (once, twice):
                assert torch.equal(new[..., staged:, :], old[..., staged:, :])
            rows = [tensor[..., :staged, :] for tensor in (old, once, twice)]
            assert not torch.equal(rows[0], rows[1])
            assert not torch.equal(rows[1], rows[2])
        assert all(torch.equal(before_prompt[name], tensor) for name, tensor in prompt.items())
        ours = {tensor.data_ptr() for tensor in all_slots(slots)}
        for engine, at in zip(executor._set.engines, bound, strict=True):
            for name in engine.names:
                if re.match(r"[kv]\.", name):
                    assert at[name] in ours, name

    run_ranks(2, run)


def test_unfilled_rows_are_not_attended_to(replays: Replays) -> None:
    """Slots that are bound whole hold rows that no chunk has filled yet; they start finite, and weigh nothing."""
    _, bundle = replays("R", 1, "engine")
    executor, collectives = make(bundle, LocalCollectives()), LocalCollectives()
    text, flows = torch.randn(3, bundle.config.model.text_dim), []
    for filling in (0.0, 1e4):
        session = open_session(executor, collectives, bundle, text=text, noise=SeededNoise(0))
        for tensor in all_slots(session.slots):
            assert bool(torch.isfinite(tensor).all())
            tensor[..., bundle.config.tokens_per_chunk :, :] = filling
        flows.append(play(session, 0))
    assert all(torch.equal(flows[0][name], flows[1][name]) for name in flows[0])


def session_view(bundle: Bundle, executor: TensorRTExecutor, *, history_frames: int = 0) -> SessionView:
    """Buffers with an empty prompt."""
    slots = KVSlots(bundle.config, bundle.layout, torch.float32, whole_slots=executor.whole_slots)
    buffers = SessionBuffers(0, slots)
    buffers.begin(executor.encode_prompt(torch.zeros(bundle.config.model.text_len, bundle.config.model.text_dim)))
    return buffers.view(history_frames)


@pytest.mark.parametrize("collectives", LOWERINGS)
def test_what_is_bound_lives_as_long_as_it_is_bound(replays: Replays, collectives: str) -> None:
    """Engines hold addresses, and so do CUDA graphs; the caller may drop its tensors."""
    _, bundle = replays("R", 1, collectives)
    executor = make(bundle, LocalCollectives())

    def bind() -> list[weakref.ref[torch.Tensor]]:
        view = session_view(bundle, executor)
        executor.bind(view)
        return [weakref.ref(tensor) for tensor in view.tensors().values()]

    first = bind()
    gc.collect()
    assert all(tensor() is not None for tensor in first)
    second = bind()
    gc.collect()
    assert all(tensor() is None for tensor in first)
    assert all(tensor() is not None for tensor in second)


def test_kernels_are_kept_once_everything_has_run(replays: Replays, own_cache: Path) -> None:
    """Those of `tensorrt_rtx`, which finishes engines where they run; written anew only if there are new ones."""
    for collectives, files in (("engine", 1), ("runtime", 1)):
        _, bundle = replays("R", 1, collectives)
        executor = make(bundle, LocalCollectives())
        memories = SessionBufferPool(executor, bundle.config, bundle.layout)
        warm_up(executor, LocalCollectives(), bundle.config, bundle.layout, memories)
        (kept,) = own_cache.iterdir()
        assert kept.read_bytes() == b"kernels"
        assert len(list(own_cache.iterdir())) == files
    before = kept.stat().st_mtime_ns
    executor.warmed_up()
    assert kept.stat().st_mtime_ns == before


class KeptKeys:
    """In the place of `CudaGraphs`: the keys under which a graph would be captured or replayed."""

    enabled = True

    def __init__(self) -> None:
        self.keys: list[tuple[int, ...]] = []
        self.addresses: dict[int, set[tuple[int, ...]]] = {}

    def bind(self, buffers_id: int, addresses: tuple[int, ...]) -> None:
        self.addresses.setdefault(buffers_id, set()).add(addresses)

    def run(self, key: tuple[int, ...], work: Callable[[], None]) -> None:
        self.keys.append(key)
        work()


def test_rank_0_alone_writes_the_kernels_that_all_ranks_read(
    replays: Replays, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bundle = replays("R", 2, "engine")
    writers: list[EngineLoader] = []
    keep_kernels = EngineLoader.keep_kernels

    def noted(loader: EngineLoader) -> None:
        writers.append(loader)
        keep_kernels(loader)

    monkeypatch.setattr(EngineLoader, "keep_kernels", noted)

    def start(ranks: ThreadCollectives) -> tuple[EngineLoader, bytes]:
        executor = make(bundle, ranks)
        read = executor._engines._kept
        warm_up(
            executor, ranks, bundle.config, bundle.layout, SessionBufferPool(executor, bundle.config, bundle.layout)
        )
        return executor._engines, read

    for kernels in (b"", b"kernels"):
        (loader_0, read_0), (_, read_1) = run_ranks(2, start)
        assert (read_0, read_1) == (kernels, kernels)
        assert writers == [loader_0]
        writers.clear()
    assert len(list(own_cache.iterdir())) == 1


def test_contexts_do_not_annotate_their_layers(replays: Replays) -> None:
    _, bundle = replays("R", 1, "runtime")
    executor = make(bundle, LocalCollectives())
    engines = executor._engines._loaded
    verbosities = {context.nvtx_verbosity for engine in engines for context in engine._contexts}
    assert verbosities == {tensorrt_stand_in.ProfilingVerbosity.NONE}


def test_engines_are_asked_whether_a_graph_can_capture_them(replays: Replays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each context; the error names the engine that cannot, and how to run without graphs."""
    _, bundle = replays("R", 1, "runtime")
    asked: list[tensorrt_stand_in.IExecutionContext] = []
    answer = tensorrt_stand_in.IExecutionContext.is_stream_capturable

    def is_stream_capturable(context: tensorrt_stand_in.IExecutionContext, stream: int) -> bool:
        asked.append(context)
        return answer(context, stream) and context._engine is not executor._set.engines[1]._engine

    def chunk() -> None:
        text = torch.zeros(2, bundle.config.model.text_dim)
        play(open_session(executor, LocalCollectives(), bundle, text=text, noise=SeededNoise(0)), 0)

    monkeypatch.setattr(tensorrt_stand_in.IExecutionContext, "is_stream_capturable", is_stream_capturable)
    executor = make(bundle, LocalCollectives())
    chunk()
    assert not asked, "nothing is captured on a CPU"
    executor._graphs = KeptKeys()  # type: ignore[assignment]
    with pytest.raises(ExecutorError) as caught:
        chunk()
    for words in (
        f"no CUDA graph can capture tensorrt_rtx-{TARGET}-cut-step-001.engine; ",
        "`--cuda-graphs off` on the command line, `cuda_graphs=False` in `causalrt.load`",
    ):
        assert words in str(caught.value)
    assert len(asked) == 2
    monkeypatch.setattr(tensorrt_stand_in.IExecutionContext, "is_stream_capturable", answer)
    chunk()


def test_data_centre_tensorrt_is_not_asked(replays: Replays, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no such question."""
    monkeypatch.delattr(tensorrt_stand_in.IExecutionContext, "is_stream_capturable")
    _, bundle = replays("D", 1, "engine")
    executor = make(bundle, LocalCollectives())
    executor._graphs = graphs = KeptKeys()  # type: ignore[assignment]
    text = torch.zeros(2, bundle.config.model.text_dim)
    play(open_session(executor, LocalCollectives(), bundle, text=text, noise=SeededNoise(0)), 0)
    assert graphs.keys


@pytest.mark.parametrize("collectives", LOWERINGS)
def test_graphs_are_kept_by_session_and_kv_length(replays: Replays, collectives: str) -> None:
    """In the engine, one graph serves every chunk of a session; segments have one for each number of filled rows."""
    _, bundle = replays("R", 1, collectives)
    executor = make(bundle, LocalCollectives())
    graphs = executor._graphs = KeptKeys()  # type: ignore[assignment]
    sessions = [
        open_session(
            executor,
            LocalCollectives(),
            bundle,
            text=torch.zeros(2, bundle.config.model.text_dim),
            noise=SeededNoise(seed),
        )
        for seed in (0, 1)
    ]
    steps = len(bundle.config.sampler.steps) + 1
    by_chunk = []
    for index in range(5):
        for session in sessions:
            play(session, index)
            (key,) = set(graphs.keys[-steps:])
            by_chunk.append(key)
    of_one, of_other = by_chunk[::2], by_chunk[1::2]
    assert not set(of_one) & set(of_other)
    lengths = [sessions[0].slots.filled_rows(3 * index) for index in range(5)]
    assert len(set(lengths)) == 3, "the ring must go round"
    for of_session in (of_one, of_other):
        for i in range(5):
            for j in range(5):
                assert (of_session[i] == of_session[j]) == (collectives == "engine" or lengths[i] == lengths[j])
    # Keys are numbers that every rank gives alike; a number means one set of addresses.
    assert {key[0] for key in of_one} == {0}
    assert {key[0] for key in of_other} == {1}
    assert all(len(addresses) == 1 for addresses in graphs.addresses.values())


@pytest.mark.parametrize("collectives", LOWERINGS)
def test_each_kind_of_step_has_graphs_of_its_own(replays: Replays, collectives: str) -> None:
    """Two sessions take turns, one at its first chunk of one frame while the other is not; the memory stays where it is."""
    _, bundle = replays("J", 1, collectives)
    executor = make(bundle, LocalCollectives())
    graphs = executor._graphs = KeptKeys()  # type: ignore[assignment]
    text = torch.zeros(2, bundle.config.model.text_dim)
    one, other = (
        open_session(executor, LocalCollectives(), bundle, text=text, noise=SeededNoise(seed)) for seed in (0, 1)
    )
    by_chunk = []
    for session, index in ((one, 0), (one, 1), (other, 0), (one, 2), (other, 1)):
        graphs.keys.clear()
        play(session, index)
        (key,) = set(graphs.keys)
        by_chunk.append(key)
    first, second, other_first, third, other_second = by_chunk
    assert len({first, second, other_first, other_second}) == 4
    assert (second == third) == (collectives == "engine")
    assert all(len(addresses) == 1 for addresses in graphs.addresses.values())


@pytest.mark.parametrize("collectives", LOWERINGS)
def test_a_flush_after_a_first_chunk_of_one_frame(replays: Replays, collectives: str) -> None:
    """History is whole chunks then, and no longer one frame more; the warm-up has met each length of it."""
    _, bundle = replays("J", 1, collectives)
    executor = make(bundle, LocalCollectives())
    graphs = executor._graphs = KeptKeys()  # type: ignore[assignment]
    memories = SessionBufferPool(executor, bundle.config, bundle.layout)
    warm_up(executor, LocalCollectives(), bundle.config, bundle.layout, memories)
    warmed = {key[1:] for key in graphs.keys}
    text = torch.zeros(bundle.config.model.text_len, bundle.config.model.text_dim)
    for switch, frames in ((None, [1, 4, 7]), (1, [1, 3, 6]), (2, [1, 4, 3])):
        session = open_session(executor, LocalCollectives(), bundle, text=text, noise=SeededNoise(0))
        attended = []
        for index in range(3):
            if index == switch:
                session.switch_prompt(text, "flush")
            latents: list[torch.Tensor] = []
            keep = functools.partial(lambda kept, rows, times: kept.append(rows), latents)
            times, _ = session.chunk(index, context_pass=True, record=False, deliver=keep)
            attended.append(times.kv_frames)
            assert bool(torch.isfinite(latents[0]).all())
        assert attended == frames
    assert {key[1:] for key in graphs.keys} <= warmed


# What TensorRT refuses


@pytest.fixture
def whole(replays: Replays) -> Bundle:
    return replays("R", 1, "engine")[1]


@pytest.fixture
def cut(replays: Replays) -> Bundle:
    return replays("R", 1, "runtime")[1]


@dataclasses.dataclass
class Bound:
    """An executor, and what it takes to step."""

    executor: TensorRTExecutor
    view: SessionView

    def bind(self, **changes: Any) -> None:
        self.executor.bind(dataclasses.replace(self.view, **changes))

    def step(self) -> None:
        layout = self.executor._set.buffers["x"].shape
        self.executor.step(torch.zeros(layout), self.executor.embed_time(1000.0), 0)


def ready(bundle: Bundle, *, history_frames: int = 0) -> Bound:
    executor = make(bundle, LocalCollectives())
    return Bound(executor, session_view(bundle, executor, history_frames=history_frames))


def test_step_before_bind(whole: Bundle, cut: Bundle) -> None:
    for bundle in (whole, cut):
        with pytest.raises(
            ExecutorError, match=r"step.*\.engine failed: .*enqueueV3.*is not set for input tensor \w+\."
        ):
            ready(bundle).step()


def test_kv_rows_without_a_profile(cut: Bundle) -> None:
    bound = ready(cut)
    with pytest.raises(ExecutorError, match=r"cut-step-001\.engine has profiles for \[24, 48, 72\] KV rows, not for 7"):
        bound.bind(kv_rows=7)


def test_slots_of_another_length_than_said(cut: Bundle) -> None:
    bound = ready(cut, history_frames=3)
    with pytest.raises(
        ExecutorError,
        match=r"shape \[1, 48, 96\] of [kv]\.0\.0\.written was refused: .*does not satisfy any optimization profiles.*24",
    ):
        bound.bind(kv_rows=24)


def test_tensors_of_another_size_than_the_engine_reads(whole: Bundle) -> None:
    """TensorRT would read past their ends: it has no size to check."""
    bound, model = ready(whole), whole.config.model
    with pytest.raises(
        ExecutorError, match=rf"prompt\.engine: text is \[{model.text_len}, {model.text_dim}\], got \[5, "
    ):
        bound.executor.encode_prompt(torch.zeros(5, model.text_dim))
    short = [[(k[:, :, :24].contiguous(), v) for k, v in layer] for layer in bound.view.kv]
    with pytest.raises(ExecutorError, match=r"k\.0\.0 is \[1, 6, 72, 16\], got \[1, 6, 24, 16\]"):
        bound.bind(kv=short)


def test_scratch_memory_that_is_missing_or_too_small(whole: Bundle) -> None:
    loader = EngineLoader(STAND_INS["tensorrt_rtx"], CPU)
    engine = loader.load(whole.path / f"tensorrt_rtx-{TARGET}-time.engine")
    inputs = {"sinusoid": torch.zeros(whole.config.model.freq_dim)}
    with pytest.raises(ExecutorError, match=r"time\.engine failed: .*Device memory of \d+ bytes is needed, 0 were set"):
        engine.run_alone(inputs)
    engine.set_scratch(torch.empty(1, dtype=torch.uint8))
    with pytest.raises(ExecutorError, match="bytes is needed, 1 were set"):
        engine.run_alone(inputs)
    loader.share_scratch()
    assert set(engine.run_alone(inputs)) == {"e", "e0"}


def test_scratch_memory_is_one_and_large_enough_for_all(replays: Replays) -> None:
    _, bundle = replays("B", 8, "engine")

    def run(ranks: ThreadCollectives) -> None:
        executor = make(bundle, ranks)
        loaded = executor._engines._loaded
        assert len(loaded) == 3
        scratch = executor._engines._scratch
        assert scratch is not None
        assert scratch.numel() == max(engine.scratch_bytes for engine in loaded) > 2**16
        assert {context._scratch for engine in loaded for context in engine._contexts} == {
            (scratch.data_ptr(), scratch.numel())
        }

    run_ranks(8, run)


def test_updated_slots_in_memory_of_their_own(whole: Bundle) -> None:
    bound = ready(whole)
    bound.bind()
    (engine,) = bound.executor._set.engines
    slots = bound.view.kv[0][0][0]
    elsewhere = torch.empty_like(slots)
    with pytest.raises(
        ExecutorError, match=r"k\.0\.0\.written updates k\.0\.0 in place and was given memory of its own"
    ):
        engine.bind({"k.0.0": slots, "k.0.0.written": elsewhere})
    engine._context.set_tensor_address("k.0.0.written", elsewhere.data_ptr())
    with pytest.raises(ExecutorError, match=r"failed: .*Output k\.0\.0\.written aliases input k\.0\.0"):
        bound.step()
    engine._aliases.clear()
    with pytest.raises(ExecutorError, match=r"k\.0\.0\.written is not updated in place; build the bundle again"):
        bound.bind()


def test_address_that_is_no_tensors_start(whole: Bundle) -> None:
    model = whole.config.model
    inside = torch.zeros(model.text_len * model.text_dim + 1)[1:].view(model.text_len, model.text_dim)
    with pytest.raises(ExecutorError, match=r"prompt\.engine: address of text was refused: .*is not aligned"):
        ready(whole).executor.encode_prompt(inside)


def test_memory_that_torch_must_not_hand_over(whole: Bundle) -> None:
    bound = ready(whole)
    transposed = [[(k.transpose(1, 2).contiguous().transpose(1, 2), v) for k, v in layer] for layer in bound.view.kv]
    with pytest.raises(AssertionError, match=r"k\.0\.0"):
        bound.bind(kv=transposed)
    wide = {**bound.view.prompt, "cross_k.0": bound.view.prompt["cross_k.0"].double()}
    with pytest.raises(AssertionError, match=r"cross_k\.0"):
        bound.bind(prompt=wide)


def test_communicator_missing_or_refused(replays: Replays, monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle = replays("R", 2, "engine")

    def of_another_kind(ranks: ThreadCollectives) -> None:
        ranks.communicator = lambda: capsule(0x40, CAPSULE_NAME)  # type: ignore[method-assign]
        make(bundle, ranks)

    with pytest.raises(ExecutorError, match=r"whole-step\.engine refused the NCCL communicator: .*is no ncclComm_t"):
        run_ranks(2, of_another_kind)

    def named_otherwise(ranks: ThreadCollectives) -> None:
        made = capsule(ranks._handle, b"cudaStream_t")
        ranks.communicator = lambda: made  # type: ignore[method-assign]
        make(bundle, ranks)

    with pytest.raises(ExecutorError, match="is no ncclComm_t"):
        run_ranks(2, named_otherwise)
    with pytest.raises(ExecutorError, match="communicator is of 3 ranks"):
        run_ranks(3, lambda ranks: make(bundle, ranks))

    monkeypatch.setattr(LoadedEngine, "set_communicator", lambda self, communicator: None)

    def step(ranks: ThreadCollectives) -> None:
        executor = make(bundle, ranks)
        session = open_session(
            executor, ranks, bundle, text=torch.zeros(2, bundle.config.model.text_dim), noise=SeededNoise(0)
        )
        play(session, 0)

    with pytest.raises(ExecutorError, match="has collectives and no communicator is set"):
        run_ranks(2, step)


def test_another_nccl_is_noticed_before_it_is_given_a_communicator(
    replays: Replays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT would open the first library of that name, which is not torch's here."""
    _, bundle = replays("R", 2, "engine")
    mapped = ["/torch/libnccl.so.2"]

    def load(name: str) -> None:
        mapped.append(f"/usr/lib/{name}")

    def maps() -> str:
        return "".join(f"7f00-7f01 r-xp 00000000 fe:00 1 {path}\n" for path in mapped)

    monkeypatch.setattr(tensorrt, "MAPS", SimpleNamespace(read_text=maps))
    monkeypatch.setattr("ctypes.CDLL", load)
    given = []
    monkeypatch.setattr(LoadedEngine, "set_communicator", lambda engine, communicator: given.append(engine))
    with pytest.raises(
        ExecutorError, match=r"each loaded an NCCL \(/torch/libnccl\.so\.2, /usr/lib/libnccl\.so\.2\); put"
    ):
        run_ranks(2, lambda ranks: make(bundle, ranks))
    assert not given


def test_contexts_that_are_refused(cut: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_context(engine: Any, config: Any) -> None:
        engine._logger.log(tensorrt_stand_in.ILogger.ERROR, "out of memory, say")

    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_stand_in.ICudaEngine, "create_execution_context", no_context)
        with pytest.raises(ExecutorError, match=r"prompt\.engine: no execution context: out of memory, say"):
            make(cut, LocalCollectives())

    def no_profile(context: Any, profile_index: int, stream_handle: int) -> bool:
        return bool(context._refuse("setOptimizationProfileAsync", "not now"))

    monkeypatch.setattr(tensorrt_stand_in.IExecutionContext, "set_optimization_profile_async", no_profile)
    with pytest.raises(ExecutorError, match=r"cut-step-001\.engine: no optimisation profile 1: .*not now"):
        make(cut, LocalCollectives())


def test_messages_are_logged(whole: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "causalrt.engines.tensorrt"), pytest.raises(ExecutorError):
        ready(whole).step()
    assert "API Usage Error" in caplog.text


# Engines that cannot be opened


@pytest.mark.parametrize(
    ("capability", "said"),
    [
        (
            (8, 9),
            r"has tensorrt_rtx engines for sm80, and this GPU is sm89; .*`--executor tensorrt_rtx --target sm89`$",
        ),
        ((9, 0), r"this GPU is sm90; build it again .*--target sm90`, which tensorrt_rtx cannot: use tensorrt$"),
    ],
)
def test_another_gpu(whole: Bundle, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], said: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(ExecutorError, match=said):
        make(whole, LocalCollectives())


@pytest.fixture
def damaged(whole: Bundle, tmp_path: Path) -> tuple[Bundle, Path]:
    """A copy of a bundle whose hashes are not looked at, and its time engine."""
    copy = Path(shutil.copytree(whole.path, tmp_path / "copy"))
    return dataclasses.replace(whole, path=copy), copy / f"tensorrt_rtx-{TARGET}-time.engine"


@pytest.mark.parametrize(
    ("settings", "rtx", "other"),
    [
        ({"version": "9.9.9"}, "invalid engine: VERSION_MISMATCH", "built with version 9.9.9, this is 0.0.0"),
        ({"target": "sm120"}, "invalid engine: UNSUPPORTED_CC", "built for sm120, this GPU is sm80"),
    ],
)
def test_engine_of_another_version_or_gpu(
    damaged: tuple[Bundle, Path], settings: dict[str, str], rtx: str, other: str
) -> None:
    bundle, file = damaged
    tensorrt_stand_in.write_engine(bundle.path / "time.onnx", file, **{"profiles": (), "target": TARGET, **settings})
    with pytest.raises(ExecutorError) as caught:
        make(bundle, LocalCollectives())
    advice = "build the bundle again with this version, for this GPU (sm80)"
    for words in (f"tensorrt_rtx 0.0.0 cannot open {file.name} here: {rtx}", advice):
        assert words in str(caught.value)
    loader = EngineLoader(STAND_INS["tensorrt"], CPU)
    with pytest.raises(ExecutorError) as caught:
        loader.load(file)
    for words in (f"tensorrt 0.0.0 cannot open {file.name} here: IRuntime::deserializeCudaEngine", other, advice):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-100], "plan.header.size == blobSize failed"),
        (lambda data: data[:150], "plan.header.size == blobSize failed"),
        (lambda data: b"\0" * len(data), "invalid engine: MALFORMED_ENGINE"),
    ],
)
def test_truncated_or_foreign_engine(damaged: tuple[Bundle, Path], damage: Callable[[bytes], bytes], said: str) -> None:
    bundle, file = damaged
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ExecutorError) as caught:
        make(bundle, LocalCollectives())
    for words in (f"cannot open {file.name} here: ", said, "build the bundle again"):
        assert words in str(caught.value)


def test_engines_that_are_suboptimal_here_run_with_a_warning(
    replays: Replays, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning, however many engines there are."""
    trt = tensorrt_stand_in
    validity = trt.EngineValidity.SUBOPTIMAL, trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC.value
    monkeypatch.setattr(trt.Runtime, "get_engine_validity", lambda runtime, buffer: validity)
    _, bundle = replays("R", 1, "runtime")
    make(bundle, LocalCollectives())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for words in ("suboptimal for this GPU (UNSUPPORTED_CC)", "may be slower", f"`--target {TARGET}`"):
        assert words in warning


def test_made_by_name(whole: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tensorrt_flavour.FLAVOURS, "tensorrt_rtx", STAND_INS["tensorrt_rtx"])  # type: ignore[arg-type]
    executor = make_executor("tensorrt_rtx", whole, LocalCollectives(), num_threads=1, device=CPU, fused_ops=False)
    assert isinstance(executor, TensorRTExecutor)
    told = executor._set.engines[0].information()
    assert told["scratch_bytes"] > 0
    assert told["Layers"].count("TensorScatter") == 2 * whole.config.model.num_layers * len(whole.layout.shards)


def test_engines_with_names_of_their_own(damaged: tuple[Bundle, Path], replays: Replays) -> None:
    """A front end other than ONNX names tensors as it likes; the record says which is which."""
    bundle, _ = damaged
    flavour = bundle.engines["tensorrt_rtx"]
    record = flavour.targets[TARGET]
    names = {}
    for graph, engine in (("prompt", record.prompt), ("time", record.time), ("whole-step", *record.steps[0])):
        model = onnx.compose.add_prefix(onnx.load(bundle.path / f"{graph}.onnx"), "own/")
        renamed = bundle.path / "renamed.onnx"
        onnx.save(model, renamed)
        tensorrt_stand_in.write_engine(renamed, bundle.path / engine, profiles=(), target=TARGET)
        names[engine] = {v.name: v.name.removeprefix("own/") for v in (*model.graph.input, *model.graph.output)}
    flavour = dataclasses.replace(flavour, targets={TARGET: dataclasses.replace(record, names=names)})
    outputs = []
    for opened in (replays("R", 1, "engine")[1], dataclasses.replace(bundle, engines={"tensorrt_rtx": flavour})):
        executor, ranks = make(opened, LocalCollectives()), LocalCollectives()
        session = open_session(
            executor, ranks, opened, text=torch.ones(2, opened.config.model.text_dim), noise=SeededNoise(0)
        )
        outputs.append({name: tensor for index in range(2) for name, tensor in play(session, index).items()})
    assert executor._set.engines[0]._own["x"] == "own/x"
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


# The stand-in itself


def test_stand_in_has_only_what_tensorrt_has() -> None:
    """Class by class: members of an enumeration with their values, methods with their parameters, attributes."""
    real = pytest.importorskip("tensorrt_rtx", reason="the stand-in is compared with the module tensorrt_rtx")
    for name, made in tensorrt_stand_in.API.items():
        theirs = getattr(real, name)
        for member, value in getattr(made, "__members__", {}).items():
            assert getattr(theirs, member).value == value.value, f"{name}.{member}"
        if hasattr(made, "__members__"):
            continue
        public = [own for own in vars(made) if not own.startswith("_")]
        if name == "IRuntimeConfig":
            public += [own for own in vars(made()) if not own.startswith("_")]
        for own in public:
            assert hasattr(theirs, own), f"{name}.{own}"
            if inspect.isfunction(vars(made).get(own)):
                assert list(inspect.signature(vars(made)[own]).parameters) in parameters(getattr(theirs, own)), own


def parameters(bound: Any) -> list[list[str]]:
    """Of each overload of a function of a binding, from its documentation."""
    lines = [line for line in bound.__doc__.splitlines() if re.match(rf"\s*(\d+\. )?{bound.__name__}\(", line)]
    return [re.findall(r"(?:\(|, )(\w+): ", line) for line in lines]


def test_stand_in_refuses_what_the_executor_never_asks(cut: Bundle) -> None:
    trt = tensorrt_stand_in
    loader = EngineLoader(STAND_INS["tensorrt_rtx"], CPU)
    data = (cut.path / f"tensorrt_rtx-{TARGET}-cut-step-001.engine").read_bytes()
    engine = loader._runtime.deserialize_cuda_engine(data)
    first, second = (engine.create_execution_context(trt.IRuntimeConfig()) for _ in range(2))

    def refused(call: Callable[..., bool], *arguments: Any) -> str:
        loader.messages.clear()
        assert call(*arguments) is False
        (message,) = loader.messages
        return message

    assert "invalid tensor name" in refused(first.set_tensor_address, "nonesuch", 0)
    assert "invalid tensor name" in refused(first.set_input_shape, "nonesuch", (1,))
    assert "does not satisfy" in refused(first.set_input_shape, "e0", (1,))
    assert refused(second.execute_async_v3, 0).endswith("No optimization profile has been chosen.)")
    assert "No optimization profile" in refused(second.set_input_shape, "k.0.0.written", (1, 48, 96))
    assert "has been chosen by another" in refused(second.set_optimization_profile_async, 0, 0)
    assert "no optimization profile 3" in refused(second.set_optimization_profile_async, 3, 0)
    for name in engine._inputs:
        assert first.set_input_shape(name, tuple(engine.get_tensor_profile_shape(name, 0)[0]))
    assert "Address is not set" in refused(first.execute_async_v3, 0)
    assert first.set_optimization_profile_async(1, 0)
    assert re.search(r"shape of input tensor [kv]\.\S+ is not fully specified", refused(first.execute_async_v3, 0))
    assert second.set_optimization_profile_async(0, 0)
