"""Executors against each other on the CPU: mean chunk step, sides interleaved in one run.

    python benchmarks/executors.py                       # onnxruntime against eager, 1 rank
    python benchmarks/executors.py --ranks               # 2 ranks of one thread against 1 rank of two

Two engines stay loaded side by side, each in its own rank processes; chunk by chunk they take turns, so that whatever else
the machine does hits both. Compared are the medians over repeats of the mean over all chunks; the spread is the repeats'.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from causalrt import Config, Engine, build, load, override, recipe
from causalrt.export.random_weights import random_weights


def build_random(config: Config, folder: Path, name: str) -> Path:
    """A bundle of random weights."""
    checkpoint = folder / "checkpoint.safetensors"
    if not checkpoint.exists():
        save_file({f"model.{key}": value for key, value in random_weights(config.model, seed=0)}, checkpoint)
    return build(config, checkpoint=checkpoint, out=folder / name)


def measure(engines: dict[str, Engine], *, repeats: int) -> dict[str, list[list[float]]]:
    """By side and repeat, the mean milliseconds of a denoising step in each chunk."""
    config = next(iter(engines.values())).config
    prompt = torch.randn(config.model.text_len, config.model.text_dim, generator=torch.Generator().manual_seed(0))
    steps: dict[str, list[list[float]]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        sessions = {name: engine.session(prompt, seed=repeat, record=False) for name, engine in engines.items()}
        latents: dict[int, torch.Tensor] = {}
        for chunk in range(next(iter(sessions.values())).num_chunks):
            order = list(sessions.items())
            for name, session in order if chunk % 2 else order[::-1]:
                produced = next(session).latents
                difference = float((latents.setdefault(chunk, produced) - produced).abs().max())
                if difference > 1e-3:
                    raise SystemExit(f"{name} differs by {difference} in chunk {chunk}: not the same work")
                engines[name].wait()
        for session in sessions.values():
            session.close()
        if repeat:  # the first warms up
            for name, session in sessions.items():
                steps[name].append([statistics.mean(times[0].denoise_ms) for times in session.times])
        print(f"repeat {repeat} of {repeats}", file=sys.stderr)
    return steps


def report(sides: tuple[str, str], steps: dict[str, list[list[float]]]) -> None:
    """Print a table and one JSON line; the ratio is slow side over fast side, from the same repeats."""
    for name in sides:
        per_chunk = [statistics.median(column) for column in zip(*steps[name], strict=True)]
        print(f"{name:24} ms per step by chunk: " + " ".join(f"{ms:8.1f}" for ms in per_chunk))
    means = {name: [statistics.mean(chunks) for chunks in steps[name]] for name in sides}
    ratios = [a / b for a, b in zip(means[sides[0]], means[sides[1]], strict=True)]
    print(
        f"{sides[0]} / {sides[1]}: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}"
    )
    medians = {name: statistics.median(values) for name, values in means.items()}
    print(json.dumps({"mean_step_ms": medians, "ratio": statistics.median(ratios), "ratios": ratios}))


def main() -> None:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="bench_cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", action="store_true", help="compare 2 ranks of one thread with 1 rank of two")
    arguments = parser.parse_args()
    config = recipe(arguments.recipe)
    with tempfile.TemporaryDirectory(prefix="causalrt-bench-") as folder:
        one = build_random(config, Path(folder), "one")
        if arguments.ranks:
            two = build_random(override(config, {"build.world_size": "2"}), Path(folder), "two")
            sides = ("1 rank x 2 threads", "2 ranks x 1 thread")
            engines = {
                sides[0]: load(one, device="cpu", num_threads=2),
                sides[1]: load(two, device="cpu", num_threads=1),
            }
        else:
            sides = ("eager", "onnxruntime")
            engines = {name: load(one, executor=name, device="cpu", num_threads=2) for name in sides}
        report(sides, measure(engines, repeats=arguments.repeats))
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
