"""The request of `causalrt compare`, which is its command line; importing it is cheap, unlike importing what compares."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from causalrt.config import TimeIndex
from causalrt.options import EXECUTION, FUSED_OPS, INPUT, OUTPUT, CudaGraphs, Dtype, Executor, HeadPlan, Json, OnOff

CERTIFICATE = Parameter(group=Group("Certificate of a bundle", sort_key=4))
RECORDING = Parameter(group=Group("Replay of a recording", sort_key=5))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class CompareRequest:
    """What to compare with eager: a bundle, or a recorded rollout.

    Attributes:
        bundle: Bundle to certify.
        recorded: Recorded rollout (.safetensors) to replay in place of certifying a bundle.
        executor: Executor to compare; by default the best that the bundle was built for, and onnxruntime for recordings.
        world_size: Number of ranks; by default that of the bundle, and 1 for recordings.
        device: Device of the executor; by default the CPU, if the executor runs there.
        cuda_graphs: see `CudaGraphs`.
        emulate: Build the graphs of TensorRT without a GPU, and run them with ONNX Runtime, all ranks in one process.
        checkpoint: Checkpoint that the bundle was built from, to compare every weight with.
        chunks: Number of chunks of the rollouts; by default up to the first one after an eviction.
        seed: Seed of noise and prompts; 0 by default.
        no_processes: Leave out the rank processes and the self-test of their exchange.
        bisect: Find where the largest difference arises, even if the bundle passes.
        head_plan: see `HeadPlan`.
        fused_ops: Compute self-attention with the fused ops; off by default.
        time_index: What rotary angles count time by; global by default. With relative, keys are rotated when they are read.
        dtype: Type of weights and activations with --emulate; fp32 by default.
        collectives: What exchanges data between ranks with --emulate; the engine by default.
        out: Folder of the certificate: JSON, Markdown, a picture, and files for Polygraphy.
        json: see `Json`.
    """

    bundle: Annotated[Path | None, Parameter(group=INPUT)] = field(default=None, kw_only=False)
    recorded: Annotated[Path | None, Parameter(group=INPUT, metavar="FILE")] = None
    executor: Executor | None = None
    world_size: Annotated[int | None, Parameter(group=EXECUTION)] = None
    device: Annotated[Literal["cuda", "cpu"] | None, CERTIFICATE] = None
    cuda_graphs: CudaGraphs = "on"
    emulate: Annotated[bool, Parameter(group=EXECUTION)] = False
    checkpoint: Annotated[Path | None, CERTIFICATE] = None
    chunks: Annotated[int | None, CERTIFICATE] = None
    seed: Annotated[int | None, CERTIFICATE] = None
    no_processes: Annotated[bool, CERTIFICATE] = False
    bisect: Annotated[bool, CERTIFICATE] = False
    head_plan: Annotated[HeadPlan | None, RECORDING] = None
    fused_ops: Annotated[OnOff | None, RECORDING, FUSED_OPS] = None
    time_index: Annotated[TimeIndex | None, RECORDING] = None
    dtype: Annotated[Dtype | None, RECORDING] = None
    collectives: Annotated[Literal["engine", "runtime"] | None, RECORDING] = None
    out: Annotated[Path | None, Parameter(group=OUTPUT, metavar="FOLDER")] = None
    json: Json = False
