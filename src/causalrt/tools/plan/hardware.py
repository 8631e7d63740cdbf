"""The table of GPUs: figures of their makers, with their sources.

Rates are dense, for bfloat16 and float16 with float32 sums. Bandwidths are decimal, and those of links count one direction. How
much of these figures is reached is in `assumptions.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from causalrt.errors import ConfigError

Architecture = Literal["ampere", "hopper", "blackwell", "blackwell_rtx"]
LinkKind = Literal["nvlink", "pcie"]
VaePlace = Literal["none", "own", "shared", "split"]
"""Where the VAE decodes (see `predict.py`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU in the server that it is usually found in; `link_gbs` and `network_gbs` are GB/s of one GPU in one direction."""

    name: str
    architecture: Architecture
    capability: int
    num_multiprocessors: int
    tensor_tflops: float
    memory_gbs: float
    memory_gb: float
    link_gbs: float
    network_gbs: float
    source: str
    link: LinkKind = "nvlink"
    gpus_per_server: int = 8

    @property
    def target(self) -> str:
        """Its architecture as a build target, for example `sm80`."""
        return f"sm{self.capability}"


GPUS: Mapping[str, Gpu] = {
    "a800": Gpu(
        name="A800 SXM4 80GB",
        architecture="ampere",
        capability=80,
        num_multiprocessors=108,
        tensor_tflops=312,
        memory_gbs=2039,
        memory_gb=80,
        link_gbs=200,
        network_gbs=25,
        source="NVIDIA A800 80GB data sheet: an A100 with NVLink at 400 GB/s, both ways; 200 Gbit/s network a GPU, as DGX A100",
    ),
    "a100": Gpu(
        name="A100 SXM4 80GB",
        architecture="ampere",
        capability=80,
        num_multiprocessors=108,
        tensor_tflops=312,
        memory_gbs=2039,
        memory_gb=80,
        link_gbs=300,
        network_gbs=25,
        source="NVIDIA A100 80GB data sheet and Ampere white paper; one 200 Gbit/s port a GPU as in DGX A100",
    ),
    "h100": Gpu(
        name="H100 SXM5 80GB",
        architecture="hopper",
        capability=90,
        num_multiprocessors=132,
        tensor_tflops=989.4,
        memory_gbs=3350,
        memory_gb=80,
        link_gbs=450,
        network_gbs=50,
        source="NVIDIA H100 data sheet and Hopper white paper; one 400 Gbit/s port a GPU as in DGX H100",
    ),
    "h200": Gpu(
        name="H200 SXM5 141GB",
        architecture="hopper",
        capability=90,
        num_multiprocessors=132,
        tensor_tflops=989.4,
        memory_gbs=4800,
        memory_gb=141,
        link_gbs=450,
        network_gbs=50,
        source="NVIDIA H200 data sheet; one 400 Gbit/s port a GPU as in DGX H200",
    ),
    "b200": Gpu(
        name="B200 SXM 180GB",
        architecture="blackwell",
        capability=100,
        num_multiprocessors=148,
        tensor_tflops=2250,
        memory_gbs=8000,
        memory_gb=180,
        link_gbs=900,
        network_gbs=50,
        source="NVIDIA HGX B200 data sheet (1,000 W); multiprocessors as its driver reports them",
    ),
    "rtx5090": Gpu(
        name="GeForce RTX 5090 32GB",
        architecture="blackwell_rtx",
        capability=120,
        num_multiprocessors=170,
        tensor_tflops=209.5,
        memory_gbs=1792,
        memory_gb=32,
        link="pcie",
        link_gbs=64,
        network_gbs=25,
        source="NVIDIA RTX Blackwell white paper; PCIe 5.0 x16, and no direct access from GPU to GPU",
    ),
}


def gpu_by_name(name: str) -> Gpu:
    """The GPU of that name in the table.

    Raises:
        ConfigError: the table has no such GPU; the message lists those that it has.
    """
    if name not in GPUS:
        raise ConfigError(
            f"no GPU {name!r} in the table, which has {', '.join(GPUS)}; measure a machine that has one: `--calibrate FILE`"
        )
    return GPUS[name]


def known_gpu(name: str) -> Gpu | None:
    """The GPU that torch or the driver calls `name`; None if the table does not have it."""
    plain = name.lower().replace(" ", "").replace("-", "")
    return next((gpu for key, gpu in GPUS.items() if key in plain), None)
