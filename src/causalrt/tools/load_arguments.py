"""Arguments that every command has which loads an engine."""

import argparse


def add_cuda_graphs(parser: argparse.ArgumentParser, *, both: bool = False) -> None:
    """Add `--cuda-graphs on|off`; with `both`, a command that measures may be told to do the one and the other."""
    parser.add_argument(
        "--cuda-graphs",
        choices=("on", "off", "both") if both else ("on", "off"),
        default="on",
        help="capture the steps of inductor and TensorRT on a GPU, which makes them faster (on)",
    )
