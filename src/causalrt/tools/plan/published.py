"""What others have published about this very model, and what the planner says of the same: nothing was fitted to it.

All times are for 12 frames at 832x480, without text and, where the source tells the parts apart, without decoding.
"""

from dataclasses import asdict, dataclass
from typing import Any

from causalrt.config import Config, override
from causalrt.recipes import recipe
from causalrt.tools.plan.hardware import GPUS, VaePlace
from causalrt.tools.plan.predict import Forecast, forecast
from causalrt.tools.plan.roofline import GpuMachine, Lowering
from causalrt.tools.plan.spans import Estimate, over_cases

FLASHDREAMS_A100 = "NVIDIA/flashdreams, PERFORMANCE.md at 17f114c: one A100, last of 7 chunks"
FLASHDREAMS_H100 = (
    "NVIDIA/flashdreams, perf-0521.json and benchmarks page: one H100, median from the third chunk on (here: the fifth of 7), "
    "refresh left out, TAEHV (some 5 ms, unknown) included"
)
CAUSAL_ROPE_SP = "arXiv 2603.06664, abstract: 8 x A800, 5-second 480P video"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A published figure beside its prediction.

    Attributes:
        what: was measured.
        unit: of the figures.
        published: figure.
        predicted: the same quantity.
        source: of the published one.
        note: what makes the comparison less than exact.
    """

    what: str
    unit: str
    published: float
    predicted: Estimate
    source: str
    note: str = ""

    @property
    def error(self) -> float:
        """Of the nominal prediction, relative to what was published."""
        return self.predicted.nominal / self.published - 1

    @property
    def inside(self) -> bool:
        """The published figure lies within the error bars."""
        low, high = sorted((self.predicted.best, self.predicted.worst))
        return low <= self.published <= high

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "error": self.error, "inside": self.inside}


def compare_published() -> list[Comparison]:
    """All figures that there are."""
    config = override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})
    a100, h100 = _alone(config, "a100", "runtime"), _alone(config, "h100", "runtime")
    official = _alone(config, "h100", "eager")
    last, fifth = a100.chunks[-1], h100.chunks[4]
    one, eight = (_a800(config, ranks, "shared") for ranks in (1, 8))
    return [
        Comparison(
            what="one A100: refresh of the last chunk (one forward)",
            unit="ms",
            published=254.318,
            predicted=last.step_s.scaled(1e3),
            source=FLASHDREAMS_A100,
        ),
        Comparison(
            what="one A100: four steps and refresh of the last chunk",
            unit="ms",
            published=1057.509 + 254.318,
            predicted=last.step_s.scaled(5e3),
            source=FLASHDREAMS_A100,
            note="1.325 s with 13.5 ms of TAEHV",
        ),
        Comparison(
            what="one A100: the same for the third chunk",
            unit="ms",
            published=642.681 + 150.875,
            predicted=a100.chunks[2].step_s.scaled(5e3),
            source=FLASHDREAMS_A100,
        ),
        Comparison(
            what="one H100: four steps",
            unit="ms",
            published=344,
            predicted=fifth.denoise_s.scaled(1e3),
            source=FLASHDREAMS_H100,
            note=f"the last chunk instead: {1e3 * h100.chunks[-1].denoise_s.nominal:.0f}",
        ),
        Comparison(
            what="one H100: four steps, official code",
            unit="ms",
            published=432,
            predicted=official.chunks[4].denoise_s.scaled(1e3),
            source=FLASHDREAMS_H100,
            note=f"predicted as our eager; the last chunk instead: {1e3 * official.chunks[-1].denoise_s.nominal:.0f}",
        ),
        Comparison(
            what="8 x A800: speed-up of a video, VAE not split",
            unit="x",
            published=1.58,
            predicted=over_cases(
                lambda case: eight.frames_per_second.at(case) / one.frames_per_second.at(case)  # one case on both sides
            ),
            source=CAUSAL_ROPE_SP,
            note="the abstract does not say over what; one GPU with the same kernels and VAE is our reading",
        ),
    ]


def _alone(config: Config, gpu: str, lowering: Lowering) -> Forecast:
    machine = GpuMachine(gpu=GPUS[gpu], lowering=lowering)
    return forecast(config, machine, "balanced", world_size=1, executor="inductor")


def _a800(config: Config, world_size: int, vae: VaePlace) -> Forecast:
    machine = GpuMachine(gpu=GPUS["a800"], lowering="runtime")
    return forecast(config, machine, "padded", world_size=world_size, executor="eager", vae=vae)
