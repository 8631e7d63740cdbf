"""Chunk times that the planner predicts, against those of executors on this CPU, for sizes it was not calibrated on.

    python benchmarks/plan_error.py --calibration machine.json           # measures the machine if the file is not there
    python benchmarks/plan_error.py --clock cpu --calibration cpu.json   # where other programs keep the machine busy

For each size, two ranks of one thread and one rank of two, under eager and onnxruntime, lie side by side and take turns chunk
by chunk. Medians of the time of a chunk's denoising steps and context pass (the last chunk has none) are compared. With
`--clock cpu`, ranks have one thread each, and the time is processor time of the busiest rank, without waiting. The
load is in the report.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from causalrt import Config, Engine, build, load, override, recipe
from causalrt.control_groups import available_cpus
from causalrt.export.random_weights import random_weights
from causalrt.tools.ops.micro_ops import OpExecutor
from causalrt.tools.plan.calibration import CalibratedMachine, Calibration, calibrate, read_calibration
from causalrt.tools.plan.predict import forecast

EXECUTORS: tuple[OpExecutor, ...] = ("eager", "onnxruntime")
WORLD_SIZES = (1, 2)
SIZES: dict[str, dict[str, str]] = {
    "bench_cpu": {"video.horizon_frames": "9"},
    "wide": {
        "model.dim": "640",
        "model.num_heads": "5",
        "model.num_layers": "4",
        "model.ffn_dim": "2560",
        "video.latent_height": "32",
        "video.latent_width": "48",
        "video.horizon_frames": "12",
    },
    "long": {
        "model.dim": "320",
        "model.num_heads": "5",
        "model.num_layers": "6",
        "model.ffn_dim": "1280",
        "video.latent_height": "24",
        "video.latent_width": "40",
        "video.horizon_frames": "15",
    },
}
"""Changes of the recipe `bench_cpu`; no product, attention or pass of them is among those that are calibrated on."""
Key = tuple[str, int]


def open_engines(config: Config, folder: Path, *, clock: str) -> dict[Key, Engine]:
    """Load engines of random weights, by executor and ranks."""
    checkpoint = folder / "checkpoint.safetensors"
    save_file({f"model.{key}": value for key, value in random_weights(config.model, seed=0)}, checkpoint)
    engines: dict[Key, Engine] = {}
    for ranks in WORLD_SIZES:
        bundle = build(
            override(config, {"build.world_size": str(ranks)}), checkpoint=checkpoint, out=folder / f"ranks{ranks}"
        )
        threads = max(1, available_cpus() // ranks) if clock == "wall" else 1
        for executor in EXECUTORS:
            engines[executor, ranks] = load(bundle, executor=executor, device="cpu", num_threads=threads)
    return engines


def cpu_ms(engine: Engine) -> list[float]:
    """Processor time so far, by rank."""
    tasks = [list(Path(f"/proc/{pid}/task").glob("*/schedstat")) for pid in engine.rank_pids]
    return [sum(int(task.read_text().split()[0]) for task in each) / 1e6 for each in tasks]


def measure(engines: dict[Key, Engine], config: Config, *, repeats: int, clock: str) -> dict[Key, list[float]]:
    """Measure milliseconds of each chunk, steps and context pass together, by engine."""
    prompt = torch.randn(config.model.text_len, config.model.text_dim, generator=torch.Generator().manual_seed(0))
    seen: dict[Key, list[list[float]]] = {key: [] for key in engines}
    for repeat in range(repeats + 1):
        sessions = {key: engine.session(prompt, seed=0) for key, engine in engines.items()}
        used: dict[Key, list[float]] = {key: [] for key in engines}
        for chunk in range(next(iter(sessions.values())).num_chunks):
            order = list(sessions.items())
            for key, session in order if (chunk + repeat) % 2 else order[::-1]:
                before = cpu_ms(engines[key])
                next(session)
                engines[key].wait()
                used[key].append(max(b - a for a, b in zip(before, cpu_ms(engines[key]), strict=True)))
        for key, session in sessions.items():
            session.close()
            if repeat:  # the first repeat warms up
                wall = [sum(times[0].denoise_ms) + times[0].context_pass_ms for times in session.times.values()]
                seen[key].append(used[key] if clock == "cpu" else wall)
        print(f"repeat {repeat} of {repeats}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return {key: [statistics.median(column) for column in zip(*rows, strict=True)] for key, rows in seen.items()}


def compare(name: str, found: Calibration, *, repeats: int, clock: str) -> list[dict[str, Any]]:
    """Compare measured and predicted milliseconds of each chunk of one size; a row for each executor and number of ranks."""
    config = override(recipe("bench_cpu"), SIZES[name])
    with tempfile.TemporaryDirectory(prefix="causalrt-bench-") as folder:
        engines = open_engines(config, Path(folder), clock=clock)
        measured = measure(engines, config, repeats=repeats, clock=clock)
        for engine in engines.values():
            engine.close()
    rows = []
    for (executor, ranks), times in measured.items():
        kind: OpExecutor = "eager" if executor == "eager" else "onnxruntime"
        machine = CalibratedMachine(machine=found.machine, entry=found.entry(kind, ranks))
        expected = forecast(config, machine, "balanced", world_size=ranks, executor=executor)
        predicted = [1e3 * (chunk.denoise_s.nominal + chunk.step_s.nominal) for chunk in expected.chunks]
        predicted[-1] = 1e3 * expected.chunks[-1].denoise_s.nominal
        errors = [ours / theirs - 1 for ours, theirs in zip(predicted, times, strict=True)]
        row = {"size": name, "executor": executor, "ranks": ranks, "measured_ms": times, "predicted_ms": predicted}
        rows.append({**row, "error": sum(predicted) / sum(times) - 1, "worst_chunk_error": max(errors, key=abs)})
        chunks = ", ".join(f"{theirs:.0f}/{ours:.0f}" for ours, theirs in zip(predicted, times, strict=True))
        print(
            f"{name:10} {executor:12} P={ranks}  error {rows[-1]['error']:+6.1%}, worst chunk "
            f"{rows[-1]['worst_chunk_error']:+6.1%}  (measured/predicted ms: {chunks})",
            flush=True,
        )
    return rows


def main() -> None:
    """Calibrate if the file is missing, compare all sizes, and print the largest error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--calibration", type=Path, default=Path("machine.json"))
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    if not arguments.calibration.exists():
        calibrate(EXECUTORS, WORLD_SIZES, clock=arguments.clock).write(arguments.calibration)
    found = read_calibration(arguments.calibration)
    rows = []
    for name in arguments.sizes:
        rows += compare(name, found, repeats=arguments.repeats, clock=arguments.clock)
    fits = {f"{e.executor} x {e.ranks}": round(e.relative_error, 3) for e in found.entries}
    report = {"rows": rows, "fit_errors": fits, "load_before": load_before, "load_after": os.getloadavg()}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    worst = max(rows, key=lambda row: abs(row["error"]))
    print(
        f"worst: {worst['error']:+.1%} ({worst['size']}, {worst['executor']}, P={worst['ranks']}); loads {load_before}"
    )


if __name__ == "__main__":
    main()
