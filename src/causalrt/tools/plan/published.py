"""Published figures of this very model beside the predictions of the planner; nothing was fitted to them.

All times are for 12 frames at 832x480, without text and, where the source separates the parts, without decoding.
"""

from dataclasses import asdict, dataclass
from typing import Any

from causalrt.config import Config, override
from causalrt.recipes import recipe
from causalrt.tools.plan.assumptions import Estimate, over_bounds
from causalrt.tools.plan.hardware import GPUS, VaePlace
from causalrt.tools.plan.predict import Forecast, forecast
from causalrt.tools.plan.roofline import GpuMachine, Lowering

ON_A100 = "NVIDIA/flashdreams, PERFORMANCE.md at 17f114c: one A100, last of 7 chunks"
ON_H100 = (
    "NVIDIA/flashdreams, perf-0521.json and benchmarks page: one H100, median from the third chunk on (here: the fifth of 7), "
    "context pass left out, TAEHV (some 5 ms, unknown) included"
)
ON_8_A800 = "arXiv 2603.06664, abstract: 8 x A800, 5-second 480P video"

MACHINES: tuple[tuple[str, Lowering], ...] = (("a100", "runtime"), ("h100", "runtime"), ("h100", "eager"))
"""The machines of the first five figures: one GPU each, by our runtime, and by the official code."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published figure beside its prediction; `note` says what makes the comparison less than exact."""

    what: str
    unit: str
    published: float
    predicted: Estimate
    source: str
    note: str = ""

    @property
    def error(self) -> float:
        """Relative error of the nominal prediction."""
        return self.predicted.nominal / self.published - 1

    @property
    def inside(self) -> bool:
        """Whether the published figure lies within the error bars."""
        low, high = sorted((self.predicted.best, self.predicted.worst))
        return low <= self.published <= high

    def as_dict(self) -> dict[str, Any]:
        """The comparison in plain JSON types."""
        return {**asdict(self), "error": self.error, "inside": self.inside}


def compare_published() -> list[Comparison]:
    """Compare all published figures with predictions."""
    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})
    a100, h100, official = (_one_gpu(config, gpu, lowering) for gpu, lowering in MACHINES)
    last, third, ms = a100.chunks[-1].step_s, a100.chunks[2].step_s, 1e3
    one, eight = (_a800(config, ranks, "shared") for ranks in (1, 8))
    speedup = over_bounds(lambda bound: eight.frames_per_second.at(bound) / one.frames_per_second.at(bound))
    ours, theirs = (
        (each.chunks[4].denoise_s.scaled(ms), f"the last chunk instead: {ms * each.chunks[-1].denoise_s.nominal:.0f}")
        for each in (h100, official)
    )
    reading = "the abstract does not say over what; one GPU with the same kernels and VAE is our reading"
    both, also = "one A100: four steps and context pass of the last chunk", "one A100: the same for the third chunk"
    return [
        Comparison("one A100: context pass of the last chunk (one forward)", "ms", 254.318, last.scaled(ms), ON_A100),
        Comparison(both, "ms", 1057.509 + 254.318, last.scaled(5 * ms), ON_A100, "1.325 s with 13.5 ms of TAEHV"),
        Comparison(also, "ms", 642.681 + 150.875, third.scaled(5 * ms), ON_A100),
        Comparison("one H100: four steps", "ms", 344, ours[0], ON_H100, ours[1]),
        Comparison(
            "one H100: four steps, official code",
            "ms",
            432,
            theirs[0],
            ON_H100,
            f"predicted as our eager; {theirs[1]}",
        ),
        Comparison("8 x A800: speed-up of a video, VAE not split", "x", 1.58, speedup, ON_8_A800, reading),
    ]


def _one_gpu(config: Config, gpu: str, lowering: Lowering) -> Forecast:
    machine = GpuMachine(gpu=GPUS[gpu], lowering=lowering)
    return forecast(config, machine, "balanced", world_size=1, executor="inductor")


def _a800(config: Config, world_size: int, vae: VaePlace) -> Forecast:
    machine = GpuMachine(gpu=GPUS["a800"], lowering="runtime")
    return forecast(config, machine, "padded", world_size=world_size, executor="eager", vae=vae)
