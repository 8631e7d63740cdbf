"""Time single ops on the machine at hand: products, attention, passes over memory, and the exchange between ranks.

    calibrate -> for each (executor, ranks): `ranks` processes of this module, side by side -> samples -> fit -> Calibration

The processes are those of an engine in what matters: threads, gloo or NCCL, ONNX Runtime's shared pool. They keep step, so that
each is measured while the others load the machine. An op never finds its inputs in a cache; the median of its repeats counts.
"""

import argparse
import functools
import json
import logging
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from causalrt.child_python import python_command, python_environment
from causalrt.control_groups import available_cpus
from causalrt.errors import ExecutorError
from causalrt.owned_paths import TemporaryFolder
from causalrt.runtime.collectives import join_ranks
from causalrt.tools.plan.calibration import Calibration, Entry, Runtime, Sample, exchange_features, fit_costs
from causalrt.tools.plan.micro_ops import gemm_op, micro_ops, random_tensors, runner
from causalrt.tools.plan.work import Exchange, Gemm

Clock = Literal["wall", "cpu"]
logger = logging.getLogger(__name__)
EXCHANGES = (64, 512, 2048, 8192)
"""Rows of 64 channels to each rank."""
HEAD = 64
BEFORE_EXCHANGE = Gemm(m=1024, n=1024, k=512, count=1)
"""A product, whose time is taken off again: ranks come to an exchange from their work, and never quite together."""
LEAST_S = 1e-6
REPEAT_S = 0.25
"""Time spent on repeats of an op."""
LEAST_REPEATS, COLLECTIVE_REPEATS = 5, 50
LIMIT_S, POLL_S = 600.0, 0.2


