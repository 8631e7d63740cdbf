"""The request and the arguments of `causalrt bench`; importing them is cheap, unlike importing what runs the benchmark."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causalrt.tools.load_arguments import add_cuda_graphs

REPEATS = 5
"""The fewest repeats whose ratios can show a difference (see `report.median_interval`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRequest:
    """What to measure and where to write the report; the help of the arguments explains every field and its default."""

    bundles: Sequence[Path] = ()
    recipe: str | None = None
    executors: Sequence[str] | None = None
    world_sizes: Sequence[int] | None = None
    fused_ops: str | None = None
    cuda_graphs: str = "on"
    device: str | None = None
    threads: int | None = None
    repeats: int = REPEATS
    chunks: int | None = None
    seed: int = 0
    vae: bool = True
    ceilings: bool = True
    picture: bool = True
    out: Path = Path("bench")
    json: bool = False


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("the list is empty; leave it out for all")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers, separated by commas, not {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every argument except overrides, dtype and `--json`."""
    parser.add_argument(
        "bundles", nargs="*", type=Path, metavar="BUNDLE", help="bundles of one model, each for another number of ranks"
    )
    parser.add_argument("--recipe", help="measure a recipe with random weights instead (bench_cpu without bundles)")
    parser.add_argument("--executors", type=_names, metavar="A,B", help="executors to measure (all that can run here)")
    parser.add_argument(
        "--world-sizes",
        type=_numbers,
        metavar="P,P",
        help="numbers of ranks (those of the bundles; for a recipe 1 and 2, or 1 and all GPUs)",
    )
    parser.add_argument(
        "--fused-ops",
        "--plugins",
        dest="fused_ops",
        choices=("on", "off", "both"),
        help="fused ops in eager and inductor (as the bundle was built)",
    )
    add_cuda_graphs(parser, both=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="device of all ranks (GPUs if there are any)")
    parser.add_argument("--threads", type=int, help="CPU threads, divided among the ranks of a replica (all cores)")
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help=f"measured rollouts, after one that warms up ({REPEATS})"
    )
    parser.add_argument("--chunks", type=int, help="chunks of each video (as many as the horizon holds)")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise, weights and the order of turns (0)")
    parser.add_argument("--no-vae", dest="vae", action="store_false", help="do not decode, though bundles have a VAE")
    parser.add_argument("--no-ceilings", dest="ceilings", action="store_false", help="do not measure single ops")
    parser.add_argument("--no-picture", dest="picture", action="store_false", help="do not draw bench.png")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of bench.json and bench.png (bench)")


def request_from_arguments(arguments: argparse.Namespace) -> BenchRequest:
    """Take the request from the parsed command line."""
    recipe = arguments.recipe or (None if arguments.bundles else "bench_cpu")
    fields = {name: getattr(arguments, name) for name in BenchRequest.__dataclass_fields__}
    return BenchRequest(**{**fields, "recipe": recipe})
