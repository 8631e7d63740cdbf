"""In what order a rank does things within a chunk, on a CPU and on a GPU, and that no order changes what comes out.

There is no GPU: tensors stay on the CPU, and streams, events and pinned memory are doubles that write down what is done.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from causalrt.config import Config, override
from causalrt.engines.base import SessionView
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.export.build import build
from causalrt.export.random_weights import random_weights
from causalrt.layout import history_lengths
from causalrt.proof.ranks import ThreadCollectives, run_threads, thread_group
from causalrt.recipes import recipe
from causalrt.runtime import session_buffers
from causalrt.runtime.collectives import LocalCollectives, Traffic
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.noise import Noise, RecordedNoise, SeededNoise
from causalrt.runtime.rollout import ChunkTimes, Rollout
from causalrt.runtime.session_buffers import SessionBufferPool
from causalrt.runtime.warm_up import warm_up

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TWO_KINDS = {"video.horizon_frames": "13", "video.independent_first_frame": "true"}


class Log(list[str]):
    """What was done, in order; `waited` says how much of it a GPU has certainly finished."""

    waited = 0


class Logged:
    """An executor on `device`, whose work an eager one on the CPU does."""

    whole_slots = False

    def __init__(self, bundle: Bundle, device: torch.device, log: Log) -> None:
        self.device, self.log = device, log
        self.bound: list[tuple[int, int]] = []
        self._eager = EagerExecutor(bundle, LocalCollectives(), device=CPU)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._eager, name)

    def bind(self, view: SessionView) -> None:
        self.bound.append((view.kv_rows, view.step))
        self._eager.bind(view)

    def step(self, *args: Any) -> torch.Tensor:
        self.log.append("step")
        return self._eager.step(*args)

    def warmed_up(self) -> None:
        self.log.append("warmed up")


class LoggedNoise:
    """Writes down which draws are made."""

    def __init__(self, noise: Noise, log: Log) -> None:
        self._noise, self._log = noise, log

    def draw(self, chunk: int, draw: int, shape: tuple[int, int]) -> torch.Tensor:
        self._log.append(f"draw {chunk}.{draw}")
        drawn = self._noise.draw(chunk, draw, shape)
        assert drawn.shape == shape
        return drawn


class OtherRank(LocalCollectives):
    """Latents go to another rank."""

    def gather(self, rows: torch.Tensor) -> None:
        return None


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What is done from here on, with doubles of everything that a GPU would be needed for."""
    log = Log()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(log)

        def synchronize(self) -> None:
            log.waited = max(log.waited, self.at)
            log.append(f"wait for the {log[self.at - 1]}")

        def elapsed_time(self, end: "Event") -> float:
            assert max(self.at, end.at) <= log.waited, "times are not known yet"
            return float(end.at - self.at)

    class Stream:
        def synchronize(self) -> None:
            log.waited = len(log)
            log.append("wait for everything")

    to, commit = torch.Tensor.to, KVSlots.commit

    def logged_to(tensor: torch.Tensor, target: Any, *args: Any, **options: Any) -> torch.Tensor:
        if target == GPU:
            assert options == {"non_blocking": True}
            return tensor
        if target == "cpu":
            assert options["non_blocking"]
            log.append("copy")
        return to(tensor, target, *args, **options)

    def logged_commit(slots: KVSlots, *args: Any, **options: Any) -> None:
        log.append("commit")
        commit(slots, *args, **options)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "to", logged_to)
    monkeypatch.setattr(KVSlots, "commit", logged_commit)
    monkeypatch.setattr(
        session_buffers, "KVSlots", lambda *args, **options: KVSlots(*args, **{**options, "device": "cpu"})
    )
    return log


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, str]], Bundle]:
    """Bundles of `tiny`, each built once."""
    built: dict[Config, Bundle] = {}

    def bundle_of(changes: dict[str, str]) -> Bundle:
        config = override(recipe("tiny"), changes)
        if config not in built:
            folder: Path = tmp_path_factory.mktemp("bundle")
            weights = {f"model.{name}": tensor for name, tensor in random_weights(config.model, seed=0)}
            save_file(weights, folder / "checkpoint.safetensors")
            made = build(config, checkpoint=folder / "checkpoint.safetensors", out=folder / "out", executors=["eager"])
            built[config] = open_bundle(made)
        return built[config]

    return bundle_of


