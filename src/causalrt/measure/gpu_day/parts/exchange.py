"""All-to-alls between the GPUs of this machine, with a rank process on each: where rows arrive, and how long that takes."""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from causalrt.config import override
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.streams import own_stream
from causalrt.layout import layout_from_config
from causalrt.measure.gpu_day.predictions import columns, planner_for
from causalrt.measure.gpu_day.recorder import Recorder, SkippedError
from causalrt.recipes import recipe
from causalrt.runtime.canary import check_exchanges
from causalrt.runtime.collectives import TorchCollectives
from causalrt.tools.ops.rank_processes import Rank, RankProcesses, serve
from causalrt.tools.ops.timing import call_all, seconds_of

TABLE = "microseconds of an all-to-all"
ROUNDS, CALLS = 20, 10


def run(recorder: Recorder) -> None:
    """Measure two ranks first, then as many as there are GPUs.

    Raises:
        SkippedError: there is one GPU.
    """
    gpus = 2 if recorder.dry_run else torch.cuda.device_count()
    if gpus < 2:
        raise SkippedError("there is one GPU; NCCL takes no two ranks on it, and the part `ranks` stands in for that")
    for world_size in sorted({2, gpus}):
        with recorder.attempt(f"{world_size} ranks"):
            _measure(recorder, world_size)


def _measure(recorder: Recorder, world_size: int) -> None:
    name = "tiny" if recorder.dry_run else "wan_1_3b_480p"
    what, task = f"the exchange between {world_size} ranks", {"recipe": name}
    with RankProcesses(__name__, world_size, device=recorder.device.type, threads=1, task=task, what=what) as processes:
        processes.wait_ready()
        found = processes.ask()
    faults = [fault for rank in found for fault in rank["faults"]]
    for fault in faults:
        recorder.wrong(f"{world_size} ranks: {fault}")
    planner, config = planner_for(recorder), override(recipe(name), {"build.world_size": str(world_size)})
    for index, which in enumerate(found[0]["times"]):
        recorder.row(
            TABLE,
            ranks=world_size,
            which=which,
            bytes=found[0]["times"][which]["bytes"],
            us=max(rank["times"][which]["us"] for rank in found),
            **columns(planner.exchange(config, index=index), "us"),
            **{"self-test": "failed" if faults else "ok"},
        )
    slowest = max(rank["times"]["before attention"]["us"] for rank in found)
    recorder.headline("exchange", f"The exchange before attention takes {slowest:.0f} us between {world_size} ranks.")


def _prepare(rank: Rank) -> Callable[[], dict[str, Any]]:
    """In a rank process: check where rows arrive, and time the all-to-alls of a layer."""
    device = rank.device
    own_stream(device).__enter__()  # until the process ends
    precision = "bfloat16" if device.type == "cuda" else "float32"
    changes = {"build.world_size": str(rank.world_size), "build.precision": precision}
    config = override(recipe(rank.task["recipe"]), changes)
    collectives, dtype, layout = TorchCollectives(), TORCH_DTYPES[precision], layout_from_config(config)

    def measure() -> dict[str, Any]:
        checks = check_exchanges(collectives, config, dtype=dtype, device=device)
        times = {}
        for name, rows in (("before attention", layout.scatter_rows), ("after attention", layout.gather_rows)):
            sent = torch.zeros(rank.world_size, rows, config.model.head_dim, dtype=dtype, device=device)
            exchange = functools.partial(collectives.all_to_all, torch.empty_like(sent), sent)
            times[name] = {"bytes": sent.nbytes, "us": _microseconds(exchange, device)}
        return {"faults": [check.fault for check in checks if check.fault], "times": times}

    return measure


def _microseconds(exchange: Callable[[], None], device: torch.device) -> float:
    """The time of one call while several are queued: the median round."""
    exchange()
    found = []
    for _ in range(ROUNDS):
        dist.barrier()
        found.append(1e6 * seconds_of(functools.partial(call_all, [exchange] * CALLS), device) / CALLS)
    return statistics.median(found)


if __name__ == "__main__":
    serve(_prepare)
