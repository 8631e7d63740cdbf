"""One rank of a round of single ops: `python -m causalrt.measure.bench.probe`, started by `ceilings.py`.

When it is ready it writes `[]`. For each line on stdin it runs every op a few times, the ranks beginning each together, and
writes a line of JSON: for each op its kind, its features, and the seconds of its fastest run, for what else the machine does
only adds.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from causalrt.config import config_from_dict
from causalrt.engines.base import TORCH_DTYPES
from causalrt.measure.bench.ceilings import full_work
from causalrt.runtime.collectives import join_ranks
from causalrt.tools.plan.calibration import Features, Runtime, exchange_features
from causalrt.tools.plan.micro_ops import (
    MicroOp,
    attention_op,
    gemm_op,
    random_tensors,
    runner,
    standard_attention_op,
    sum_op,
)
from causalrt.tools.plan.work import StepWork

REPEAT_S = 0.05
LEAST_REPEATS, COLLECTIVE_REPEATS = 2, 20
Run = tuple[str, Features, Callable[[], object]]


def ops_of(work: StepWork, runtime: Runtime, dtype: torch.dtype) -> list[MicroOp]:
    """The products, attentions and a sum of a step, each size once; in ONNX Runtime attention by either operator."""
    random = random_tensors(dtype)
    found = [gemm_op(gemm, random) for gemm in work.gemms]
    attentions = [attention for attention in work.attentions if attention.rows]
    found += [attention_op(attention, random) for attention in attentions]
    if runtime == "onnxruntime":
        found += [standard_attention_op(attention, random) for attention in attentions]
    widest = work.gemms[1]
    return [*found, sum_op(widest.m, widest.n, random)]


def runs_of(work: StepWork, runtime: Runtime, dtype: torch.dtype, device: torch.device) -> list[Run]:
    """What is timed."""
    runs: list[Run] = [(op.kind, op.features, runner(op, runtime, device)) for op in ops_of(work, runtime, dtype)]
    ranks = work.layout.world_size
    for exchange in work.exchanges:
        sent = torch.zeros(ranks, exchange.rows, exchange.head_dim, device=device, dtype=dtype)
        exchanged = functools.partial(dist.all_to_all_single, torch.empty_like(sent), sent)
        runs.append(("exchange", exchange_features(exchange, ranks), exchanged))
    return runs


def seconds(run: Callable[[], object], *, device: torch.device, collective: bool) -> float:
    """Of the fastest of a few runs, of which all ranks do as many where they must."""
    if dist.is_initialized():
        dist.barrier()
    found: list[float] = []
    until = time.perf_counter() + REPEAT_S
    while len(found) < (COLLECTIVE_REPEATS if collective else LEAST_REPEATS) or (
        not collective and time.perf_counter() < until
    ):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    """Serve rounds until stdin ends."""
    import onnxruntime as ort

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ort.set_global_thread_pool_sizes(arguments.threads, 1)
    config = config_from_dict(json.loads((arguments.folder / "config.json").read_text()))
    device = torch.device("cuda", arguments.rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.build.world_size > 1:
        join_ranks(arguments.folder / "store", arguments.rank, config.build.world_size, device=device)
    with torch.inference_mode():
        runs = runs_of(full_work(config), arguments.runtime, TORCH_DTYPES[config.build.precision], device)
        print("[]", flush=True)  # noqa: T201
        for _ in sys.stdin:
            samples = [
                {
                    "kind": kind,
                    "features": features,
                    "seconds": seconds(run, device=device, collective=kind == "exchange"),
                }
                for kind, features, run in runs
            ]
            print(json.dumps(samples), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
