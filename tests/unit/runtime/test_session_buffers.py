"""Buffers of sessions: the same numbers on every rank, addresses that stay on a GPU, nothing left of an earlier session."""

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
from causalrt.model.wan.conditioning import Conditioning
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
    raise torch.OutOfMemoryError("CUDA out of buffers")


def addresses(buffers: SessionBuffers) -> list[int]:
    return [tensor.data_ptr() for tensor in buffers.view(0).tensors().values()]


@torch.inference_mode()
def prompt(value: float) -> Conditioning:
    """As eager makes it: inference tensors."""
    return {"cross_k.0": torch.full((2,), value), "cross_v.0": torch.full((2,), value)}


def test_on_a_gpu_the_memory_closed_last_is_taken_first(monkeypatch):
    pool = make("cuda", monkeypatch)
    one, two = pool.take(), pool.take()
    assert (one.number, two.number) == (0, 1)
    pool.give_back(two)
    pool.give_back(one)
    assert pool.take() is one
    assert pool.take() is two
    assert pool.take().number == 2


@pytest.mark.parametrize("fails_in", ["slots", "prompt"])
def test_ranks_number_alike_after_one_of_them_has_run_out_of_memory(monkeypatch, fails_in):
    """A session that one rank cannot open leaves all ranks with the same numbers, and with buffers for no session more."""
    ranks = [make("cuda", monkeypatch), make("cuda", monkeypatch)]
    kept = [pool.take() for pool in ranks]
    (opened,) = [pool.take() for pool in ranks[:1]]
    if fails_in == "prompt":
        ranks[1].give_back(ranks[1].take(), opened=False)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(session_buffers, "KVSlots", raise_out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                ranks[1].take()
    ranks[0].give_back(opened, opened=False)
    assert [pool.num_free for pool in ranks] == [0, 0]
    for pool, buffers in zip(ranks, kept, strict=True):
        pool.give_back(buffers)
    numbers = [[pool.take().number for _ in range(3)] for pool in ranks]
    assert numbers[0] == numbers[1]
    assert len(set(numbers[0])) == 3


def test_kept_memory_stays_when_a_session_in_it_is_not_opened(monkeypatch):
    """Its graphs stay right, and every rank has it."""
    pool = make("cuda", monkeypatch)
    buffers = pool.take()
    pool.give_back(buffers)
    assert pool.take() is buffers
    pool.give_back(buffers, opened=False)
    assert pool.take() is buffers


def test_on_a_cpu_memory_is_freed(monkeypatch):
    pool = make("cpu", monkeypatch)
    first = pool.take()
    pool.give_back(first)
    assert pool.take() is not first


def test_the_next_session_finds_the_addresses_and_nothing_else(monkeypatch):
    pool = make("cuda", monkeypatch)
    buffers = pool.take()
    buffers.begin(prompt(1.0))
    before = addresses(buffers)
    for layer in buffers.slots.filled(0):
        for k, v in layer:
            k.fill_(float("nan"))
            v.fill_(float("nan"))
    buffers.slots.rows_moved = 5
    pool.give_back(buffers)
    buffers = pool.take()
    buffers.begin(prompt(2.0))
    assert addresses(buffers) == before
    assert float(buffers.prompt["cross_k.0"][0]) == 2.0
    assert buffers.slots.rows_moved == 0
    assert all(bool((tensor == 0).all()) for layer in buffers.slots.filled(0) for pair in layer for tensor in pair)


TWO_KINDS = {"video.horizon_frames": "13", "video.independent_first_frame": "true"}


@pytest.mark.parametrize(("fused_ops", "changes"), [(False, {}), (True, {}), (False, TWO_KINDS)])
def test_sessions_one_after_another_in_one_memory(tmp_path, fused_ops, changes):
    """As on a GPU: warmed up, then two sessions in the buffers that the warm-up used; each is what it is alone."""
    config = override(recipe("tiny"), changes)
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in random_weights(config.model, seed=0)}, checkpoint)
    bundle = open_bundle(build(config, checkpoint=checkpoint, out=tmp_path / "bundle", executors=["eager"]))
    executor = EagerExecutor(bundle, LocalCollectives(), device=torch.device("cpu"), fused_ops=fused_ops)
    pool = SessionBufferPool(executor, config, bundle.layout)
    buffers = pool.take()
    pool.take = lambda: buffers  # kept, as on a GPU
    warm_up(executor, LocalCollectives(), config, bundle.layout, pool)

    def latents(seed: int, buffers: SessionBuffers) -> torch.Tensor:
        text = torch.randn(config.model.text_len, config.model.text_dim, generator=torch.Generator().manual_seed(seed))
        session = Rollout(
            executor, LocalCollectives(), config, bundle.layout, text=text, noise=SeededNoise(seed), buffers=buffers
        )
        rows: list[torch.Tensor] = []
        for index in range(3):
            session.chunk(index, context_pass=True, record=False, deliver=lambda latents, times: rows.append(latents))
        return torch.cat(rows)

    kept = [latents(seed, buffers) for seed in (1, 2)]
    fresh = [latents(seed, SessionBufferPool(executor, config, bundle.layout).take()) for seed in (1, 2)]
    assert all(torch.equal(one, other) for one, other in zip(kept, fresh, strict=True))
    assert not torch.equal(*kept)