def text_of(config: Config, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(config.model.text_len, config.model.text_dim, generator=generator)


def begin(
    bundle: Bundle,
    device: torch.device,
    log: Log,
    *,
    noise: Noise | None = None,
    collectives: LocalCollectives | None = None,
) -> Rollout:
    config, executor = bundle.config, Logged(bundle, device, log)
    return Rollout(
        executor,
        collectives or LocalCollectives(),
        config,
        bundle.layout,
        text=text_of(config, 0),
        noise=LoggedNoise(noise or SeededNoise(5), log),  # type: ignore[arg-type]
        buffers=SessionBufferPool(executor, config, bundle.layout).take(),
    )


def play(rollout: Rollout, index: int, log: Log, **options: Any) -> list[torch.Tensor]:
    """Generate a chunk; its latents, and its forwards if they are recorded."""
    latents: list[torch.Tensor] = []

    def deliver(rows: torch.Tensor, times: ChunkTimes) -> None:
        log.append("deliver")
        assert len(times.denoise_ms) == 4
        latents.append(rows.clone())

    _, records = rollout.chunk(index, **{"context_pass": True, "record": False, **options}, deliver=deliver)
    return [*latents, *(record.flow for record in records)]


STEPS = ["step", "draw 1.1", "step", "draw 1.2", "step", "draw 1.3", "step"]


def second_chunk(rollout: Rollout, log: Log, **options: Any) -> list[str]:
    """What is done in it."""
    play(rollout, 0, log, draw_next=True)
    log.clear()
    log.waited = 0
    play(rollout, 1, log, **options)
    return list(log)


def test_a_gpu_refreshes_while_latents_are_delivered_and_noise_is_drawn(
    bundle_of: Callable[..., Bundle], log: Log
) -> None:
    """Everything is queued before the host waits, for the copy of the latents alone; then the context pass hides its work."""
    rollout = begin(bundle_of({}), GPU, log)
    assert second_chunk(rollout, log, draw_next=True) == [
        *STEPS,
        *("copy", "step", "commit"),
        *("wait for the copy", "deliver", "draw 2.0", "wait for everything"),
    ]


def test_a_cpu_delivers_before_it_refreshes(bundle_of: Callable[..., Bundle], log: Log) -> None:
    rollout = begin(bundle_of({}), CPU, log)
    assert second_chunk(rollout, log, draw_next=True) == [*STEPS, "copy", "deliver", "step", "commit", "draw 2.0"]


def test_the_last_chunk_draws_for_none(bundle_of: Callable[..., Bundle], log: Log) -> None:
    """On a GPU it waits for its latents, and has nothing more to wait for."""
    rollout = begin(bundle_of({}), GPU, log)
    assert second_chunk(rollout, log, context_pass=False) == [*STEPS, "copy", "wait for the copy", "deliver"]


def test_a_recorded_last_chunk_is_refreshed_and_draws_for_none(bundle_of: Callable[..., Bundle], log: Log) -> None:
    rollout = begin(bundle_of({}), GPU, log)
    done = second_chunk(rollout, log, record=True)
    assert [entry for entry in done if entry.startswith("draw")] == [f"draw 1.{draw}" for draw in (1, 2, 3)]
    assert done[-5:] == ["commit", "copy", "wait for the copy", "deliver", "wait for everything"]


def test_a_rank_without_latents_draws_and_waits_alike(bundle_of: Callable[..., Bundle], log: Log) -> None:
    rollout = begin(bundle_of({}), GPU, log, collectives=OtherRank())
    done = second_chunk(rollout, log, draw_next=True)
    assert done == [*STEPS, "step", "commit", "wait for the step", "draw 2.0", "wait for everything"]


SWITCHES: Sequence[Callable[[Rollout, Config], None]] = (
    lambda rollout, config: None,
    lambda rollout, config: rollout.switch_prompt(text_of(config, 1), "keep"),
    lambda rollout, config: rollout.switch_prompt(text_of(config, 1), "recache"),
    lambda rollout, config: rollout.switch_prompt(text_of(config, 1), "flush"),
)


@pytest.mark.parametrize("changes", [{}, TWO_KINDS], ids=["chunks alike", "first chunk of one frame"])
@pytest.mark.parametrize("switch", SWITCHES, ids=["no switch", "keep", "recache", "flush"])
@pytest.mark.parametrize("record", [False, True])
def test_drawing_ahead_changes_no_bit(
    bundle_of: Callable[..., Bundle],
    log: Log,
    changes: dict[str, str],
    switch: Callable[[Rollout, Config], None],
    record: bool,
) -> None:
    bundle, played = bundle_of(changes), []
    for device, ahead in ((CPU, False), (CPU, True), (GPU, True)):
        rollout = begin(bundle, device, log)
        rows = []
        for index in range(3):
            if index == 2:
                switch(rollout, bundle.config)
            rows += play(rollout, index, log, record=record, draw_next=ahead and index < 2)
        played.append(rows)
    assert all(torch.equal(*pair) for other in played[1:] for pair in zip(played[0], other, strict=True))


def test_a_caller_s_noise_is_never_asked_for_more_than_there_is(bundle_of: Callable[..., Bundle], log: Log) -> None:
    """The chunks' tensors are of two lengths, and drawn once each."""
    bundle = bundle_of(TWO_KINDS)
    draws = [torch.randn(4, rows, bundle.config.model.patch_features) for rows in (6, 18)]
    rollout = begin(bundle, CPU, log, noise=RecordedNoise(draws))
    for index in range(2):
        play(rollout, index, log, record=True, draw_next=index == 0)
    drawn = [entry for entry in log if entry.startswith("draw")]
    assert sorted(drawn) == [f"draw {chunk}.{draw}" for chunk in range(2) for draw in range(4)]


def test_noise_drawn_ahead_is_not_taken_for_another_chunk_s(
    bundle_of: Callable[..., Bundle], log: Log, tmp_path: Path
) -> None:
    """A rollout that goes back to a snapshot begins anew there."""
    bundle = bundle_of({})
    rollout = begin(bundle, CPU, log)
    play(rollout, 0, log, draw_next=True)
    rollout.save(tmp_path / "rank.safetensors")
    expected = play(rollout, 1, log, draw_next=True)
    digest = hashlib.sha256((tmp_path / "rank.safetensors").read_bytes()).hexdigest()
    rollout.load(tmp_path / "rank.safetensors", frame=3, sha256=digest)
    assert torch.equal(*expected, *play(rollout, 1, log))


# Warming up


class CountedCollectives(LocalCollectives):
    """One rank, whose traffic is counted as that of several."""

    def __init__(self) -> None:
        self.gathered = 0
        self.traffic = Traffic()

    def gather(self, rows: torch.Tensor) -> torch.Tensor | None:
        self.gathered += 1
        self.traffic.rows_sent += len(rows)
        return rows

    def take_traffic(self) -> Traffic:
        taken, self.traffic = self.traffic, Traffic()
        return taken


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"video.window_frames": "9", "video.sink_frames": "3", "video.horizon_frames": "27"},
        {"video.window_frames": "3", "video.sink_frames": "0"},
        {"video.horizon_frames": "3", "video.window_frames": "3", "video.sink_frames": "0"},
        TWO_KINDS,
        {**TWO_KINDS, "video.window_frames": "9", "video.sink_frames": "3"},
        {**TWO_KINDS, "video.horizon_frames": "4"},
    ],
    ids=lambda changes: "-".join(changes.values()) or "tiny",
)
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_warming_up_meets_every_length_and_plays_a_chunk_of_each_kind(
    bundle_of: Callable[..., Bundle], log: Log, changes: dict[str, str], device: torch.device
) -> None:
    bundle, collectives = bundle_of(changes), CountedCollectives()
    config, executor = bundle.config, Logged(bundle, device, log)
    pool = SessionBufferPool(executor, config, bundle.layout)
    random = torch.get_rng_state()
    warm_up(executor, collectives, config, bundle.layout, pool)

    slots = KVSlots(config, bundle.layout, torch.float32)
    lengths = {(slots.filled_rows(first_frame), 0) for first_frame in history_lengths(config)}
    if len(config.video.step_frames) > 1:
        lengths.add((slots.filled_rows(0, step=1), 1))
    assert set(executor.bound) == lengths
    assert len(executor.bound) <= len(lengths) + 3, "a step over each length is enough"
    chunks = 3 if len(config.video.step_frames) > 1 else 1
    assert collectives.gathered == log.count("copy") == chunks
    assert log.count("step") == log.count("commit") + 4 * chunks
    assert log[-1] == "warmed up"
    # Nothing is left of it: no traffic, no random state, and on a GPU a memory for the first session.
    assert collectives.traffic == Traffic()
    assert torch.equal(torch.get_rng_state(), random)
    assert pool.num_free == (device == GPU)
    buffers = pool.take()
    buffers.begin(executor.encode_prompt(text_of(config, 0)))
    assert buffers.number == (device == CPU)
    assert buffers.slots.rows_moved == 0


