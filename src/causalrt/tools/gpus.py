"""The GPUs of this machine, examined without starting CUDA in this process.

NVML also counts GPUs that CUDA cannot use, for example under a driver that is too old for torch's CUDA. A child process
therefore starts CUDA, computes a sum on each GPU and reports the result. The caller holds no memory of a GPU afterwards, and a
driver that crashes or hangs ends only the child.
"""

import itertools
import json
import os
import re
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from causalrt.child_python import python_command, python_environment
from causalrt.engines.tensorrt_flavour import device_target

TRIAL_S = 120.0
"""How long the child may take to start CUDA on every GPU of the machine."""
PROGRAM_S = 10.0
"""How long a small program such as nvidia-smi may take."""
NEEDED_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest driver branch for each major version of CUDA (NVIDIA, CUDA Compatibility, table 1)."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
PROCESSES = Path("/proc")
MPS_PIPES = "/tmp/nvidia-mps"
"""Folder of the pipes of MPS's control daemon, unless CUDA_MPS_PIPE_DIRECTORY names another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU that CUDA shows.

    Attributes:
        index: its index in CUDA.
        name: its name from the driver.
        target: its architecture, for example `sm80`.
        total_bytes: size of its memory.
        free_bytes: bytes that were free during the trial; None if the GPU does not work.
        fault: why it does not work; None if it has computed a sum.
    """

    index: int
    name: str
    target: str
    total_bytes: int
    free_bytes: int | None = None
    fault: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """The result of a trial of all GPUs.

    Attributes:
        counted: number of GPUs that torch counts by NVML before CUDA is started.
        fault: why CUDA does not start, or why torch counts no GPU; None if neither is known.
        found: the GPUs that CUDA shows once it has started.
        without_peer_access: pairs of working GPUs that cannot read each other's memory.
    """

    counted: int
    fault: str | None = None
    found: Sequence[Gpu] = field(default=())
    without_peer_access: Sequence[Sequence[int]] = field(default=())

    @property
    def working(self) -> list[Gpu]:
        """The GPUs that have computed a sum."""
        return [gpu for gpu in self.found if gpu.fault is None]


def find_gpus() -> Gpus:
    """Count the GPUs of this machine, and try them in a child process if there are any."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            counted = torch.cuda.device_count()
        except Exception as error:  # a damaged driver may raise anything
            return Gpus(counted=0, fault=first_sentence(error))
    if not counted:
        return Gpus(counted=0, fault=first_sentence(said[-1].message) if said else None)
    return try_in_child(counted)


def try_in_child(counted: int) -> Gpus:
    """Run `try_gpus` in a child process; a child that crashes or hangs is a finding, too."""
    try:
        done = subprocess.run(
            python_command("causalrt.tools.gpus"),
            env=python_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TRIAL_S,
        )
    except subprocess.TimeoutExpired:
        return Gpus(counted=counted, fault=f"a process that starts it gave no answer within {TRIAL_S:g} s")
    except OSError as error:
        return Gpus(counted=counted, fault=f"no process could be started to try it: {error}")
    try:
        made = json.loads(done.stdout.splitlines()[-1])
        return Gpus(**{**made, "found": [Gpu(**gpu) for gpu in made["found"]]})
    except (IndexError, ValueError, TypeError, KeyError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return Gpus(counted=counted, fault=f"a process that starts it ended with code {done.returncode}: {last[0]}")


def try_gpus() -> Gpus:
    """Start CUDA in this process, and compute a sum on every GPU that it shows."""
    counted = torch.cuda.device_count()
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:
        return Gpus(counted=counted, fault=first_sentence(error))
    gpus = Gpus(counted=counted, found=[_tried(index) for index in range(torch.cuda.device_count())])
    pairs = itertools.combinations([gpu.index for gpu in gpus.working], 2)
    apart = [pair for pair in pairs if not _can_access(*pair)]
    return Gpus(counted=counted, found=gpus.found, without_peer_access=apart)


def _tried(index: int) -> Gpu:
    name, target, total, free = f"GPU {index}", "unknown", 0, None
    try:
        name, device = torch.cuda.get_device_name(index), torch.device("cuda", index)
        target, total = device_target(device), torch.cuda.get_device_properties(index).total_memory
        free = torch.cuda.mem_get_info(index)[0]
        two = add_ones(device)
        fault = None if two == 2 else f"1 + 1 is {two} on it"
    except Exception as error:  # no kernels for this GPU, full memory, a mode that admits one process, and so on
        fault = first_sentence(error)
    return Gpu(index=index, name=name, target=target, total_bytes=total, free_bytes=free, fault=fault)


def add_ones(device: torch.device) -> int:
    """Compute 1 + 1 on a device."""
    return int(torch.ones(2, device=device).sum())


def _can_access(first: int, second: int) -> bool:
    try:
        return bool(torch.cuda.can_device_access_peer(first, second))
    except Exception:  # the trial of the GPU itself has reported the fault
        return False


def first_sentence(error: object) -> str:
    """The first sentence of an error or warning, or the name of its kind if it has no text."""
    lines = str(error).strip().splitlines()
    return re.split(r"\.\s+(?=[A-Z])", lines[0])[0].rstrip(".") if lines else type(error).__name__


def driver_version() -> str | None:
    """The version of NVIDIA's driver, for example `580.65.06`; None if there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER_FILE.read_text())
    except OSError:  # WSL has no such file
        found = re.match(
            r"(\d+\.[\d.]+)", output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
        )
    return found[1] if found else None


def needed_driver(cuda: str | None) -> int | None:
    """The oldest driver branch that a version of CUDA works with, for example 580 for `13.0`; None if unknown."""
    return NEEDED_DRIVER.get(int(cuda.partition(".")[0])) if cuda else None


def mps_state() -> str:
    """Describe whether the control daemon of CUDA's Multi-Process Service runs."""
    pipes = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or MPS_PIPES
    for name in PROCESSES.glob("[0-9]*/comm"):
        try:
            if name.read_text().startswith("nvidia-cuda-mps"):
                return f"on: its daemon runs, pipes in {pipes}"
        except OSError:  # the process has ended meanwhile
            continue
    if os.path.exists(os.path.join(pipes, "control")):
        return f"unknown: there are pipes in {pipes}, but no daemon is visible from here"
    return "off"


def query_nvidia_smi(*fields: str) -> list[dict[str, str]] | None:
    """The fields of each GPU from nvidia-smi; None if it is missing or fails."""
    said = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    if said is None:
        return None
    return [dict(zip(fields, (field.strip() for field in line.split(",")), strict=False)) for line in said.splitlines()]


def output_of(*command: str) -> str | None:
    """The output of a program; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(asdict(try_gpus())))  # noqa: T201
