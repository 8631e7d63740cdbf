"""What `causalrt demo` is asked for, apart from what it computes, whose imports every other command would wait for."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from causalrt.tools.load_arguments import add_cuda_graphs

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
CHUNKS = 7
FOLDER = "causalrt-demo"
ROWS = tuple((executor, world_size) for executor in ("eager", "onnxruntime") for world_size in (1, 2, 8))
"""Executors and numbers of ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRequest:
    """What to show.

    Attributes:
        prompt: in the words that the model knows.
        out: folder of the files; made if it is not there.
        chunks: how many, at most as many as the horizon holds.
        seed: of the noise.
        switches: `CHUNK=TEXT`, other prompts from these chunks on.
        cuda_graphs: capture steps, where an executor can.
        rows: executors and numbers of ranks; the first one is what the others are compared with.
    """

    prompt: str = PROMPT
    out: Path = Path(FOLDER)
    chunks: int = CHUNKS
    seed: int = 0
    switches: Sequence[str] = field(default=())
    cuda_graphs: bool = True
    rows: Sequence[tuple[str, int]] = ROWS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments beside `--json`."""
    parser.add_argument("--prompt", default=PROMPT, help=f"what to show ({PROMPT})")
    parser.add_argument("--out", type=Path, default=Path(FOLDER), help=f"folder of video and picture ({FOLDER})")
    parser.add_argument("--chunks", type=int, default=CHUNKS, help=f"1 to 42, of three latent frames each ({CHUNKS})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument(
        "--switch", action="append", default=[], metavar="CHUNK=TEXT", help="another prompt from this chunk on"
    )
    add_cuda_graphs(parser)


def request_from_arguments(arguments: argparse.Namespace) -> DemoRequest:
    """What they ask for."""
    return DemoRequest(
        prompt=arguments.prompt,
        out=arguments.out,
        chunks=arguments.chunks,
        seed=arguments.seed,
        switches=arguments.switch,
        cuda_graphs=arguments.cuda_graphs == "on",
    )
