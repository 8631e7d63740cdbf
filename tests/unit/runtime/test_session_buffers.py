"""Memory of sessions: numbers that every rank gives alike, addresses that stay on a GPU, nothing left of an earlier session."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from causalrt.config import override
from causalrt.engines.bundle import open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.export.build import build
from causalrt.export.random_weights import random_weights
from causalrt.layout import layout_from_config
from causalrt.recipes import recipe
from causalrt.runtime import session_buffers
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.rollout import Rollout
from causalrt.runtime.session_buffers import SessionBufferPool, SessionBuffers
from causalrt.runtime.warm_up import warm_up


def make(device: str, monkeypatch: pytest.MonkeyPatch) -> SessionBufferPool:
    """Memories of an executor on `device`, their tensors on the CPU."""
    right = session_buffers.KVSlots
    monkeypatch.setattr(
        session_buffers, "KVSlots", lambda *args, **options: right(*args, **{**options, "device": "cpu"})
    )
    config = recipe("tiny")
    executor = SimpleNamespace(device=torch.device(device), whole_slots=True)
    return SessionBufferPool(executor, config, layout_from_config(config))


def raise_out_of_memory(*args: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def addresses(memory: SessionBuffers) -> list[int]:
    pairs = [pair for layer in memory.slots.filled(0) for pair in layer] + list(memory.cross_kv)
    return [tensor.data_ptr() for pair in pairs for tensor in pair]


@torch.inference_mode()
def prompt(value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As eager makes it: inference tensors."""
    return [(torch.full((2,), value), torch.full((2,), value))]


def test_on_a_gpu_the_memory_closed_last_is_taken_first(monkeypatch):
    memories = make("cuda", monkeypatch)
    one, two = memories.take(), memories.take()
    assert (one.number, two.number) == (0, 1)
    memories.give_back(two)
    memories.give_back(one)
    assert memories.take() is one
    assert memories.take() is two
    assert memories.take().number == 2


@pytest.mark.parametrize("fails_in", ["slots", "prompt"])
def test_ranks_number_alike_after_one_of_them_has_run_out_of_memory(monkeypatch, fails_in):
    """A session that one rank cannot open leaves all ranks with the same numbers, and with memory for no session more."""
    ranks = [make("cuda", monkeypatch), make("cuda", monkeypatch)]
    kept = [memories.take() for memories in ranks]
    (opened,) = [memories.take() for memories in ranks[:1]]
    if fails_in == "prompt":
        ranks[1].give_back(ranks[1].take(), opened=False)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(session_buffers, "KVSlots", raise_out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                ranks[1].take()
    ranks[0].give_back(opened, opened=False)
    assert [memories.num_free for memories in ranks] == [0, 0]
    for memories, memory in zip(ranks, kept, strict=True):
        memories.give_back(memory)
    numbers = [[memories.take().number for _ in range(3)] for memories in ranks]
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 3


def test_kept_memory_stays_when_a_session_in_it_is_not_opened(monkeypatch):
    """Its graphs stay right, and every rank has it."""
    memories = make("cuda", monkeypatch)
    memory = memories.take()
    memories.give_back(memory)
    assert memories.take() is memory
    memories.give_back(memory, opened=False)
    assert memories.take() is memory


def test_on_a_cpu_memory_is_freed(monkeypatch):
    memories = make("cpu", monkeypatch)
    first = memories.take()
    memories.give_back(first)
    assert memories.take() is not first


def test_the_next_session_finds_the_addresses_and_nothing_else(monkeypatch):
    memories = make("cuda", monkeypatch)
    memory = memories.take()
    memory.begin(prompt(1.0))
    before = addresses(memory)
    for layer in memory.slots.filled(0):
        for k, v in layer:
            k.fill_(float("nan"))
            v.fill_(float("nan"))
    memory.slots.rows_moved = 5
    memories.give_back(memory)
    memory = memories.take()
    memory.begin(prompt(2.0))
    assert addresses(memory) == before
    assert float(memory.cross_kv[0][0][0]) == 2.0
    assert memory.slots.rows_moved == 0
    assert all(bool((tensor == 0).all()) for layer in memory.slots.filled(0) for pair in layer for tensor in pair)


TWO_KINDS = {"video.horizon_frames": "13", "video.independent_first_frame": "true"}


@pytest.mark.parametrize(("plugins", "changes"), [(False, {}), (True, {}), (False, TWO_KINDS)])
def test_sessions_one_after_another_in_one_memory(tmp_path, plugins, changes):
    """As on a GPU: warmed up, then two sessions in the memory that the warm-up used; each is what it is alone."""
    config = override(recipe("tiny"), changes)
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in random_weights(config.model, seed=0)}, checkpoint)
    bundle = open_bundle(build(config, checkpoint=checkpoint, out=tmp_path / "bundle", executors=["eager"]))
    executor = EagerExecutor(bundle, LocalCollectives(), device=torch.device("cpu"), plugins=plugins)
    memories = SessionBufferPool(executor, config, bundle.layout)
    memory = memories.take()
    memories.take = lambda: memory  # kept, as on a GPU
    warm_up(executor, LocalCollectives(), config, bundle.layout, memories)

    def latents(seed: int, memory: SessionBuffers) -> torch.Tensor:
        text = torch.randn(config.model.text_len, config.model.text_dim, generator=torch.Generator().manual_seed(seed))
        session = Rollout(
            executor, LocalCollectives(), config, bundle.layout, text=text, noise=SeededNoise(seed), memory=memory
        )
        rows: list[torch.Tensor] = []
        for index in range(3):
            session.chunk(index, refresh=True, record=False, deliver=lambda latents, times: rows.append(latents))
        return torch.cat(rows)

    kept = [latents(seed, memory) for seed in (1, 2)]
    fresh = [latents(seed, SessionBufferPool(executor, config, bundle.layout).take()) for seed in (1, 2)]
    assert all(torch.equal(one, other) for one, other in zip(kept, fresh, strict=True))
    assert not torch.equal(*kept)
