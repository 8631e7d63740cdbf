"""Time and peak memory of reading a checkpoint at full size, in a child process for each target type.

    python benchmarks/make_checkpoint.py --recipe wan_1_3b_480p --out /tmp/random.pt
    python benchmarks/checkpoint_memory.py /tmp/random.pt --recipe wan_1_3b_480p --scratch /tmp

The peak is VmHWM, which counts mapped pages of the file as well as allocated memory; the baseline is the same process
with everything imported. The project's limit is 1.3 times the bytes of the target.
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from causalrt.config import ModelConfig
from causalrt.export.checkpoint import open_checkpoint, write_weights
from causalrt.recipes import RECIPES, recipe


def status_bytes(field: str) -> int:
    """A memory figure of this process from /proc/self/status, such as VmHWM or VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def measure(path: Path, model: ModelConfig, dtype: torch.dtype, out: Path) -> tuple[float, int, int]:
    """Seconds, peak bytes and baseline bytes of one conversion."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the resident memory
    baseline_bytes = status_bytes("VmRSS")
    start_s = time.perf_counter()
    write_weights(open_checkpoint(path), model, dtype=dtype, out=out)
    return time.perf_counter() - start_s, status_bytes("VmHWM"), baseline_bytes


def main() -> None:
    """Convert once for each target type, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipe", default="wan_1_3b_480p", choices=list(RECIPES))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder for the target")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    model = recipe(args.recipe).model
    print(f"{'target':<10}{'seconds':>9}{'target MiB':>12}{'peak MiB':>10}{'baseline MiB':>14}{'peak/target':>13}")
    for name in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            out = Path(folder) / "weights.safetensors"
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(max_workers=1, mp_context=context) as child:
                job = child.submit(measure, args.checkpoint, model, getattr(torch, name), out)
                seconds, peak, baseline = job.result()
            target = out.stat().st_size
        mib = [f"{size / 2**20:.0f}" for size in (target, peak, baseline)]
        print(f"{name:<10}{seconds:>9.1f}{mib[0]:>12}{mib[1]:>10}{mib[2]:>14}{peak / target:>13.3f}")


if __name__ == "__main__":
    main()
