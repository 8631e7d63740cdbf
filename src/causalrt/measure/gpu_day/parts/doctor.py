"""The machine: the findings of `causalrt doctor`, and what figures are measured on."""

from dataclasses import asdict

import torch

from causalrt.measure.bench.machine import describe_machine, describe_moment
from causalrt.measure.gpu_day.recorder import Recorder
from causalrt.tools.doctor import examine


def run(recorder: Recorder) -> None:
    """Record the machine before anything else is tried."""
    found, device = examine(), recorder.device.type
    for name, value in {
        **asdict(describe_machine(device)),
        **asdict(describe_moment(device)),
        **found["machine"],
    }.items():
        recorder.fact(name, value)
    for what, answer in found["can"].items():
        recorder.row("what this machine can do", what=what, ok=answer["ok"], detail=answer["detail"])
    if device == "cpu":
        recorder.headline("machine", "Nothing here was measured on a GPU: this was a trial of every part on a CPU.")
        return
    properties = torch.cuda.get_device_properties(recorder.device)
    recorder.fact("memory GiB", round(properties.total_memory / 2**30, 1))
    recorder.headline(
        "machine",
        f"{torch.cuda.device_count()} x {properties.name} (compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB), torch {torch.__version__}, CUDA {torch.version.cuda}.",
    )
