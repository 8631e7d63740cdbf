"""Chunk steps of executors on one GPU (or, to try it out, on the CPU), random weights at the recipe's own size.

    python benchmarks/gpu_steps.py --recipe wan_1_3b_480p --executors eager inductor --dtype bf16
    python benchmarks/gpu_steps.py --recipe bench_cpu --executors eager inductor --dtype fp32 --device cpu --repeats 2

`causalrt gpu-day --parts steps` measures the usual sides with the planner's predictions beside them; this is for other recipes.
A line of JSON for each side and number of filled KV rows; `measure/gpu_day/steps.py` says what is in it.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from causalrt.config import override
from causalrt.engines.streams import own_stream
from causalrt.measure.gpu_day.steps import StepSession, compare_steps, eager, inductor, noise_of, random_bundle
from causalrt.recipes import recipe

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SIDES = {
    "eager": eager(),
    "eager-plugins": eager(plugins=True),
    "inductor": inductor(),
    "inductor-nograph": inductor(cuda_graphs=False),
    "inductor-plugins": inductor(plugins=True),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="wan_1_3b_480p")
    parser.add_argument("--executors", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    changes = {"build.precision": DTYPES[args.dtype], **dict(change.split("=", 1) for change in args.set)}
    config = override(recipe(args.recipe), changes)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="causalrt-bench-") as folder, torch.no_grad(), own_stream(device):
        bundle = random_bundle(config, Path(folder) / "bundle", device=device)
        sessions = {side: StepSession(SIDES[side], bundle, device) for side in args.executors}
        for rows in compare_steps(sessions, config, noise_of(bundle, device), repeats=args.repeats):
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
