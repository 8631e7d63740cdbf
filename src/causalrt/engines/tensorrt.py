"""The TensorRT executor, for both flavours: engines over persistent buffers, with the step replayed as one CUDA graph.

    in the engine    x, time, first_frame, kv_rows -> [ one engine ] -> flow        KV slots whole, updated in place
    at runtime       x -> [ engine ] -> all_to_all -> [ engine ] -> staging -> [ engine ] -> all_to_all ... -> flow

Tensors keep their addresses while a session is bound, and nothing in a step waits for the device.
"""

import contextlib
import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from causalrt.engines.base import TORCH_DTYPES, Collectives, Executor, SessionView, StepBuffers
from causalrt.engines.bundle import Bundle
from causalrt.engines.cuda_graphs import CudaGraphs
from causalrt.engines.step_record import StepPart, TargetEngines
from causalrt.engines.tensor_names import is_callers
from causalrt.engines.tensorrt_engine import EngineLoader, LoadedEngine
from causalrt.engines.tensorrt_flavour import Flavour, device_target
from causalrt.errors import ExecutorError
from causalrt.model.wan.conditioning import Conditioning
from causalrt.model.wan.transformer import sinusoid

NCCL = "libnccl.so.2"
MAPS = Path("/proc/self/maps")


class StepEngines(NamedTuple):
    """The engines of one kind of step, and what passes into, between and out of them.

    Attributes:
        engines: the engines in order.
        parts: the part of the step that each engine runs.
        buffers: tensors that are not the session's.
        staged: rows of the KV slots that the step writes.
    """

    engines: list[LoadedEngine]
    parts: tuple[StepPart, ...]
    buffers: StepBuffers
    staged: int


