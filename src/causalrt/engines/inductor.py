"""The inductor executor: the eager step through torch.compile, one graph without breaks, exchanges included.

It needs no TensorRT, and is the baseline that engines have to beat. All-to-alls are functional collectives, which the compiler
keeps in order. On a GPU the compiled step is captured in CUDA graphs, one for each number of filled KV rows.
"""

import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence

import torch
import torch._inductor.config
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from causalrt.engines.base import Collectives, SessionView, StepBuffers
from causalrt.engines.bundle import Bundle
from causalrt.engines.cuda_graphs import CudaGraphs
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.tensor_names import KV_ROWS
from causalrt.errors import ExecutorError
from causalrt.model.wan.conditioning import Conditioning, time_arguments
from causalrt.model.wan.step import StepOps
from causalrt.owned_paths import TemporaryFolder
from causalrt.plugins.attention import attend, kv_attention_in_place
from causalrt.plugins.kernel_launch import require_triton_launches
from causalrt.plugins.rotate import rotate_pairs_real


def functional_all_to_all(sent: torch.Tensor) -> torch.Tensor:
    """Send block p of `[P, rows, D]` to rank p of the default process group, by an op that the compiler sees."""
    group = dist.group.WORLD
    assert group is not None
    received: torch.Tensor = functional.all_to_all_single(sent.contiguous(), None, None, group)
    return received


COMPILER_S = 30.0
"""Time limit of the trial compilation."""

COMPILED_OPS = StepOps(
    all_to_all=functional_all_to_all,
    rotate=rotate_pairs_real,
    attention=attend,
    kv_attention=kv_attention_in_place,
)


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++")


def require_cpp_compiler() -> str:
    """Path of the C++ compiler that torch.compile would use on a CPU.

    Raises:
        ExecutorError: there is none, or CXX holds more than the name of a program.
    """
    named = os.environ.get("CXX") or "g++"
    if len(named.split()) > 1:
        raise ExecutorError(
            f"CXX is {named!r}, and torch.compile takes a program without arguments; set CXX to the path of a compiler"
        )
    compiler = cpp_compiler()
    if compiler is None:
        raise ExecutorError(
            f"inductor needs a C++ compiler on a CPU, and there is no {named}; install g++, set CXX, or take executor eager"
        )
    return compiler


def check_can_compile() -> str:
    """Check that torch.compile will work on a CPU: compile and link a small library, and write to the cache folder.

    Returns:
        The compiler's path.

    Raises:
        ExecutorError: the compiler is missing, hangs or fails, or the cache folder cannot be written.
    """
    compiler = require_cpp_compiler()
    _check_cache_folder()
    with TemporaryFolder("compiler") as folder:
        source = folder / "trial.cpp"
        source.write_text('#include <Python.h>\nextern "C" int trial() { return 0; }\n')
        headers = f"-I{sysconfig.get_path('include')}"
        command = [compiler, str(source), headers, "-fPIC", "-fopenmp", "-shared", "-o", str(source.with_suffix(".so"))]
        said = _run_compiler(command)
    if said is not None:
        raise ExecutorError(
            f"the C++ compiler {compiler} cannot build a small library ({said}); set CXX to one that can, or take "
            "executor eager"
        )
    return compiler


def _run_compiler(command: Sequence[str]) -> str | None:
    """Run a compiler; one line about its failure, or None. A compiler that hangs is killed with its child processes."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:  # not a program of this machine, for example
        return str(error)
    with process:
        try:
            output, _ = process.communicate(timeout=COMPILER_S)
        except subprocess.TimeoutExpired:
            return f"it gave no answer within {COMPILER_S:g} s"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == 0:
        return None
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    fault = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
    return f"exit code {process.returncode}: {fault}"


def _check_cache_folder() -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ExecutorError(
            f"torch.compile keeps what it compiles in {folder}, which cannot be written ({error.strerror}); set "
            "TORCHINDUCTOR_CACHE_DIR to a folder that can"
        ) from error


class InductorExecutor(EagerExecutor):
    """The eager executor with its step compiled."""

    def __init__(
        self,
        bundle: Bundle,
        collectives: Collectives,
        *,
        device: torch.device,
        num_threads: int | None = None,
        fused_ops: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        if device.type == "cpu":
            require_cpp_compiler()
        else:
            require_triton_launches()
        super().__init__(bundle, collectives, device=device, fused_ops=fused_ops, ops=COMPILED_OPS)
        if num_threads is not None and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
            # By default every rank would compile in as many processes as there are cores, whatever its share of them is.
            torch._inductor.config.compile_threads = num_threads
        # With several steps, torch must not generalise from one's sizes to another's; what is marked dynamic stays so.
        dynamic = False if len(self._steps) > 1 else None
        self._compiled = [torch.compile(step, fullgraph=True, dynamic=dynamic) for step in self._steps]
        self._graphs = CudaGraphs(device, enabled=cuda_graphs)
        self._buffers = [self._make_buffers(step.layout.local_tokens) for step in self._steps]
        self._number = 0
        self._rows = range(bundle.config.tokens_per_chunk, bundle.config.slot_rows + 1)
        self._key = (-1, 0, 0)

    def _make_buffers(self, rows: int) -> StepBuffers:
        features = self._wan.config.patch_features
        time = {name: torch.zeros_like(tensor) for name, tensor in self.embed_time(0.0).items()}
        x = torch.zeros(rows, features, dtype=self._dtype, device=self.device)
        numbers = {"first_frame": self._first_frame, KV_ROWS: self._kv_rows}
        return StepBuffers(x=x, flow=torch.zeros_like(x), **time, **numbers)

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`."""
        super().bind(view)
        self._number = view.step
        if len(self._rows) > 1 and view.step == 0:  # other steps have no history, and always as many rows
            for tensor in view.slots().values():
                torch._dynamo.mark_dynamic(tensor, 1, min=self._rows[0], max=self._rows[-1])
        self._graphs.bind(view.buffers_id, tuple(tensor.data_ptr() for tensor in view.tensors().values()))
        self._key = (view.buffers_id, view.step, view.kv_rows)

    def graph_bytes(self) -> int:
        """See `Executor.graph_bytes`."""
        return self._graphs.held_bytes

    @torch.no_grad()
    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        buffers = self._buffers[self._number]
        buffers.copy_from(x, time, first_frame=first_frame, kv_rows=self._key[-1])
        self._graphs.run(self._key, self._work)
        return buffers["flow"]

    def _work(self) -> None:
        compiled, buffers = self._compiled[self._number], self._buffers[self._number]
        numbers = self._rank, self._first_frame
        flow, _ = compiled(buffers["x"], *time_arguments(buffers), *numbers, self._kv, self._cross_kv, self._kv_rows)
        buffers["flow"].copy_(flow)
