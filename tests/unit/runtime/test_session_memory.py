"""Memory of sessions: numbers that every rank gives alike, addresses that stay on a GPU, nothing left of an earlier session."""

from types import SimpleNamespace

import pytest
import torch

from causalrt.config import recipe
from causalrt.layout import layout_from_config
from causalrt.runtime.session_memory import SessionMemories, SessionMemory


def make(device: str, monkeypatch: pytest.MonkeyPatch) -> SessionMemories:
    """Memories of an executor on `device`, their tensors on the CPU."""
    from causalrt.runtime import session_memory

    right = session_memory.KVSlots
    monkeypatch.setattr(
        session_memory, "KVSlots", lambda *args, **options: right(*args, **{**options, "device": "cpu"})
    )
    config = recipe("tiny")
    executor = SimpleNamespace(device=torch.device(device), whole_slots=True)
    return SessionMemories(executor, config, layout_from_config(config))


def addresses(memory: SessionMemory) -> list[int]:
    pairs = [pair for layer in memory.slots.filled(0) for pair in layer] + list(memory.cross_kv)
    return [tensor.data_ptr() for pair in pairs for tensor in pair]


def prompt(value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