class TensorRTExecutor(Executor):
    """Runs the engines that a build made for this kind of GPU."""

    def __init__(
        self,
        flavour: Flavour,
        bundle: Bundle,
        collectives: Collectives,
        *,
        device: torch.device,
        cuda_graphs: bool = True,
    ) -> None:
        record = bundle.engines[flavour.name]
        files = engine_files(flavour, record.targets, device_target(device))
        config = bundle.config
        self.device = device
        exchanges = record.collectives == "engine"
        self.whole_slots = exchanges or bundle.fused_ops  # a plugin takes whole slots too
        self._config = config
        self._dtype = TORCH_DTYPES[config.build.precision]
        self._collectives = collectives
        self._engines = EngineLoader(flavour, device)
        # No plugin rotates: with relative time, engines are built from standard ops (`export/engine_files.py`).
        plugins = bundle.fused_ops and config.video.time_index == "global"

        def load(file: str) -> LoadedEngine:
            return self._engines.load(bundle.path / file, files.names.get(file), plugins=plugins)

        self._prompt, self._time = load(files.prompt), load(files.time)
        steps = [[load(file) for file in names] for names in files.steps]
        self._engines.share_scratch()
        if exchanges and config.build.world_size > 1:
            self._hand_over_communicator([engine for step in steps for engine in step])
        sizes = zip(files.steps, steps, bundle.steps, config.video.step_frames, strict=True)
        self._sets = [
            self._make_step(engines, graphs.tensorrt, names, frames * config.tokens_per_frame)
            for names, engines, graphs, frames in sizes
        ]
        self._set = self._sets[0]
        self._graphs = CudaGraphs(device, enabled=cuda_graphs)
        self._kv_rows = 0
        self._key = (-1, 0, 0)
        self._bound: dict[str, torch.Tensor] = {}

    def _hand_over_communicator(self, engines: list[LoadedEngine]) -> None:
        """Let engines exchange by themselves. Collective: returns when every rank has called it."""
        communicator = self._collectives.communicator()
        load_nccl()
        check_one_nccl(MAPS.read_text())
        for engine in engines:
            engine.set_communicator(communicator)
        check_one_nccl(MAPS.read_text())  # in case TensorRT has loaded another one

    def _make_step(
        self, engines: list[LoadedEngine], parts: tuple[StepPart, ...], files: tuple[str, ...], staged: int
    ) -> StepEngines:
        """Allocate the buffers of a kind of step, which is one engine without parts if torch-tensorrt built it."""
        parts = parts or (StepPart(file=files[0]),)
        callers = {written for part in parts for written in part.writes}
        buffers = StepBuffers()
        for engine, part in zip(engines, parts, strict=True):
            for name in engine.names:
                if not is_callers(name) and name not in callers and name not in buffers:
                    buffers[name] = engine.empty(name)
            if part.sent is not None and part.received is not None:
                buffers[part.received] = torch.empty_like(buffers[part.sent])
        buffers["rank"].fill_(self._collectives.rank)
        return StepEngines(engines, parts, buffers, staged)

    def encode_prompt(self, text: torch.Tensor) -> Conditioning:
        """See `Executor.encode_prompt`."""
        return self._prompt.run_alone({"text": text.to(self.device, self._dtype)})

    def embed_time(self, timestep: float) -> Conditioning:
        """See `Executor.embed_time`."""
        features = sinusoid(timestep, self._config.model.freq_dim).to(self.device, self._dtype)
        return self._time.run_alone({"sinusoid": features})

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`."""
        self._set = self._sets[view.step]
        named = view.tensors()
        named |= {f"{name}.written": tensor for name, tensor in view.slots().items()}
        self._graphs.bind(view.buffers_id, tuple(tensor.data_ptr() for tensor in named.values()))
        for part in self._set.parts:
            for output, written in part.writes.items():
                named[output] = named[written][:, : self._set.staged]
        self._bound = named  # kept, since engines and graphs hold addresses only
        self._kv_rows = view.kv_rows
        # With whole slots the step reads `kv_rows` as a tensor, and one graph serves all lengths.
        self._key = (view.buffers_id, view.step, 0 if self.whole_slots else view.kv_rows)
        buffers = self._set.buffers
        for engine in self._set.engines:
            engine.select_profile(view.kv_rows)
            engine.bind({name: buffers[name] if name in buffers else named[name] for name in engine.names})

    def graph_bytes(self) -> int:
        """See `Executor.graph_bytes`."""
        return self._graphs.held_bytes

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        self._set.buffers.copy_from(x, time, first_frame=first_frame, kv_rows=self._kv_rows)
        self._graphs.run(self._key, self._run_parts)
        return self._set.buffers["flow"]

    def warmed_up(self) -> None:
        """See `Executor.warmed_up`; rank 0 keeps the compiled kernels, which are the same on all ranks, for the next start."""
        if self._collectives.rank == 0:
            self._engines.keep_kernels()

    def _run_parts(self) -> None:
        buffers = self._set.buffers
        for engine, part in zip(self._set.engines, self._set.parts, strict=True):
            if self._graphs.enabled:
                engine.check_capturable()
            engine.enqueue()
            if part.sent is not None and part.received is not None:
                self._collectives.all_to_all(buffers[part.received], buffers[part.sent])


def load_nccl() -> None:
    """Load the NCCL that TensorRT will use; it is torch's, if torch has loaded one under this name."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(NCCL)


def check_one_nccl(maps: str) -> None:
    """Check that torch and TensorRT use the same NCCL, since a communicator works only with the library that made it.

    Raises:
        ExecutorError: two are loaded; their paths are in the message.
    """
    found = sorted({line.split(maxsplit=5)[-1].strip() for line in maps.splitlines() if "libnccl.so" in line})
    if len(found) > 1:
        raise ExecutorError(
            f"TensorRT and torch have each loaded an NCCL ({', '.join(found)}); put the folder of torch's first in "
            "LD_LIBRARY_PATH, or build with `--collectives runtime`"
        )


def engine_files(flavour: Flavour, targets: Mapping[str, TargetEngines], target: str) -> TargetEngines:
    """The engine files for a GPU architecture.

    Raises:
        ExecutorError: the bundle has no engines for it.
    """
    if target not in targets:
        raise ExecutorError(
            f"the bundle has {flavour.name} engines for {', '.join(targets)}, and this GPU is {target}; build it again with "
            f"`--executor {flavour.name} --target {target}`"
            + (
                ""
                if not flavour.targets or target in flavour.targets
                else f", which {flavour.name} cannot: use tensorrt"
            )
        )
    return targets[target]
