"""Chunk steps of executors on one GPU (or, to try it out, on the CPU), random weights at the recipe's own size.

    python benchmarks/gpu_steps.py --recipe wan_1_3b_480p --executors eager inductor --dtype bf16
    python benchmarks/gpu_steps.py --recipe bench_cpu --executors eager inductor --dtype fp32 --device cpu --repeats 2

One process, one rank, no rank processes: executors and their sessions lie side by side and take turns chunk by chunk, so that
clocks and neighbours hit all of them. First their flows are compared with eager's on the same inputs; then, for every chunk,
the median milliseconds of a chunk step, with CUDA graphs on and off where the executor has them; peak memory; and the number
of times that torch waited for the device inside a step (TensorRT and NCCL are not watched). Needs torch 2.11 or newer.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from causalrt.config import Config, override, recipe
from causalrt.engines.base import TORCH_DTYPES, Executor
from causalrt.engines.bundle import WEIGHTS, Bundle, open_bundle, write_manifest
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.inductor import InductorExecutor
from causalrt.engines.streams import own_stream
from causalrt.export.random_weights import random_weights
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.usage import WAIT_WARNING

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def random_bundle(config: Config, folder: Path) -> Bundle:
    """Weights of the right size and nothing else: what eager and inductor need."""
    folder.mkdir()
    dtype = TORCH_DTYPES[config.build.precision]
    shapes = {"patch_embedding.weight": (config.model.dim, config.model.patch_features)}
    weights = {
        name: tensor.to(dtype).reshape(shapes.get(name, tensor.shape)).contiguous()
        for name, tensor in random_weights(config.model, seed=0)
    }
    save_file(weights, folder / WEIGHTS)
    write_manifest(folder, config=config, plugins=False, executors=("eager",), graphs={}, engines={})
    return open_bundle(folder, verify=False)


def make(side: str, bundle: Bundle, device: torch.device) -> Executor:
    """`eager` or `inductor`, with `-plugins` (fused ops) or `-nograph` (no CUDA graph) behind it."""
    name, *options = side.split("-")
    plugins = "plugins" in options
    if name == "eager":
        return EagerExecutor(bundle, LocalCollectives(), device=device, plugins=plugins)
    graphs = "nograph" not in options
    return InductorExecutor(bundle, LocalCollectives(), device=device, plugins=plugins, cuda_graphs=graphs)


class Session:
    """One executor with its KV slots; history is what it wrote itself."""

    def __init__(self, side: str, bundle: Bundle, device: torch.device, text: torch.Tensor) -> None:
        config = bundle.config
        self.executor = make(side, bundle, device)
        dtype = TORCH_DTYPES[config.build.precision]
        self.slots = KVSlots(config, bundle.layout, dtype, whole_slots=self.executor.whole_slots, device=device)
        self.cross_kv = self.executor.encode_prompt(text)
        self.time = self.executor.embed_time(500.0)
        self.device = device

    def step(self, x: torch.Tensor, first_frame: int) -> torch.Tensor:
        """One chunk step."""
        return self.executor.step(x, *self.time, first_frame)

    def bind(self, first_frame: int) -> None:
        """Take up a chunk."""
        rows = self.slots.filled_rows(first_frame)
        self.executor.bind(self.slots.filled(first_frame), self.cross_kv, kv_rows=rows, memory=0)


def wait(device: torch.device) -> None:
    """Until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_step(session: Session, x: torch.Tensor, first_frame: int) -> float:
    """Milliseconds of one chunk step, queue to idle."""
    wait(session.device)
    start = time.perf_counter()
    session.step(x, first_frame)
    wait(session.device)
    return 1e3 * (time.perf_counter() - start)


def count_waits(session: Session, x: torch.Tensor, first_frame: int) -> int | None:
    """How often torch waits for the device in one step; None on a CPU."""
    if session.device.type == "cpu":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        session.step(x, first_frame)
        torch.cuda.set_sync_debug_mode("default")
    return sum(WAIT_WARNING in str(warning.message) for warning in caught)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="wan_1_3b_480p")
    parser.add_argument(
        "--executors", nargs="+", default=["eager", "eager-plugins", "inductor", "inductor-nograph", "inductor-plugins"]
    )
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    changes = {"build.precision": DTYPES[args.dtype], **dict(change.split("=", 1) for change in args.set)}
    config = override(recipe(args.recipe), changes)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="causalrt-bench-") as folder, torch.no_grad(), own_stream(device):
        bundle = random_bundle(config, Path(folder) / "bundle")
        text = torch.randn(config.model.text_len, config.model.text_dim, generator=generator)
        sessions = {side: Session(side, bundle, device, text) for side in args.executors}
        x = torch.randn(bundle.layout.local_tokens, config.model.patch_features, generator=generator).to(device)
        report: dict[str, Any] = {"recipe": args.recipe, "dtype": args.dtype, "torch": torch.__version__, "sides": {}}
        for side in sessions:
            report["sides"][side] = {"ms": [], "relative_error": 0.0, "waits": 0}
        frames = config.video.chunk_frames
        for chunk in range(config.video.horizon_frames // frames):
            flows: dict[str, torch.Tensor] = {}
            for side, session in sessions.items():
                session.bind(chunk * frames)
                flows[side] = session.step(x, chunk * frames).float().clone()
                session.step(x, chunk * frames)
            reference = next(iter(flows.values()))
            times: dict[str, list[float]] = {side: [] for side in sessions}
            for repeat in range(args.repeats):
                order = list(sessions.items())
                for side, session in order if repeat % 2 else order[::-1]:
                    times[side].append(timed_step(session, x, chunk * frames))
            for side, session in sessions.items():
                found = report["sides"][side]
                found["ms"].append(round(statistics.median(times[side]), 3))
                error = float((flows[side] - reference).norm() / reference.norm())
                assert math.isfinite(error), side
                found["relative_error"] = max(found["relative_error"], error)
                waits = count_waits(session, x, chunk * frames)
                found["waits"] = waits if waits is None else max(waits, found["waits"])
                session.slots.commit(chunk * frames)
            line = ", ".join(f"{side} {report['sides'][side]['ms'][-1]:.1f} ms" for side in sessions)
            print(f"chunk {chunk}: {line}", file=sys.stderr, flush=True)
    if device.type == "cuda":
        report["device"] = torch.cuda.get_device_name(device)
        report["peak_gib_all_sides"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
