"""How much of their makers' figures GPUs reach: published spreads, fixed before any prediction was compared with anything.

The rule is the same everywhere: best and worst are the ends of what others have published, and nominal is the middle. Where
only one end is published, the other is our own guess and says so. None of it comes from the figures in `published.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from causalrt.tools.plan.hardware import Architecture, LinkKind

Bound = Literal["best", "nominal", "worst"]
BOUNDS: tuple[Bound, ...] = ("best", "nominal", "worst")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A quantity under the best, the nominal and the worst assumptions; best makes the machine fast."""

    best: float
    nominal: float
    worst: float

    def at(self, bound: Bound) -> float:
        """The value under one kind of assumptions."""
        value: float = getattr(self, bound)
        return value

    def scaled(self, factor: float) -> "Estimate":
        """The estimate times `factor`."""
        return Estimate(best=self.best * factor, nominal=self.nominal * factor, worst=self.worst * factor)

    def text(self, factor: float = 1.0, digits: int = 0, to: str = "-") -> str:
        """The nominal value and the range, times `factor`."""
        low, high = sorted((factor * self.best, factor * self.worst))
        return f"{factor * self.nominal:.{digits}f} ({low:.{digits}f}{to}{high:.{digits}f})"


def between(best: float, worst: float) -> Estimate:
    """The estimate for a published spread: nominal is the middle."""
    return Estimate(best=best, nominal=(best + worst) / 2, worst=worst)


def over_bounds(compute: Callable[[Bound], float]) -> Estimate:
    """A quantity that is computed with every assumption at one end, in the middle, and at the other end."""
    return Estimate(best=compute("best"), nominal=compute("nominal"), worst=compute("worst"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Fractions of a GPU's tensor rate that are reached.

    Attributes:
        gemm: by matrix products whose tiles fill the GPU. Best is the "maximum achievable matmul" of stas00/ml-engineering
            (compute/accelerator); worst, a fifth less, is our guess for depths of 1536 and epilogues.
        attention: by the forward of the best library, at heads of 128 channels and long sequences.
        gemm_source: source of `gemm`.
        attention_source: source of `attention`.
    """

    gemm: Estimate
    attention: Estimate
    gemm_source: str
    attention_source: str


def _gemm(measured: float) -> Estimate:
    return between(measured, 0.8 * measured)


REACHED: Mapping[Architecture, Efficiency] = {
    "ampere": Efficiency(
        gemm=_gemm(0.869),
        attention=between(0.73, 0.50),
        gemm_source="A100 SXM: 271.2 of 312 TFLOP/s",
        attention_source="FlashAttention-2 on A100, arXiv 2307.08691: 50 to 73 %",
    ),
    "hopper": Efficiency(
        gemm=_gemm(0.803),
        attention=between(0.748, 0.571),
        gemm_source="H100 SXM, H200: 794.5 of 989 TFLOP/s",
        attention_source="FlashAttention-3 on H100: 740 TFLOP/s (arXiv 2407.08608) to 565 (pytorch/benchmark pull 2391)",
    ),
    "blackwell": Efficiency(
        gemm=_gemm(0.776),
        attention=between(0.71, 0.50),
        gemm_source="B200 SXM: 1745 of 2250 TFLOP/s",
        attention_source="FlashAttention-4 on B200 as its authors give it (71 %); worst end our guess",
    ),
    "blackwell_rtx": Efficiency(
        gemm=_gemm(0.869),
        attention=between(0.73, 0.50),
        gemm_source="our guess: as A100, whose kind of tensor instruction it has",
        attention_source="our guess: FlashAttention-2 as on A100, whose kind of tensor instruction it has",
    ),
}

MEMORY = between(0.90, 0.75)
"""Fraction of the memory's bandwidth: Calculon's A100 model (systems/a100_80g.json), transfers of 100 MB and of 10 MB."""

LINK_FRACTION: Mapping[LinkKind, Estimate] = {
    # NCCL's maintainers: 370 of 450 GB/s (NVIDIA/nccl-tests issue 212); Calculon's A100 model: 0.65.
    "nvlink": between(0.82, 0.65),
    # Our guess: half for two copies through host memory, half of that again where root ports are shared.
    "pcie": between(0.50, 0.25),
}
LINK_LATENCY_S: Mapping[LinkKind, Estimate] = {
    # A small all-to-all on the 8 GPUs of a server: 10.4 us (deepseek-ai/DeepEP issue 303, H20); 40 us is our guess for NCCL in
    # a process that has other work on the GPU.
    "nvlink": between(10.4e-6, 40e-6),
    # 12 us on two RTX 4090 (tinygrad/open-gpu-kernel-modules issue 17); worst end our guess.
    "pcie": between(12e-6, 60e-6),
}
NETWORK_FRACTION = between(0.92, 0.65)
"""Best: 46 of 50 GB/s over two servers (deepseek-ai/DeepEP issue 3); worst as within a server."""
NETWORK_LATENCY_S = between(30e-6, 60e-6)
"""Best: deepseek-ai/DeepEP issue 3; worst is our guess."""

KERNEL_GAP_S = between(0.5e-6, 2.0e-6)
"""Gap between two kernels of a CUDA graph, ramp up and down included: our guess, around NVIDIA's figures for CUDA graphs
(3.4 us for a kernel of 2.9 us)."""
HOST_LAUNCH_S = between(4e-6, 10e-6)
"""Host time of one op in eager torch, which is hidden as long as the GPU is slower: our guess."""

TILE_EFFICIENCY: Mapping[tuple[int, int], float] = {
    (256, 128): 1.0,
    (128, 256): 1.0,
    (128, 128): 0.95,
    (64, 256): 0.85,
    (128, 64): 0.80,
    (64, 128): 0.80,
    (64, 64): 0.65,
}
"""Tiles that a library chooses from, and the fraction that each reaches: smaller tiles reuse less. NVIDIA's guide to matrix
products gives this order; the numbers are our guess."""
MOST_K_SPLITS = 4
"""Ranges of the inner dimension that a library may give to different multiprocessors."""

DECODE_SPREAD = 0.3
"""Fraction by which the rate of the VAE may be off, either way: there is one measurement for each architecture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredDecode:
    """A published time of Wan2.1's VAE decoder in bfloat16."""

    gpu: str
    seconds: float
    latent_height: int
    latent_width: int
    latent_frames: int
    source: str


MEASURED_DECODES: Mapping[Architecture, MeasuredDecode] = {
    "ampere": MeasuredDecode(
        gpu="a800",
        seconds=10.336,
        latent_height=90,
        latent_width=160,
        latent_frames=21,
        source="nono-Sang/FastVAE: 5 s of 720p, one A800 (2.240 s on eight)",
    ),
    "hopper": MeasuredDecode(
        gpu="h100",
        seconds=26.14,
        latent_height=60,
        latent_width=104,
        latent_frames=120,
        source="NVlabs/LongLive issue 26: 477 frames on an H100; all of 56.6 s but diffusion is taken for decoding",
    ),
}
"""Architectures without an entry take the fraction of the newest that has one."""
SPLIT_DECODE_SPEEDUP: Mapping[int, float] = {1: 1.0, 2: 10.336 / 6.158, 4: 10.336 / 3.561, 8: 10.336 / 2.240}
"""By ranks, the speedup of a decoder split over them by rows: nono-Sang/FastVAE on A800. The runtime cannot do it yet."""
