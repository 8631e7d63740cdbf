"""The arguments of `causalrt bench`, apart from what it computes, whose imports every other command would wait for."""

import argparse
from pathlib import Path

from causalrt.tools.load_arguments import add_cuda_graphs

REPEATS = 5
"""The fewest whose ratios can show a difference (`verdicts.py`)."""


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names none; leave it out for all")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers, separated by commas, not {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments beside overrides, dtype and `--json`."""
    parser.add_argument(
        "bundles", nargs="*", type=Path, metavar="BUNDLE", help="of one model, each for a number of ranks"
    )
    parser.add_argument("--recipe", help="or a recipe, with random weights (bench_cpu, where no bundle is given)")
    parser.add_argument("--executors", type=_names, metavar="A,B", help="(all that can run here)")
    parser.add_argument(
        "--world-sizes", type=_numbers, metavar="P,P", help="ranks (those of the bundles; 1 and 2, or 1 and all GPUs)"
    )
    parser.add_argument(
        "--plugins", choices=("on", "off", "both"), help="fused ops in eager and inductor (as the bundle was built)"
    )
    add_cuda_graphs(parser, both=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="of all ranks (GPUs where there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads, divided among the ranks of a side (all cores)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"that count, after one that does not ({REPEATS})")
    parser.add_argument("--chunks", type=int, help="of each video (as many as the horizon holds)")
    parser.add_argument("--seed", type=int, default=0, help="of noise, weights and the order of turns (0)")
    parser.add_argument("--no-vae", action="store_true", help="latents only, though the bundles have a VAE")
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure single ops, nor fractions of them")
    parser.add_argument("--no-picture", action="store_true", help="write no bench.png")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of bench.json and bench.png (bench)")
