"""`causalrt demo`: the main job on a small random model. Build, 2 ranks, 7 chunks, and every chunk against eager."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from causalrt.config import override, recipe
from causalrt.export.build import build
from causalrt.export.options import Progress
from causalrt.export.random_weights import random_weights
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.tools.compare import TOLERANCE

SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRow:
    """One chunk: stages in milliseconds, latent frames attended over, and the largest difference from eager on one rank."""

    chunk: int
    latency_ms: float
    queue_ms: float
    denoise_ms: list[float]
    exchange_ms: float
    gather_ms: float
    refresh_ms: float
    kv_frames: int
    error: float


def run_demo(*, on_progress: Progress, on_stage: Callable[[str], None]) -> dict[str, Any]:
    """Build a bundle of fixed seed, generate on 2 ranks with onnxruntime, compare with eager on 1 rank.

    Args:
        on_progress: told of (stage, done, total).
        on_stage: told in words what comes next.

    Returns:
        `{"rows": [...], "max_abs_error", "tolerance", "passed", "build_s", "first_chunk_cold_ms"}`.
    """
    config = recipe("demo")
    prompt = torch.randn(20, config.model.text_dim, generator=torch.Generator().manual_seed(SEED))
    with tempfile.TemporaryDirectory(prefix="causalrt-demo-") as folder:
        checkpoint = Path(folder) / "checkpoint.safetensors"
        save_file({f"model.{name}": tensor for name, tensor in random_weights(config.model, seed=SEED)}, checkpoint)
        on_stage("Building a bundle for 2 ranks (onnxruntime), and one for eager on 1 rank")
        start = time.perf_counter()
        two = build(config, checkpoint=checkpoint, out=Path(folder) / "two", on_progress=on_progress)
        single = override(config, {"build.world_size": "1"})
        one = build(
            single, checkpoint=checkpoint, out=Path(folder) / "one", executors=["eager"], on_progress=on_progress
        )
        build_s = time.perf_counter() - start
        on_stage("Starting 2 rank processes and generating")
        start = time.perf_counter()
        with load(two, executor="onnxruntime", device="cpu") as engine:
            rows, latents, first_ms = _generate(engine, prompt, start, "onnxruntime, 2 ranks", on_progress)
        on_stage("The same with eager torch on 1 rank, to compare")
        with load(one, executor="eager", device="cpu") as engine:
            _, expected, _ = _generate(engine, prompt, start, "eager, 1 rank", on_progress)
    for row, got, want in zip(rows, latents, expected, strict=True):
        row["error"] = float((got - want).abs().max())
    worst = max(row["error"] for row in rows)
    return {
        "rows": [asdict(DemoRow(**row)) for row in rows],
        "max_abs_error": worst,
        "tolerance": TOLERANCE,
        "passed": worst <= TOLERANCE,
        "build_s": build_s,
        "first_chunk_cold_ms": first_ms,
    }


def _generate(
    engine: Engine, prompt: torch.Tensor, started: float, stage: str, on_progress: Progress
) -> tuple[list[dict[str, Any]], list[torch.Tensor], float]:
    rows: list[dict[str, Any]] = []
    latents: list[torch.Tensor] = []
    first_ms = 0.0
    with engine.session(prompt, seed=SEED) as session:
        on_progress(stage, 0, session.num_chunks)
        for chunk in session:
            first_ms = first_ms or 1e3 * (time.perf_counter() - started)
            latents.append(chunk.latents)
            rows.append({"chunk": chunk.index, "latency_ms": chunk.latency_ms, "queue_ms": chunk.queue_ms})
            on_progress(stage, chunk.index + 1, session.num_chunks)
    for row, times in zip(rows, session.times, strict=True):
        stages = asdict(times[0])
        row.update({key: stages[key] for key in ("denoise_ms", "exchange_ms", "gather_ms", "refresh_ms", "kv_frames")})
    return rows, latents, first_ms