def default_device() -> str:
    """What `calibrate` measures unless told."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measured_precision(device: str) -> str:
    """That of the ops that `calibrate` measures on a device."""
    return "bfloat16" if device == "cuda" else "float32"


def calibrate(
    runtimes: Sequence[Runtime],
    world_sizes: Sequence[int],
    *,
    device: str | None = None,
    clock: Clock = "wall",
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Calibration:
    """Measure this machine, in float32 on a CPU and in bfloat16 on GPUs.

    Args:
        runtimes: executors to measure; on GPUs, eager alone.
        world_sizes: numbers of ranks; the CPU's cores are divided among them.
        device: `cpu` or `cuda`; by default GPUs where there is one.
        clock: `wall`, or `cpu` for processor time with one thread a rank: for a CPU that others use. It leaves out waiting.
        on_progress: stage, done, total.

    Raises:
        ExecutorError: a process failed, or there are fewer GPUs than ranks.
    """
    device = device or default_device()
    ways = [(runtime, ranks) for runtime in runtimes for ranks in world_sizes if device == "cpu" or runtime == "eager"]
    entries = []
    for done, (runtime, ranks) in enumerate(ways):
        on_progress("measuring", done, len(ways))
        threads = max(1, available_cpus() // ranks) if (device, clock) == ("cpu", "wall") else 1
        entries.append(_measure(runtime, ranks, threads, device, clock))
    on_progress("measuring", len(ways), len(ways))
    gpu = device == "cuda"
    return Calibration(
        machine=torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {available_cpus()} cores",
        device="cuda" if gpu else "cpu",
        precision=measured_precision(device),
        entries=tuple(entries),
    )


def _measure(runtime: Runtime, ranks: int, threads: int, device: str, clock: Clock) -> Entry:
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise ExecutorError(
            f"{ranks} ranks want a GPU each, and torch sees {torch.cuda.device_count()}; ask for fewer ranks"
        )
    environment = python_environment(GLOO_SOCKET_IFNAME="lo", OMP_WAIT_POLICY="passive")
    with TemporaryFolder("plan") as folder:
        command = [*python_command("causalrt.tools.plan.calibrate"), "--runtime", runtime, "--device", device]
        command += ["--ranks", str(ranks), "--threads", str(threads), "--folder", str(folder), "--clock", clock]
        logs = [folder / f"log{rank}" for rank in range(ranks)]
        processes = []
        for rank, path in enumerate(logs):
            with path.open("w") as log:
                processes.append(subprocess.Popen([*command, "--rank", str(rank)], env=environment, stderr=log))
        try:
            wait_for(processes, logs)
        except TimeoutError as error:
            raise ExecutorError(
                f"the calibration of {runtime} took longer than {LIMIT_S:.0f} s; free the machine"
            ) from error
        finally:
            for process in processes:
                process.kill()
                process.wait()
        samples = [Sample(**sample) for sample in json.loads((folder / "samples.json").read_text())]
    costs, relative_error = fit_costs(samples)
    logger.info("%s, %d rank(s): fitted with a relative error of %.1f %%", runtime, ranks, 100 * relative_error)
    return Entry(
        runtime=runtime,
        ranks=ranks,
        threads=threads,
        costs=costs,
        relative_error=relative_error,
        ceilings=ceilings(samples, element_bytes=2 if device == "cuda" else 4),
    )


def wait_for(processes: Sequence[subprocess.Popen[Any]], logs: Sequence[Path]) -> None:
    """Wait for all ranks, and no longer than for the first that fails: the others wait for it.

    Raises:
        ExecutorError: one has failed; with the end of its log.
        TimeoutError: it takes longer than `LIMIT_S`.
    """
    until = time.monotonic() + LIMIT_S
    while True:
        codes = [process.poll() for process in processes]
        for code, log in zip(codes, logs, strict=True):
            if code:
                raise ExecutorError(f"a rank of the calibration failed (exit code {code}):\n{log.read_text()[-2000:]}")
        if None not in codes:
            return
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(POLL_S)


def ceilings(samples: Sequence[Sample], *, element_bytes: int) -> dict[str, float]:
    """The highest rates among samples: GFLOP/s of products and attention, GB/s of a sum of two tensors (three pass)."""

    def most(kind: str, feature: str) -> float:
        return max(s.features[feature] / s.seconds for s in samples if s.kind == kind) / 1e9

    largest = max(s.features["element"] for s in samples if s.kind == "arithmetic")
    sums = [s for s in samples if s.kind == "arithmetic" and s.features["element"] == largest]
    return {
        "gemm_gflops": most("gemm", "flop"),
        "attention_gflops": most("attention", "flop"),
        "memory_gbs": 3 * element_bytes * largest / max(s.seconds for s in sums) / 1e9,
    }


def _seconds(
    run: Callable[[], object],
    *,
    device: torch.device,
    now: Callable[[], float],
    collective: bool,
) -> float:
    """The median of several; ranks begin together, and repeat alike where they must."""

    def once() -> float:
        start = now()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return now() - start

    if dist.is_initialized():
        dist.barrier()
    once()
    found: list[float] = []
    until = time.perf_counter() + REPEAT_S
    while len(found) < (COLLECTIVE_REPEATS if collective else LEAST_REPEATS) or (
        not collective and time.perf_counter() < until
    ):
        found.append(once())
    return statistics.median(found)


def _one_after_other(first: Callable[[], object], second: Callable[[], object]) -> None:
    first()
    second()


def exchange_of(rows: int, ranks: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """An exchange of so many rows with each rank, in the precision that is planned for."""
    sent = torch.zeros(ranks, rows, HEAD, device=device, dtype=dtype)
    return functools.partial(dist.all_to_all_single, torch.empty_like(sent), sent)


def _rank_main(arguments: argparse.Namespace) -> None:
    import onnxruntime as ort

    torch.set_num_threads(arguments.threads)
    ort.set_global_thread_pool_sizes(arguments.threads, 1)
    device = torch.device("cuda", arguments.rank) if arguments.device == "cuda" else torch.device("cpu")
    if arguments.ranks > 1:
        join_ranks(arguments.folder / "store", arguments.rank, arguments.ranks, device=device)

    def now() -> float:
        return time.process_time() if arguments.clock == "cpu" else time.perf_counter()

    timed = functools.partial(_seconds, device=device, now=now)
    samples = []
    with torch.inference_mode():
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for op in micro_ops(dtype):
            run = runner(op, arguments.runtime, device, cold=True)
            samples.append({"kind": op.kind, "features": op.features, "seconds": timed(run, collective=False)})
        if arguments.ranks > 1:
            product = gemm_op(BEFORE_EXCHANGE, random_tensors(dtype))
            compute = runner(product, arguments.runtime, device, cold=True)
            alone_s = timed(compute, collective=True)
        for rows in EXCHANGES if arguments.ranks > 1 else ():
            exchange = exchange_of(rows, arguments.ranks, dtype, device)
            both_s = timed(functools.partial(_one_after_other, compute, exchange), collective=True)
            features = exchange_features(Exchange(rows=rows, head_dim=HEAD, count=1), arguments.ranks)
            samples.append({"kind": "exchange", "features": features, "seconds": max(both_s - alone_s, LEAST_S)})
    if arguments.rank == 0:
        (arguments.folder / "samples.json").write_text(json.dumps(samples))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """One rank of a calibration."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name in ("rank", "ranks", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--clock", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    _rank_main(parser.parse_args())


if __name__ == "__main__":
    main()
