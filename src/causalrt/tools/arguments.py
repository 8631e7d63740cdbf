"""The requests of `causalrt generate` and `causalrt demo`, which are their command lines; importing them is cheap."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from causalrt.options import (
    EXECUTION,
    FUSED_OPS,
    INPUT,
    OUTPUT,
    CudaGraphs,
    Device,
    Executor,
    Json,
    OnOff,
    TextDevice,
    TextEncoder,
    Threads,
    Timeout,
)

PROMPT = "a red circle bounces sideways quickly"
EXAMPLES = (
    PROMPT,
    "a blue square bounces up and down slowly",
    "a yellow triangle moves up quickly",
    "a cyan circle turns clockwise slowly",
)
ABOUT = (
    "This is the small demo model that ships with CausalRT: it knows coloured shapes and how they move, and nothing else. "
    "To serve another: causalrt serve BUNDLE."
)
ROWS = tuple((executor, world_size) for executor in ("eager", "onnxruntime") for world_size in (1, 2, 8))
"""Executors and numbers of ranks of the demo."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """What to generate, and how.

    Attributes:
        bundle: Folder of the compiled bundle.
        prompt: What to show, as text; needs --text-encoder.
        prompt_embeds: File of the prompt's embeddings in place of text, [rows, text_dim] as .safetensors, .npy or .pt.
        text_encoder: see `TextEncoder`.
        given: What the video begins with: latents as --out writes them, an image, or a clip.
        given_part: Which frames of a clip that leaves no room for --chunks are used; by default such a clip is refused.
        background: Colour behind transparent parts of an image or clip, in CSS, for example black or #102030.
        switches: Change the prompt from this chunk on, in the same form as the first prompt; may be repeated.
        switch_policy: What happens to the history when the prompt changes: it is kept, recomputed under the new prompt, or
            dropped.
        seed: Seed of the noise.
        chunks: Number of chunks; by default as many as the horizon holds. With time_index=relative there is no limit.
        warm: Afterwards begin a second video on the warm ranks, and report how long its first frame took.
        executor: Executor that the ranks use; by default the best of those that the bundle was built for.
        device: see `Device`.
        fused_ops: Use the fused ops in eager and inductor; by default as the bundle was built.
        cuda_graphs: see `CudaGraphs`.
        threads: see `Threads`.
        timeout: see `Timeout`.
        text_device: see `TextDevice`.
        out: MP4 file, or .safetensors file of latents; it includes what the video begins with.
        json: see `Json`.
    """

    bundle: Annotated[Path, Parameter(group=INPUT)] = field(kw_only=False)
    prompt: Annotated[str | None, Parameter(group=INPUT)] = None
    prompt_embeds: Annotated[Path | None, Parameter(group=INPUT, metavar="FILE")] = None
    text_encoder: TextEncoder | None = None
    given: Annotated[Path | None, Parameter(group=INPUT, metavar="FILE")] = None
    given_part: Annotated[Literal["first", "last"] | None, Parameter(group=INPUT)] = None
    background: Annotated[str, Parameter(group=INPUT, metavar="COLOUR")] = "white"
    switches: Annotated[Sequence[str], Parameter(name="--switch", metavar="CHUNK=PROMPT")] = ()
    switch_policy: Literal["keep", "recache", "flush"] = "keep"
    seed: int = 0
    chunks: int | None = None
    warm: bool = False
    executor: Executor | None = None
    device: Device | None = None
    fused_ops: Annotated[OnOff | None, Parameter(group=EXECUTION), FUSED_OPS] = None
    cuda_graphs: CudaGraphs = "on"
    threads: Threads | None = None
    timeout: Timeout | None = None
    text_device: TextDevice = "cpu"
    out: Annotated[Path, Parameter(group=OUTPUT, metavar="FILE")]
    json: Json = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRequest:
    """What the demo model shows.

    Attributes:
        prompt: What to show, in the words that the model knows.
        chunks: Number of chunks of three latent frames, 1 to 42.
        seed: Seed of the noise.
        switches: Change the prompt from this chunk on; may be repeated.
        cuda_graphs: see `CudaGraphs`.
        rows: executors and numbers of ranks; the first is what the others are compared with.
        out: Folder of the video and the picture; it is made if it does not exist.
        json: see `Json`.
    """

    prompt: str = PROMPT
    chunks: int = 7
    seed: int = 0
    switches: Annotated[Sequence[str], Parameter(name="--switch", metavar="CHUNK=PROMPT")] = ()
    cuda_graphs: CudaGraphs = "on"
    rows: Annotated[Sequence[tuple[str, int]], Parameter(parse=False)] = ROWS
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path("causalrt-demo")
    json: Json = False
