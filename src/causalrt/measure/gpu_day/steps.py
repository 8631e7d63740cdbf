"""Chunk steps of several executors side by side in one process, with random weights at the size of a recipe.

Executors take turns chunk by chunk, so that clocks and other load affect all of them equally. For every number of filled KV
rows their flows are compared with that of the first executor on the same inputs; then come the median time of a step, and how
often torch waited for the device in it (waits inside TensorRT and NCCL are not counted).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES, Executor
from causalrt.engines.bundle import WEIGHTS, Bundle, new_bundle, open_bundle, write_manifest
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.inductor import InductorExecutor
from causalrt.engines.step_record import StepGraphs
from causalrt.export.random_weights import random_weights
from causalrt.measure.gpu_day.recorder import Recorder
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.session_buffers import SessionBuffers
from causalrt.runtime.usage import WaitCounter
from causalrt.tools.ops.timing import seconds_of

MakeExecutor = Callable[[Bundle, torch.device], Executor]
TIME = 500.0
MOST_ERROR = 0.05
"""Most difference of a flow from that of eager in the same precision, relative; rounding in bfloat16 causes about 0.01."""


def eager(*, fused_ops: bool = False) -> MakeExecutor:
    """Makes eager executors, with or without the fused ops."""
    return lambda bundle, device: EagerExecutor(bundle, LocalCollectives(), device=device, fused_ops=fused_ops)


def inductor(*, fused_ops: bool = False, cuda_graphs: bool = True) -> MakeExecutor:
    """Makes inductor executors, with or without the fused ops and CUDA graphs."""
    return lambda bundle, device: InductorExecutor(
        bundle, LocalCollectives(), device=device, fused_ops=fused_ops, cuda_graphs=cuda_graphs
    )


def random_state(config: Config, *, device: torch.device) -> dict[str, torch.Tensor]:
    """Random weights by name on the CPU, in the precision of the config; drawing them on a GPU is much faster."""
    dtype = TORCH_DTYPES[config.build.precision]
    return {name: tensor.to("cpu", dtype) for name, tensor in random_weights(config.model, seed=0, device=device)}


def random_bundle(config: Config, path: Path, *, device: torch.device) -> Bundle:
    """Make a bundle of random weights and nothing else, as eager and inductor need it, or open the one at `path`."""
    if not path.exists():
        shapes = {"patch_embedding.weight": (config.model.dim, config.model.patch_features)}
        state = random_state(config, device=device)
        weights = {name: tensor.reshape(shapes.get(name, tensor.shape)) for name, tensor in state.items()}
        size = sum(tensor.nbytes for tensor in weights.values())
        with new_bundle(path, overwrite=False, needed_bytes=size) as folder:
            save_file(weights, folder / WEIGHTS)
            steps = [StepGraphs() for _ in config.video.step_frames]
            write_manifest(folder, config=config, fused_ops=False, executors=("eager",), steps=steps, engines={})
    return open_bundle(path, verify=False)


class StepSession:
    """One executor with its KV slots, whose history it writes itself.

    Attributes:
        executor: the executor.
    """

    def __init__(self, make: MakeExecutor, bundle: Bundle, device: torch.device) -> None:
        config = bundle.config
        self.executor, self._device = make(bundle, device), device
        dtype = TORCH_DTYPES[config.build.precision]
        whole = self.executor.whole_slots
        slots = KVSlots(config, bundle.layout, dtype, whole_slots=whole, device=device)
        self._buffers = SessionBuffers(0, slots)
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(config.model.text_len, config.model.text_dim, generator=generator)
        self._buffers.begin(self.executor.encode_prompt(text))
        self._time = self.executor.embed_time(TIME)

    def bind(self, first_frame: int) -> int:
        """Begin the chunk that starts at this frame, and return the number of filled KV rows."""
        view = self._buffers.view(first_frame)
        self.executor.bind(view)
        return view.kv_rows

    def step(self, x: torch.Tensor, first_frame: int) -> torch.Tensor:
        """Run one chunk step, and return its flow."""
        return self.executor.step(x, self._time, first_frame)

    def timed_step(self, x: torch.Tensor, first_frame: int) -> float:
        """Milliseconds of one chunk step, from its first call to an idle device."""
        seconds_of(lambda: None, self._device)  # the device is idle
        return 1e3 * seconds_of(lambda: self.step(x, first_frame), self._device)

    def count_waits(self, x: torch.Tensor, first_frame: int) -> int | None:
        """Count how often torch waits for the device in one step; None on a CPU."""
        counter = WaitCounter(self._device)
        counter.begin()
        try:
            self.step(x, first_frame)
        finally:
            waits = counter.end()
        return waits

    def commit(self, first_frame: int) -> None:
        """Commit the chunk to the history."""
        self._buffers.slots.commit(first_frame)


def noise_of(bundle: Bundle, device: torch.device) -> torch.Tensor:
    """Random input of a step, `[S, 64]`."""
    generator = torch.Generator().manual_seed(1)
    shape = bundle.layout.local_tokens, bundle.config.model.patch_features
    return torch.randn(shape, generator=generator).to(device)


def compare_steps(
    sessions: Mapping[str, StepSession], config: Config, x: torch.Tensor, *, repeats: int
) -> Iterator[list[dict[str, Any]]]:
    """Step all sessions through the chunks of the horizon.

    Args:
        sessions: sessions by name of the side; the others are compared with the first one.
        config: their config.
        x: input of every step, `[S, 64]`.
        repeats: rounds over which medians are taken.

    Yields:
        For each number of filled KV rows, a row for each side: `side`, `KV rows`, `ms`, `of eager` (time relative to the first
        side), `error` (of the flow, relative to the first side), `waits`.
    """
    frames = config.video.chunk_frames
    seen: set[int] = set()
    for first in range(0, config.video.horizon_frames - frames + 1, frames):
        flows: dict[str, torch.Tensor] = {}
        rows = 0
        for side, session in sessions.items():
            rows = session.bind(first)
            flows[side] = session.step(x, first).float().clone()
            session.step(x, first)
        if rows not in seen:
            seen.add(rows)
            yield _compared(sessions, flows, x, first, rows=rows, repeats=repeats)
        for session in sessions.values():
            session.commit(first)


def check_flow(recorder: Recorder, row: Mapping[str, Any]) -> None:
    """Record a flow that differs too much from that of eager; `row` is one of `compare_steps`."""
    text = f"{row['side']} over {row['KV rows']} rows: the flow differs from eager's by {row['error']:.2g}"
    if row["error"] > MOST_ERROR and not any(wrong.startswith(text) for wrong in recorder.record.wrong):
        recorder.wrong(f"{text}, allowed {MOST_ERROR:g}")


def _compared(
    sessions: Mapping[str, StepSession],
    flows: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    first: int,
    *,
    rows: int,
    repeats: int,
) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {side: [] for side in sessions}
    order = list(sessions.items())
    for number in range(repeats):
        for side, session in order if number % 2 else order[::-1]:
            times[side].append(session.timed_step(x, first))
    reference, base = next(iter(flows.values())), next(iter(times.values()))
    return [
        {
            "side": side,
            "KV rows": rows,
            "ms": round(statistics.median(times[side]), 3),
            "of eager": round(_median_ratio(times[side], base), 4),
            "error": _relative(flows[side], reference),
            "waits": session.count_waits(x, first),
        }
        for side, session in order
    ]


def _median_ratio(ours: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def _relative(flow: torch.Tensor, reference: torch.Tensor) -> float:
    error = float((flow - reference).norm() / reference.norm())
    return error if math.isfinite(error) else math.inf
