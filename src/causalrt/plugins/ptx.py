"""Ahead-of-time compilation of our Triton kernels: compiles a launch plan to PTX for a GPU architecture, without a GPU.

    KernelLaunch, target --> cache by content hash --hit--> CompiledKernel
                                     | miss
                                     +--> triton.compile -> PTX --> ptxas -v -> registers, spills --> cache

The PTX kernel takes exactly the run-time arguments of the launch's signature, in order: the two scratch pointers that Triton
appends are removed, so that an engine launches the kernel with exactly the arguments that it declares. Pointers are assumed to
be aligned to 16 bytes, as whole tensors are. The reported registers and spills are those of the assembler that Triton ships; a
driver that recompiles the PTX may allocate registers differently.
"""

import contextlib
import hashlib
import io
import json
import logging
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from causalrt.atomic_files import atomic_file
from causalrt.errors import KernelError
from causalrt.owned_paths import TemporaryFolder
from causalrt.plugins.kernel_launch import KernelLaunch, is_interpreted, require_triton
from causalrt.regular_files import regular_file
from causalrt.user_cache import cache_folder

logger = logging.getLogger(__name__)

PTX_VERSIONS = {80: 80, 90: 80, 120: 87}
"""Ten times the PTX version to emit, by compute capability (A100 and A800, H100 and its relatives, RTX Blackwell). It is an old
version with all required features, because a driver rejects PTX newer than itself. Others get Triton's newest version."""

TARGETS = tuple(PTX_VERSIONS)

POINTER_ALIGNMENT_BYTES = 16

ASSEMBLER_S = 120.0
"""Timeout in seconds of the assembler, which normally takes a second or two per kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKernel:
    """A compiled kernel, as embedded in an engine.

    Attributes:
        name: entry point in the PTX.
        target: compute capability, 80 for sm_80.
        ptx: text of the PTX.
        num_warps: number of warps per program, which is the number of threads per block / 32.
        shared_bytes: bytes of dynamic shared memory per program.
        registers: number of registers per thread.
        spill_bytes: bytes of register spills that a thread stores to and loads from local memory.
    """

    name: str
    target: int
    ptx: str
    num_warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int


def default_cache() -> Path:
    """Folder of compiled kernels: `$XDG_CACHE_HOME/causalrt/ptx`."""
    return cache_folder("ptx")


def compile_kernel(launch: KernelLaunch, *, target: int, cache: Path) -> CompiledKernel:
    """Compile the kernel of `launch`, or load it from `cache`.

    Args:
        launch: the launch whose kernel to compile; its grid does not matter.
        target: compute capability, such as one of `TARGETS`.
        cache: folder of compiled kernels, usually `default_cache()`; it is created if it is missing.

    Raises:
        KernelError: Triton is not installed, the process interprets kernels, or Triton or its assembler rejects the kernel.
    """
    kept = cached_kernel(launch, target=target, cache=cache)
    if kept is not None:
        return kept
    ptxas = _assembler(target)
    name, ptx, shared_bytes = _ptx_from_launch(launch, target)
    registers, spill_bytes = _resources_from_log(_assembler_log(ptx, ptxas.path))
    compiled = CompiledKernel(
        name=name,
        target=target,
        ptx=ptx,
        num_warps=launch.num_warps,
        shared_bytes=shared_bytes,
        registers=registers,
        spill_bytes=spill_bytes,
    )
    _write(_cache_path(launch, target, cache), compiled)
    logger.info("compiled %s for sm_%d: %d registers, %d bytes spilled", name, target, registers, spill_bytes)
    return compiled


def cached_kernel(launch: KernelLaunch, *, target: int, cache: Path) -> CompiledKernel | None:
    """Load the compiled kernel of `launch` from `cache`; None if it is not there.

    Args:
        launch: as in `compile_kernel`.
        target: as in `compile_kernel`.
        cache: as in `compile_kernel`.

    Raises:
        KernelError: Triton is not installed, or the process interprets kernels.
    """
    require_triton()
    if is_interpreted(launch.kernel):
        raise KernelError(
            f"{launch.kernel.__name__} was defined for Triton's interpreter: compile in a process that was started without "
            "TRITON_INTERPRET=1"
        )
    return _read(_cache_path(launch, target, cache))


def _assembler(target: int) -> Any:
    """Find Triton's `ptxas` for a target, with its path and version."""
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        return get_ptxas(target)
    except RuntimeError as error:
        raise KernelError(f"Triton has no assembler for sm_{target} here: {error}; install Triton anew") from error


