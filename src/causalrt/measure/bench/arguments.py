"""The request of `causalrt bench`, which is its command line; importing it is cheap, unlike importing the benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from causalrt.options import EXECUTION, FUSED_OPS, INPUT, OUTPUT, Dtype, Json, Names, Numbers, Overrides

REPEATS = 5
"""The fewest repeats whose ratios can show a difference (see `report.median_interval`)."""
MEASUREMENT = Parameter(group=Group("Measurement", sort_key=4))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """What to measure and where to write the report.

    Attributes:
        bundles: Bundles of one model, each built for another number of ranks. Without any, a recipe is built.
        recipe: Recipe to build with random weights in place of bundles; bench_cpu by default.
        dtype: Type of weights and activations of the recipe; fp32 by default, and bf16 with TensorRT.
        overrides: see `Overrides`.
        executors: Executors to measure, separated by commas; by default all that can run here.
        world_sizes: Numbers of ranks, separated by commas. By default those of the bundles; for a recipe 1 and 2, or 1 and the
            number of GPUs.
        fused_ops: Use the fused ops in eager and inductor; by default as the bundle was built.
        cuda_graphs: Capture the steps of inductor and TensorRT as CUDA graphs on a GPU.
        device: Device of all ranks; GPUs by default, if there are any.
        threads: CPU threads, divided among the ranks of a row; by default all cores.
        repeats: Measured videos, after one that warms up.
        chunks: Chunks of each video; by default as many as the horizon holds.
        seed: Seed of the noise, of random weights, and of the order in which the rows take turns.
        vae: Decode frames if the bundles have a VAE, which is the default, or measure latents only.
        ceilings: Measure single ops, too, which is the default, or leave them out.
        picture: Draw bench.png, which is the default, or leave it out.
        out: Folder of bench.json and bench.png.
        json: see `Json`.
    """

    bundles: Annotated[Sequence[Path], Parameter(group=INPUT)] = field(default=(), kw_only=False)
    recipe: Annotated[str | None, Parameter(group=INPUT)] = None
    dtype: Annotated[Dtype | None, Parameter(group=INPUT)] = None
    overrides: Overrides = ()
    executors: Annotated[Names | None, Parameter(group=EXECUTION, metavar="NAME,NAME")] = None
    world_sizes: Annotated[Numbers | None, Parameter(group=EXECUTION, metavar="P,P")] = None
    fused_ops: Annotated[Literal["on", "off", "both"] | None, Parameter(group=EXECUTION), FUSED_OPS] = None
    cuda_graphs: Annotated[Literal["on", "off", "both"], Parameter(group=EXECUTION)] = "on"
    device: Annotated[Literal["cuda", "cpu"] | None, Parameter(group=EXECUTION)] = None
    threads: Annotated[int | None, Parameter(group=EXECUTION)] = None
    repeats: Annotated[int, MEASUREMENT] = REPEATS
    chunks: Annotated[int | None, MEASUREMENT] = None
    seed: Annotated[int, MEASUREMENT] = 0
    vae: Annotated[bool, MEASUREMENT, Parameter(negative="--no-vae")] = True
    ceilings: Annotated[bool, MEASUREMENT, Parameter(negative="--no-ceilings")] = True
    picture: Annotated[bool, Parameter(group=OUTPUT, negative="--no-picture")] = True
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path("bench")
    json: Json = False
