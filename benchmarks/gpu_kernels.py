"""The fused kernels on one GPU, beside what torch has: `qk_norm_rope`, `rope_attention`, and the head plans.

    python benchmarks/gpu_kernels.py                             # writes gpu_kernels.json and gpu_kernels.png, prints verdicts
    python benchmarks/gpu_kernels.py --dry-run                   # the cases and their sizes; needs no GPU
    python benchmarks/gpu_kernels.py --sections tune --tune whole whole-rotated
    TRITON_INTERPRET=1 python benchmarks/gpu_kernels.py --device cpu --recipe tiny --dtype fp32 --repeats 2 --no-compile

One rank's work at the recipe's sizes, for each number of ranks. Every result is compared with float64 before its time is taken,
and a kernel that is wrong ends the run. All sides of a case take turns, round by round (`measure/kernel_bench/timing.py`).
A verdict depends on the ratio of two sides in the same round; it is `none` if the distance from the limit is smaller than the
spread from p10 to p90.

| section          | claim                                                                                                   |
|------------------|---------------------------------------------------------------------------------------------------------|
| `qk_norm_rope`   | 80% of the bandwidth of a copy, a large one and one of its own size                                     |
| `rope_attention` | at most 1.15 of the time of the fastest SDPA back end, at every number of keys; its own staging included |
| `plans`          | `balanced` in one launch is faster than in two SDPA calls, than `padded` and than `grouped`               |
| `tune`           | none: the fastest tiles of a short list, for each number of keys; no default is changed                 |
| `kv_splits`      | none: the same for ranges of keys                                                                       |
"""

import argparse
import json
from pathlib import Path

import torch

from causalrt.config import override
from causalrt.engines.streams import own_stream
from causalrt.errors import ConfigError
from causalrt.measure.kernel_bench.cases import KernelBenchOptions, interpreted
from causalrt.measure.kernel_bench.dry_run import planned_lines
from causalrt.measure.kernel_bench.picture import plot
from causalrt.measure.kernel_bench.rope_attention import FORMS
from causalrt.measure.kernel_bench.sections import Bench
from causalrt.measure.kernel_bench.timing import progress
from causalrt.recipes import recipe

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SECTIONS = ("qk_norm_rope", "rope_attention", "plans", "tune", "kv_splits")
UNASKED = ("qk_norm_rope", "rope_attention", "plans")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="wan_1_3b_480p")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--set", action="append", default=[], help="a field of the recipe, as in `causalrt build`")
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[1, 8], metavar="P")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="all but tune and kv_splits unless named")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="of rope_attention")
    parser.add_argument("--kv-rows", nargs="+", type=int, help="numbers of keys; default: every whole number of chunks")
    parser.add_argument("--tune", nargs="*", choices=FORMS, help="the section tune too, in these forms; default: whole")
    parser.add_argument("--kv-splits", nargs="*", type=int, help="the section kv_splits too, of these; default: all")
    parser.add_argument("--repeats", type=int, default=50, help="rounds; median, p10 and p90 are taken over them")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="compare before timing")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile among the sides"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the cases and their sizes; no GPU, no times")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_kernels"), help="path of both files, without their endings"
    )
    args = parser.parse_args()
    chosen = args.sections or UNASKED
    more = [name for name in ("tune", "kv_splits") if getattr(args, name) is not None]
    args.sections = [name for name in SECTIONS if name in (*chosen, *more)]
    return args


def main() -> None:
    """Run the command line; a fault of its arguments is one line."""
    args = parse()
    try:
        run(args)
    except ConfigError as error:
        raise SystemExit(str(error)) from error


def run(args: argparse.Namespace) -> None:
    """Run the sections, write the report and its picture, and print the verdicts."""
    changes = {"build.precision": DTYPES[args.dtype], **dict(change.split("=", 1) for change in args.set)}
    config = override(recipe(args.recipe), changes)
    if args.device == "cpu" and not args.dry_run and not interpreted():
        args.sections = [name for name in args.sections if name in UNASKED]
        progress(
            "on a CPU without TRITON_INTERPRET=1 the references stand in for the kernels; no tiles, no ranges of keys"
        )
    options = KernelBenchOptions(**{name: getattr(args, name) for name in KernelBenchOptions.__dataclass_fields__})
    if args.dry_run:
        for line in planned_lines(options, config):
            print(line)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: add --dry-run, or `--device cpu` to try it out")
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    with own_stream(device), torch.no_grad():
        bench = Bench(options, config, device)
        try:
            for section in options.sections:
                getattr(bench, section)()
        finally:
            args.out.with_suffix(".json").write_text(json.dumps(bench.report, indent=1))
    for line in bench.report["claims"]:
        print(f"{line['verdict']:8}{line['claim']}: {line['figure']}")
    try:
        plot(bench.report, args.out.with_suffix(".png"))
    except ImportError as error:
        progress(f"no picture: {error}; pip install matplotlib")


if __name__ == "__main__":
    main()
