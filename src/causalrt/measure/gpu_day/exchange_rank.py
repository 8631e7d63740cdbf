"""One rank of the part `exchange`: `python -m causalrt.measure.gpu_day.exchange_rank RANK WORLD_SIZE DEVICE STORE RECIPE`.

It writes one line of JSON: the faults that the self-test has found, and microseconds of the all-to-alls of a layer.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from causalrt.config import override
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.streams import own_stream
from causalrt.layout import layout_from_config
from causalrt.recipes import recipe
from causalrt.runtime.canary import check_exchanges
from causalrt.runtime.collectives import TorchCollectives, join_ranks

ROUNDS, CALLS = 20, 10


def microseconds(exchange: Callable[[], None], device: torch.device) -> float:
    """Of one call, when some are queued one after another: the median round."""

    def idle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    exchange()
    found = []
    for _ in range(ROUNDS):
        dist.barrier()
        idle()
        start = time.perf_counter()
        for _ in range(CALLS):
            exchange()
        idle()
        found.append(1e6 * (time.perf_counter() - start) / CALLS)
    return statistics.median(found)


def main() -> None:
    """Join the other ranks, check, measure."""
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    on_gpu = sys.argv[3] == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    changes = {"build.world_size": str(world_size), "build.precision": "bfloat16" if on_gpu else "float32"}
    config = override(recipe(sys.argv[5]), changes)
    if on_gpu:
        torch.cuda.set_device(device)
    own_stream(device).__enter__()  # until the process ends
    join_ranks(Path(sys.argv[4]), rank, world_size, device=device)
    collectives, dtype = TorchCollectives(), TORCH_DTYPES[config.build.precision]
    checks = check_exchanges(collectives, config, dtype=dtype, device=device)
    layout, times = layout_from_config(config), {}
    for name, rows in (("before attention", layout.scatter_rows), ("after attention", layout.gather_rows)):
        sent = torch.zeros(world_size, rows, config.model.head_dim, dtype=dtype, device=device)
        received = torch.empty_like(sent)

        def exchange(sent: torch.Tensor = sent, received: torch.Tensor = received) -> None:
            collectives.all_to_all(received, sent)

        times[name] = {"bytes": sent.nbytes, "us": microseconds(exchange, device)}
    faults = [check.fault for check in checks if check.fault]
    sys.stdout.write(json.dumps({"rank": rank, "faults": faults, "times": times}) + "\n")
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
