import ctypes

import pytest
import torch
import torch.distributed as dist

from causalrt.errors import ExecutorError
from causalrt.runtime.collectives import CAPSULE_NAME, LocalCollectives, TorchCollectives, capsule, join_ranks


def pointer_in(made, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return get(made, name)


def test_capsule_holds_a_pointer_under_a_name():
    made = capsule(2**47 + 8, CAPSULE_NAME)
    assert type(made).__name__ == "PyCapsule"
    assert CAPSULE_NAME == b"ncclComm_t"
    assert pointer_in(made, CAPSULE_NAME) == 2**47 + 8
    with pytest.raises(ValueError, match="incorrect name"):
        pointer_in(made, b"cudaStream_t")


def test_one_rank():
    ranks = LocalCollectives()
    rows = torch.ones(3, 2)
    assert ranks.rank == 0
    assert ranks.gather(rows) is rows
    assert ranks.take_traffic().all_to_all_calls == 0
    with pytest.raises(AssertionError, match="no communicator"):
        ranks.communicator()
    with pytest.raises(AssertionError, match="nothing to exchange"):
        ranks.all_to_all(rows, rows)


@pytest.fixture
def group(tmp_path):
    join_ranks(tmp_path / "rendezvous", 0, 1, device=torch.device("cpu"))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_only_nccl_has_a_communicator():
    with pytest.raises(ExecutorError, match="an engine's collectives need NCCL, and the ranks were joined by gloo"):
        TorchCollectives().communicator()


@pytest.mark.usefixtures("group")
def test_torch_that_does_not_tell(monkeypatch):
    """`_comm_ptr` is torch's own, and came with 2.9."""
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist.ProcessGroup, "_get_backend", lambda self, device: object())
    with pytest.raises(
        ExecutorError, match=r"does not give access to its NCCL communicator; install torch 2.9 or newer, or build"
    ):
        TorchCollectives().communicator()


@pytest.mark.usefixtures("group")
def test_communicator_is_torchs_own(monkeypatch):
    class Backend:
        def _comm_ptr(self):
            return 0x7F00

    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist.ProcessGroup, "_get_backend", lambda self, device: Backend())
    assert pointer_in(TorchCollectives().communicator(), CAPSULE_NAME) == 0x7F00


@pytest.mark.parametrize("name", ["job#12", "run?id=3", "a%41b", "with space", "a:b", "ünïcode-日本", "x" * 200])
def test_ranks_meet_at_the_very_path_that_is_given(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    (tmp_path / "job").symlink_to(victim)
    (tmp_path / "run").mkdir()
    (tmp_path / "aAb").write_text("")
    before = sorted(tmp_path.iterdir())
    join_ranks(tmp_path / name, 0, 1, device=torch.device("cpu"))
    try:
        assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / name])
        assert TorchCollectives().gather(torch.ones(2, 1)).tolist() == [[1], [1]]
    finally:
        dist.destroy_process_group()
    assert victim.read_text() == "years of work"
    assert not list((tmp_path / "run").iterdir())
    assert (tmp_path / "aAb").read_text() == ""