def _cache_path(launch: KernelLaunch, target: int, cache: Path) -> Path:
    return cache / f"{_content_hash(launch, target, _assembler(target).version)}.json"


def _content_hash(launch: KernelLaunch, target: int, assembler: str) -> str:
    """Hash everything that the result depends on; the kernel's own key covers its source and the functions it calls."""
    import triton

    content = {
        "this": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "kernel": [launch.kernel.__name__, launch.kernel.cache_key],
        "signature": list(launch.signature.items()),
        "constexprs": sorted(launch.constexprs.items()),
        "options": [launch.num_warps, launch.num_stages],
        "tools": [triton.__version__, assembler],
        "target": target,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(path: Path) -> CompiledKernel | None:
    try:
        return CompiledKernel(**json.loads(regular_file(path).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s): compiling anew", path, error)
        return None


def _write(path: Path, compiled: CompiledKernel) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(asdict(compiled)))


def _ptx_from_launch(launch: KernelLaunch, target: int) -> tuple[str, str, int]:
    """Compile the kernel of a launch; returns (name, PTX, bytes of shared memory)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name, kind in launch.signature.items() if kind.startswith("*")]
    pointers = [launch.kernel.arg_names.index(name) for name in names]
    source = ASTSource(
        launch.kernel,
        {**launch.signature, **dict.fromkeys(launch.constexprs, "constexpr")},
        constexprs=dict(launch.constexprs),
        attrs={(index,): [["tt.divisibility", POINTER_ALIGNMENT_BYTES]] for index in pointers},
    )
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "ptx_version": PTX_VERSIONS.get(target),
    }
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints a kernel that it cannot assemble
            built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        raise KernelError(f"Triton cannot compile {launch.kernel.__name__} for sm_{target}: {error}") from error
    ptx = _without_scratch(built.asm["ptx"], built.metadata, num_arguments=len(launch.signature))
    return built.metadata.name, _without_lines(ptx), built.metadata.shared


def _without_scratch(ptx: str, metadata: Any, *, num_arguments: int) -> str:
    """Remove the parameters after the first `num_arguments`, which are unused pointers to global scratch memory."""
    entry = re.search(rf"(\.entry {metadata.name}\()([^)]*)(\))", ptx)
    assert entry is not None
    parameters = entry[2].split(",")
    added = [parameter.split()[-1] for parameter in parameters[num_arguments:]]
    if metadata.global_scratch_size or metadata.profile_scratch_size or any(f"[{name}" in ptx for name in added):
        raise KernelError(
            f"{metadata.name} wants scratch memory on the device, which no engine gives it: {metadata.global_scratch_size} "
            "bytes; write it without atomics on tiles, device-side descriptors and profiling"
        )
    kept = ",".join(parameters[:num_arguments]) + "\n"
    return ptx[: entry.start()] + entry[1] + kept + entry[3] + ptx[entry.end() :]


def _without_lines(ptx: str) -> str:
    """Remove line information, which contains file names of the machine that compiled the PTX."""
    code, _, debug = ptx.partition("\n\t.file\t")
    assert ".entry" not in debug
    return re.sub(r"^\t\.loc\b.*\n", "", code, flags=re.MULTILINE).rstrip() + "\n"


def _assembler_log(ptx: str, assembler: str) -> str:
    """Assemble the PTX and return the log of `ptxas -v`."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with TemporaryFolder("ptx") as folder:
        source = folder / "kernel.ptx"
        source.write_text(ptx)
        command: Sequence[str | Path] = (
            assembler,
            "-v",
            f"--gpu-name={target[1]}",
            source,
            "-o",
            f"{folder}/kernel.cubin",
        )
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASSEMBLER_S)
        except subprocess.TimeoutExpired:
            raise KernelError(
                f"{assembler} gave no answer within {ASSEMBLER_S:g} s; install Triton anew, which brings one"
            ) from None
        except (OSError, subprocess.CalledProcessError) as error:
            raise KernelError(f"{assembler} refuses PTX for {target[1]}: {getattr(error, 'stderr', error)}") from error
    return done.stderr


def _resources_from_log(log: str) -> tuple[int, int]:
    """Parse (registers, bytes spilled) of the only kernel from the log of `ptxas -v`."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    if registers is None or len(spills) != 2:
        raise KernelError(
            f"ptxas speaks in a way that this version does not know: {log!r}; use the Triton that it pins"
        )
    return int(registers[1]), sum(map(int, spills))
