"""The inductor executor on a CPU: what torch.compile makes of the step, against the reference's recording.

Only one recording and few ranks, for compiling takes its time; `test_golden.py` has eager, which is what is compiled.
"""

import pytest
import torch
import torch._inductor.config
from support import GOLDEN
from torch._dynamo.utils import counters
from torch._inductor.async_compile import get_compile_threads

from causalrt.engines.bundle import open_bundle
from causalrt.engines.inductor import InductorExecutor, cpp_compiler
from causalrt.engines.make import make_executor
from causalrt.export.build import build
from causalrt.proof.compare import largest_errors, replay, replay_here
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.recording import open_recording
from causalrt.proof.replica import replica_on
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.load import load

pytestmark = pytest.mark.skipif(cpp_compiler() is None, reason="inductor needs a C++ compiler on a CPU: install g++")


def recording_and_bundle(world_size, folder, case="B"):
    recording = open_recording(GOLDEN / f"{case}.safetensors", world_size=world_size)
    checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
    return recording, build(recording.config, checkpoint=checkpoint, out=folder / "bundle", executors=["inductor"])


def check(outputs, recording):
    for name, error in largest_errors(outputs, recording.outputs()).items():
        assert error.error <= TOLERANCE, f"{name}: {error.error:.2e} at {error.name}"


@pytest.fixture
def compiled_graphs():
    """How often something was compiled."""
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()


def test_compiled_once_for_all_chunks_and_sessions(tmp_path, compiled_graphs):
    """The number of filled KV rows is symbolic from the first chunk on, and no tensor of a session is part of the code."""
    recording, path = recording_and_bundle(1, tmp_path)
    bundle = open_bundle(path)
    executor = InductorExecutor(bundle, LocalCollectives(), device=torch.device("cpu"))
    assert compiled_graphs() == 0
    lengths = []
    bind = executor.bind

    def bind_and_note(view):
        lengths.append(view.kv_rows)
        bind(view)

    executor.bind = bind_and_note
    replica = replica_on(executor, bundle.config, bundle.layout)
    for _ in range(2):
        check(replay_here(recording, replica), recording)
        assert compiled_graphs() == 1
    assert lengths == [48, 96, 144] * 2


@pytest.mark.slow
def test_each_kind_of_step_is_compiled_once_too(tmp_path, compiled_graphs):
    """Each of the two steps for its own sizes, with chunks' KV rows symbolic as ever."""
    recording, path = recording_and_bundle(1, tmp_path, "J")
    bundle = open_bundle(path)
    executor = InductorExecutor(bundle, LocalCollectives(), device=torch.device("cpu"))
    replica = replica_on(executor, bundle.config, bundle.layout)
    for _ in range(2):
        check(replay_here(recording, replica), recording)
        assert compiled_graphs() == 2


@pytest.mark.parametrize(("chosen", "expected"), [(None, 3), ("5", 32)])
def test_a_rank_compiles_in_as_many_processes_as_it_has_threads(tmp_path, monkeypatch, chosen, expected):
    _, path = recording_and_bundle(1, tmp_path)
    if chosen is None:
        monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    else:
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", chosen)
    with torch._inductor.config.patch(compile_threads=32):
        cpu = torch.device("cpu")
        make_executor("inductor", open_bundle(path), LocalCollectives(), num_threads=3, device=cpu, fused_ops=False)
        assert get_compile_threads() == expected


@pytest.mark.slow
def test_exchanges_are_part_of_the_compiled_step(tmp_path):
    recording, path = recording_and_bundle(2, tmp_path)
    with load(path, executor="inductor", device="cpu", timeout_s=300) as engine:
        check(replay(recording, engine), recording)
