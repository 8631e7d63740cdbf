"""Time and peak memory of a full-size engine build, from checkpoint to bundle.

    python benchmarks/make_checkpoint.py --out /tmp/random.pt
    python benchmarks/engine_build.py --checkpoint /tmp/random.pt --world-size 8 --target sm80
    python benchmarks/engine_build.py --checkpoint /tmp/random.pt --world-size 8 --target sm80 --cap-gib 14

Memory is that of the command and of every process that it starts, taken together, ten times a second: proportional set size,
file pages that they map included. With --cap-gib the address space of each process is not what counts: the run is stopped,
and fails, when the sum passes the cap.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def tree_bytes(root: int) -> tuple[int, int]:
    """(proportional set size, anonymous part of it) of a process and its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    pids, total, anonymous = [root], 0, 0
    for pid in pids:
        pids.extend(child for child, parent in parents.items() if parent == pid)
        try:
            lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        total += sizes["Pss"]
        anonymous += sizes["Pss_Anon"]
    return total, anonymous


def main() -> None:
    """Run a build, watch its memory, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--recipe", default="wan_1_3b_480p")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--target", nargs="+", default=["sm80"])
    parser.add_argument("--collectives", default="engine")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--cap-gib", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, help="keep the bundle here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="causalrt-bench-", dir=args.checkpoint.parent) as folder:
        out = args.out or Path(folder) / "bundle"
        command = [sys.executable, "-m", "causalrt.cli", "build", "--recipe", args.recipe, "--dtype", args.dtype]
        command += ["--checkpoint", str(args.checkpoint), "--world-size", str(args.world_size), "--out", str(out)]
        command += ["--executor", "tensorrt_rtx", "--collectives", args.collectives]
        command += [f"--target={target}" for target in args.target]
        command += [f"--set={change}" for change in args.set]
        start, peak, peak_anonymous = time.perf_counter(), 0, 0
        build = subprocess.Popen(command)
        while build.poll() is None:
            total, anonymous = tree_bytes(build.pid)
            peak, peak_anonymous = max(peak, total), max(peak_anonymous, anonymous)
            if total > args.cap_gib * 2**30:
                build.kill()
                raise SystemExit(f"{total / 2**30:.1f} GiB at {time.perf_counter() - start:.0f} s: over the cap")
            time.sleep(0.1)
        if build.returncode:
            raise SystemExit(build.returncode)
        ended = os.times()  # processor time does not depend on other load
        found = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(ended.children_user + ended.children_system, 1),
            "peak_gib": round(peak / 2**30, 2),
            "peak_anonymous_gib": round(peak_anonymous / 2**30, 2),
            "engine_mib": {file.name: round(file.stat().st_size / 2**20, 1) for file in sorted(out.glob("*.engine"))},
            "world_size": args.world_size,
            "targets": args.target,
            "collectives": args.collectives,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
