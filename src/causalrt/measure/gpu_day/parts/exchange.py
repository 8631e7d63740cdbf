"""All-to-alls between the GPUs of this machine, each with a rank process: where rows arrive, and how long that takes."""

import json
import subprocess

import torch

from causalrt.child_python import python_command, python_environment
from causalrt.config import override
from causalrt.measure.gpu_day.book import Book, SkippedError
from causalrt.measure.gpu_day.predictions import columns, planner_for
from causalrt.recipes import recipe

TABLE = "microseconds of an all-to-all"


def run(book: Book) -> None:
    """Two ranks first, then as many as there are GPUs.

    Raises:
        SkippedError: there is one GPU.
    """
    gpus = 2 if book.dry_run else torch.cuda.device_count()
    if gpus < 2:
        raise SkippedError("there is one GPU; NCCL takes no two ranks on it, and the part `ranks` stands in for that")
    for world_size in sorted({2, gpus}):
        with book.attempt(f"{world_size} ranks"):
            _measure(book, world_size)


def _measure(book: Book, world_size: int) -> None:
    store = book.settings.work / f"store-{world_size}"
    name = "tiny" if book.dry_run else "wan_1_3b_480p"
    command = python_command("causalrt.measure.gpu_day.exchange_rank")
    rest = [str(world_size), book.device.type, str(store), name]
    processes = [
        subprocess.Popen(
            [*command, str(rank), *rest],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=python_environment(GLOO_SOCKET_IFNAME="lo"),
        )
        for rank in range(world_size)
    ]
    said = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"ranks ended with exit codes {codes}; the log says more")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    faults = [fault for rank in found for fault in rank["faults"]]
    for fault in faults:
        book.wrong(f"{world_size} ranks: {fault}")
    planner, config = planner_for(book), override(recipe(name), {"build.world_size": str(world_size)})
    for index, which in enumerate(found[0]["times"]):
        times = [rank["times"][which]["us"] for rank in found]
        book.row(
            TABLE,
            ranks=world_size,
            which=which,
            bytes=found[0]["times"][which]["bytes"],
            us=max(times),
            **columns(planner.exchange(config, index=index), "us"),
            **{"self-test": "failed" if faults else "ok"},
        )
    slowest = max(rank["times"]["before attention"]["us"] for rank in found)
    book.headline("exchange", f"The exchange before attention takes {slowest:.0f} us between {world_size} ranks.")