@pytest.mark.parametrize("changes", [{}, TWO_KINDS], ids=["chunks alike", "first chunk of one frame"])
def test_two_ranks_warm_up_together_and_compute_what_cold_ones_do(
    bundle_of: Callable[..., Bundle], changes: dict[str, str]
) -> None:
    """Ranks that took different steps would wait for each other for ever; here, until their threads give up."""
    bundle = bundle_of({**changes, "build.world_size": "2"})
    played = []
    for warm in (False, True):
        meeting, collectives = thread_group(2, ThreadCollectives)

        def on_rank(rank: int, warm: bool = warm, ranks: Sequence[ThreadCollectives] = collectives) -> torch.Tensor:
            config, executor = bundle.config, EagerExecutor(bundle, ranks[rank], device=CPU)
            pool = SessionBufferPool(executor, config, bundle.layout)
            if warm:
                warm_up(executor, ranks[rank], config, bundle.layout, pool)
            rollout = Rollout(
                executor,
                ranks[rank],
                config,
                bundle.layout,
                text=text_of(config, 0),
                noise=SeededNoise(5),
                buffers=pool.take(),
            )
            return torch.cat(
                [torch.empty(0, 64), *(rows for index in range(3) for rows in play(rollout, index, Log()))]
            )

        played.append(run_threads(meeting, on_rank))
    (cold, _), (warmed, none) = played
    assert torch.equal(cold, warmed)
    assert len(warmed) > 0
    assert len(none) == 0, "latents go to rank 0"
