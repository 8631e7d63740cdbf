"""The machine: what `causalrt doctor` says, and what the measurements are of."""

import torch

from causalrt.measure.bench.machine import describe_machine, describe_moment
from causalrt.measure.gpu_day.book import Book
from causalrt.tools.doctor import examine


def run(book: Book) -> None:
    """Write down the machine before anything else is tried."""
    found, device = examine(), book.device.type
    for name, value in {**describe_machine(device), **describe_moment(device), **found["machine"]}.items():
        book.fact(name, value)
    for what, answer in found["can"].items():
        book.row("what this machine can do", what=what, ok=answer["ok"], detail=answer["detail"])
    if device == "cpu":
        book.headline("machine", "Nothing here was measured on a GPU: this was a trial of every part on a CPU.")
        return
    properties = torch.cuda.get_device_properties(book.device)
    book.fact("memory GiB", round(properties.total_memory / 2**30, 1))
    book.headline(
        "machine",
        f"{torch.cuda.device_count()} x {properties.name} (compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB), torch {torch.__version__}, CUDA {torch.version.cuda}.",
    )
