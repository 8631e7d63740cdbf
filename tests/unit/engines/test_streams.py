"""The stream that executors run on, as a recorder in place of `torch.cuda`; and what ONNX Runtime is given on a GPU."""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from support.tolerances import ROUNDED

from causalrt.engines import onnxruntime as segments
from causalrt.engines import onnxruntime_cuda, streams, vae_onnx
from causalrt.engines.streams import own_stream
from causalrt.errors import ExecutorError
from causalrt.runtime import rank_server, vae_server
from causalrt.runtime.messages import LoadCommand, LoadVaeCommand
from causalrt.runtime.rank_server import RankServer
from causalrt.runtime.vae_server import VaeServer

GPU = torch.device("cuda", 0)
OPENERS = {
    "step": lambda: segments._Segment("step.onnx", GPU),
    "decoder": lambda: vae_onnx._open(Path("first.onnx"), GPU, 1),
}
"""What opens a session of ONNX Runtime on a GPU."""


@pytest.fixture
def current(monkeypatch):
    """Of each thread, the stream that is current; 0 is the default one."""
    chosen = threading.local()

    @contextlib.contextmanager
    def stream(wanted):
        before, chosen.handle = getattr(chosen, "handle", 0), wanted.cuda_stream
        yield
        chosen.handle = before

    made = iter(range(1, 100))
    monkeypatch.setattr(streams, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=next(made)))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=getattr(chosen, "handle", 0))
    )
    return lambda: torch.cuda.current_stream(GPU).cuda_stream


def test_all_threads_share_the_stream_of_a_gpu(current):
    found = []

    def look():
        with own_stream(GPU):
            found.append(current())
        found.append(current())

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with own_stream(GPU):
        assert current() == 1
        with own_stream(torch.device("cuda", 1)):
            assert current() == 2
    assert sorted(found) == [0] * 4 + [1] * 4


def test_on_a_cpu_there_is_no_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: pytest.fail("a stream was made"))
    with own_stream(torch.device("cpu")):
        pass


@pytest.mark.parametrize("opener", OPENERS)
def test_onnxruntime_refuses_the_default_stream(current, opener):
    with pytest.raises(ExecutorError, match=r"default stream of cuda:0.*0 for no stream.*own_stream"):
        OPENERS[opener]()


@pytest.fixture
def sessions(current, monkeypatch):
    """Options and providers of the sessions that are opened, and the arenas that are registered."""
    found = SimpleNamespace(opened=[], arenas=[])

    class Session:
        def __init__(self, path, options, providers):
            found.opened.append((options, providers))

        def get_providers(self):
            return [provider if isinstance(provider, str) else provider[0] for provider in found.opened[-1][1]]

        def io_binding(self):
            return None

        def get_inputs(self):
            return []

        get_outputs = get_inputs

    onnxruntime_cuda._register_arena.cache_clear()
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(
        ort, "create_and_register_allocator_v2", lambda *arguments: found.arenas.append((arguments[0], arguments[2]))
    )
    yield found
    onnxruntime_cuda._register_arena.cache_clear()


def test_onnxruntime_s_sessions_share_a_stream_and_an_arena(sessions):
    with own_stream(GPU):
        for opener in (*OPENERS.values(), *OPENERS.values()):
            opener()
    assert sessions.arenas == [("CUDAExecutionProvider", {"device_id": "0"})]
    assert len(sessions.opened) == 4
    for options, ((name, settings), fallback) in sessions.opened:
        assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        assert settings.items() >= {"device_id": "0", "user_compute_stream": "1", "use_tf32": "0"}.items()
        assert options.get_session_config_entry("session.use_env_allocators") == "1"


@pytest.mark.parametrize("opener", OPENERS)
def test_onnxruntime_without_cuda_is_told(current, opener):
    """The wheel for CPUs registers no arena on a GPU, which is how one whose libraries are missing behaves."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("the onnxruntime installed here has CUDA")
    with own_stream(GPU), pytest.raises(ExecutorError, match=r"could not start CUDA \(.*install the onnxruntime-gpu"):
        OPENERS[opener]()


def test_a_session_runs_in_a_registered_arena():
    """The same two calls on a CPU, with the library itself."""
    onnxruntime_cuda._register_arena("CPUExecutionProvider", "Cpu", 0)
    kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in ("x", "z")]
    nodes = [onnx.helper.make_node("Exp", ["x"], ["y"]), onnx.helper.make_node("Log", ["y"], ["z"])]
    graph = onnx.helper.make_graph(nodes, "g", kinds[:1], kinds[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.array([0.5, 1, 2], np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x, rtol=ROUNDED)


class LoadedError(Exception):
    """So far and no further."""


@pytest.mark.parametrize("role", ["rank", "decoder"])
def test_a_server_works_on_its_own_stream(current, monkeypatch, role):
    seen = []

    def reopen(*arguments):
        seen.append(current())
        raise LoadedError

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for module in (rank_server, vae_server):
        monkeypatch.setattr(module, "reopen_bundle", reopen)
    common = {"bundle": Path("b"), "digest": "", "executor": "onnxruntime", "num_threads": torch.get_num_threads()}
    server, command = VaeServer(None), LoadVaeCommand(**common, device="cuda:0")
    if role == "rank":
        server = RankServer(0, 1, "", None)
        command = LoadCommand(**common, device="cuda", fused_ops=False, cuda_graphs=True, timeout_s=1.0)
    with pytest.raises(LoadedError):
        server.run(command)
    assert seen == [1]
    assert current() == 1, "also for the commands that follow"
