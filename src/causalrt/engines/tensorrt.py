"""The TensorRT executor, for both flavours: engines over persistent buffers, the whole step replayed as one CUDA graph.

    in the engine    x, e, e0, first_frame, kv_rows -> [ one engine ] -> flow       KV slots whole, updated in place
    at runtime       x -> [ engine ] -> all_to_all -> [ engine ] -> staging -> [ engine ] -> all_to_all ... -> flow

Every tensor has one address for as long as a session is bound, and nothing in a step waits for the device.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from causalrt.engines.base import TORCH_DTYPES, Collectives
from causalrt.engines.bundle import Bundle
from causalrt.engines.cuda_graphs import CudaGraphs
from causalrt.engines.step_record import StepPart, TargetEngines
from causalrt.engines.tensor_names import KV_ROWS, is_callers
from causalrt.engines.tensorrt_engine import EngineLoader
from causalrt.engines.tensorrt_flavour import Flavour, device_target
from causalrt.errors import ExecutorError
from causalrt.model.step import KVPair, KVTensors
from causalrt.model.wan import sinusoid


class TensorRTExecutor:
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
        self.whole_slots = exchanges or bundle.plugins  # a plugin takes the slots whole too
        self._config = config
        self._dtype = TORCH_DTYPES[config.build.precision]
        self._collectives = collectives
        self._engines = EngineLoader(flavour, device)
        plugins = (
            bundle.plugins and config.video.time_index == "global"
        )  # no plugin rotates: see `export/engine_files.py`
        self._prompt, self._time, *self._step = (
            self._engines.load(bundle.path / file, files.names.get(file), plugins=plugins)
            for file in files.engine_files
        )
        self._parts = bundle.engine_parts or (StepPart(file=files.step[0]),)
        self._engines.share_scratch()
        if exchanges and config.build.world_size > 1:
            self._step[0].set_communicator(collectives.communicator())
            check_one_nccl(Path("/proc/self/maps").read_text())
        self._buffers = self._make_buffers()
        self._buffers["rank"].fill_(collectives.rank)
        self._graphs = CudaGraphs(device, enabled=cuda_graphs)
        self._kv_rows = 0
        self._key = (-1, 0)
        self._bound: dict[str, torch.Tensor] = {}

    def _make_buffers(self) -> dict[str, torch.Tensor]:
        """What passes into, between and out of the engines; KV slots and the prompt's keys and values are the session's."""
        callers = {written for part in self._parts for written in part.writes}
        buffers: dict[str, torch.Tensor] = {}
        for engine, part in zip(self._step, self._parts, strict=True):
            for name in engine.names:
                if not is_callers(name) and name not in callers and name not in buffers:
                    buffers[name] = engine.empty(name)
            if part.sent is not None and part.received is not None:
                buffers[part.received] = torch.empty_like(buffers[part.sent])
        return buffers

    def encode_prompt(self, text: torch.Tensor) -> list[KVPair]:
        """See `Executor.encode_prompt`."""
        made = self._prompt.run_alone({"text": text.to(self.device, self._dtype)})
        return [(made[f"cross_k.{layer}"], made[f"cross_v.{layer}"]) for layer in range(self._config.model.num_layers)]

    def embed_time(self, timestep: float) -> KVPair:
        """See `Executor.embed_time`."""
        features = sinusoid(timestep, self._config.model.freq_dim).to(self.device, self._dtype)
        made = self._time.run_alone({"sinusoid": features})
        return made["e"], made["e0"]

    def bind(self, kv: KVTensors, cross_kv: Sequence[KVPair], *, kv_rows: int, memory: int) -> None:
        """See `Executor.bind`."""
        named: dict[str, torch.Tensor] = {}
        staged = self._config.tokens_per_chunk
        for layer, (shares, cross) in enumerate(zip(kv, cross_kv, strict=True)):
            named[f"cross_k.{layer}"], named[f"cross_v.{layer}"] = cross
            for share, pair in enumerate(shares):
                for kind, slots in zip("kv", pair, strict=True):
                    named[f"{kind}.{layer}.{share}"] = named[f"{kind}.{layer}.{share}.written"] = slots
        for part in self._parts:
            for output, written in part.writes.items():
                named[output] = named[written][:, :staged]
        self._bound = named  # engines and graphs hold addresses only
        self._kv_rows = kv_rows
        self._graphs.bind(memory, tuple(tensor.data_ptr() for tensor in named.values()))
        self._key = (memory, 0 if self.whole_slots else kv_rows)  # whole slots: `kv_rows` is read as a tensor
        for engine in self._step:
            engine.select_profile(kv_rows)
            engine.bind({name: self._buffers[name] if name in self._buffers else named[name] for name in engine.names})

    def step(self, x: torch.Tensor, e: torch.Tensor, e0: torch.Tensor, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        buffers = self._buffers
        for name, value in (("x", x), ("e", e), ("e0", e0)):
            buffers[name].copy_(value, non_blocking=True)
        if "first_frame" in buffers:  # nothing reads it where time is relative and no history is kept
            buffers["first_frame"].fill_(first_frame)
        if KV_ROWS in buffers:
            buffers[KV_ROWS].fill_(self._kv_rows)
        self._graphs.run(self._key, self._run_parts)
        return buffers["flow"]

    def warmed_up(self) -> None:
        """Every kind of step has run: what was compiled for them is kept for the next start."""
        self._engines.keep_kernels()

    def _run_parts(self) -> None:
        for engine, part in zip(self._step, self._parts, strict=True):
            engine.enqueue()
            if part.sent is not None and part.received is not None:
                self._collectives.all_to_all(self._buffers[part.received], self._buffers[part.sent])


def check_one_nccl(maps: str) -> None:
    """Refuse to go on when TensorRT has found an NCCL of its own: a communicator is of the library that made it.

    Raises:
        ExecutorError: with both paths.
    """
    found = sorted({line.split(maxsplit=5)[-1].strip() for line in maps.splitlines() if "libnccl.so" in line})
    if len(found) > 1:
        raise ExecutorError(
            f"TensorRT and torch have each loaded an NCCL ({', '.join(found)}); put the folder of torch's first in "
            "LD_LIBRARY_PATH, or build with `--collectives runtime`"
        )


def engine_files(flavour: Flavour, targets: Mapping[str, TargetEngines], target: str) -> TargetEngines:
    """The files of the engines for `target`.

    Raises:
        ExecutorError: the bundle has none for it.
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
