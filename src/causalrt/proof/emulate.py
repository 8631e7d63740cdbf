"""The graphs that TensorRT parses, written as a build writes them and run by ONNX Runtime with all ranks in this process.

    checkpoint -> weights, prompt.onnx, time.onnx, whole-step.onnx or cut-step-*.onnx      the build's own functions
               -> DistCollective to Split and Concat, low precision to rounded float32     emulated_graph
               -> an executor that runs all P ranks                                        here

A rollout uses it as an executor on one rank: it takes and returns all N rows, and the KV slots of all ranks are bound to it,
rank after rank. Rows that pad the last ranks are NaN, so that a step that reads one of them returns NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES, Executor, SessionView
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH, WEIGHTS, Bundle
from causalrt.engines.step_record import StepPart
from causalrt.engines.tensor_names import KV_ROWS
from causalrt.export.checkpoint import check_checkpoint, open_checkpoint, write_weights
from causalrt.export.engine_files import write_engine_graphs
from causalrt.export.onnx import write_small_graphs
from causalrt.export.options import CollectivesMode
from causalrt.export.passes import PassContext
from causalrt.export.pipelines import STANDARD_OPS, apply
from causalrt.export.trace import wan_from_file
from causalrt.layout import Layout, layout_from_config, layouts_from_config
from causalrt.model.wan.conditioning import Conditioning
from causalrt.model.wan.transformer import sinusoid
from causalrt.proof.emulated_graph import emulate_precision, emulate_ranks, rank_name

Arrays = dict[str, npt.NDArray[Any]]
"""Tensors by their names in a graph; float32 or int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineGraphs:
    """Graphs as TensorRT parses them, weights beside them.

    Attributes:
        folder: the folder of the graphs, which may be a bundle's.
        config: the config that they were written from.
        collectives: whether the engine or the runtime exchanges.
        steps: for each kind of step, its parts in order.
        fused: self-attention consists of the fused ops; the step takes whole KV slots.
    """

    folder: Path
    config: Config
    collectives: CollectivesMode
    steps: Sequence[Sequence[StepPart]]
    fused: bool = False


def write_graphs(
    config: Config, *, checkpoint: Path, folder: Path, collectives: CollectivesMode, fused: bool = False
) -> EngineGraphs:
    """Write what a build for TensorRT writes before it builds engines, in any precision.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has other sizes than the config.
    """

    def on_progress(stage: str, done: int, total: int) -> None: ...

    opened = open_checkpoint(checkpoint)
    check_checkpoint(opened, config.model)
    write_weights(
        opened,
        config.model,
        dtype=TORCH_DTYPES[config.build.precision],
        out=folder / WEIGHTS,
        on_progress=lambda done, total: None,
    )
    wan = wan_from_file(config, folder / WEIGHTS)
    write_small_graphs(wan, config, folder, on_progress)
    steps = [
        write_engine_graphs(
            wan, config, folder, on_progress, collectives=collectives, segmented=None, fused=fused, step=step
        )
        for step in range(len(config.video.step_frames))
    ]
    return EngineGraphs(folder=folder, config=config, collectives=collectives, fused=fused, steps=steps)


def bundle_graphs(bundle: Bundle, flavour: str) -> EngineGraphs:
    """The graphs that a bundle's engines were built from."""
    return EngineGraphs(
        folder=bundle.path,
        config=bundle.config,
        collectives="engine" if bundle.engines[flavour].collectives == "engine" else "runtime",
        steps=[step.tensorrt for step in bundle.steps],
        fused=bundle.fused_ops,
    )


class _Graph:
    """A graph of the folder, loaded by ONNX Runtime."""

    def __init__(self, folder: Path, file: str, *, num_threads: int, world_size: int | None = None) -> None:
        model = onnx.load(folder / file, load_external_data=False)
        apply(STANDARD_OPS, model, PassContext())
        if world_size is not None:
            model = emulate_ranks(model, world_size)
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.log_severity_level = 3  # TensorScatter warns about every cache that is not bound in place
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        source = emulate_precision(model).SerializeToString()
        self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, values: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Compute all outputs; `values` may hold more than the graph's inputs."""
        results = self._session.run(self._outputs, {name: values[name] for name in self._inputs})
        return dict(zip(self._outputs, results, strict=True))


class _AllRanks(Executor):
    """What both kinds of exchange share: prompt and time, and the inputs of each rank's step."""

    device = torch.device("cpu")

    def __init__(self, graphs: EngineGraphs, *, num_threads: int) -> None:
        self._config, self._layouts = graphs.config, layouts_from_config(graphs.config)
        self._number = 0
        self._prompt = _Graph(graphs.folder, PROMPT_GRAPH, num_threads=num_threads)
        self._time = _Graph(graphs.folder, TIME_GRAPH, num_threads=num_threads)
        self._ranks = range(self._layouts[0].world_size)
        self._bound: list[Arrays] = []

    @property
    def _layout(self) -> Layout:
        return self._layouts[self._number]

    def encode_prompt(self, text: torch.Tensor) -> Conditioning:
        """See `Executor.encode_prompt`."""
        return {name: torch.from_numpy(value) for name, value in self._prompt.run({"text": text.numpy()}).items()}

    def embed_time(self, timestep: float) -> Conditioning:
        """See `Executor.embed_time`."""
        made = self._time.run({"sinusoid": sinusoid(timestep, self._config.model.freq_dim).float().numpy()})
        return {name: torch.from_numpy(value) for name, value in made.items()}

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`; the pairs of a layer are those of all head shards of rank 0, then of rank 1, and so on."""
        self._number = view.step
        shards = len(self._layout.shards)
        self._bound = []
        for rank in self._ranks:
            own = replace(view, kv=[pairs[rank * shards : (rank + 1) * shards] for pairs in view.kv])
            values: Arrays = {name: tensor.numpy() for name, tensor in own.tensors().items()}
            self._bound.append(values | {"rank": np.array([rank]), KV_ROWS: np.array([view.kv_rows])})

    def _given(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> list[Arrays]:
        """Inputs of each rank's step: its rows, with NaN for padding, and what is bound."""
        rows = torch.full((len(self._ranks) * self._layout.local_tokens, x.shape[1]), torch.nan)
        rows[: len(x)] = x
        common = {name: tensor.numpy() for name, tensor in time.items()} | {"first_frame": np.array([first_frame])}
        return [
            values | common | {"x": own.numpy()}
            for values, own in zip(self._bound, rows.chunk(len(self._ranks)), strict=True)
        ]

    def _flow(self, values: Sequence[Mapping[str, npt.NDArray[Any]]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([own["flow"] for own in values])[: self._layout.num_tokens])


class EmulatedEngine(_AllRanks):
    """Exchanges in the engine: the whole step of all ranks is one graph."""

    whole_slots = True

    def __init__(self, graphs: EngineGraphs, *, num_threads: int) -> None:
        super().__init__(graphs, num_threads=num_threads)
        self._steps = [
            _Graph(graphs.folder, part.file, num_threads=num_threads, world_size=len(self._ranks))
            for (part,) in graphs.steps
        ]

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        given = self._given(x, time, first_frame)
        feed = {rank_name(rank, name): value for rank in self._ranks for name, value in given[rank].items()}
        made = self._steps[self._number].run(feed)
        for rank in self._ranks:
            for name, slots in self._bound[rank].items():
                if name.startswith(("k.", "v.")):
                    slots[:] = made[rank_name(rank, f"{name}.written")]
        return self._flow([{"flow": made[rank_name(rank, "flow")]} for rank in self._ranks])


class EmulatedSegments(_AllRanks):
    """Exchanges by the runtime: each segment runs on all ranks; exchanges and writes to the KV slots follow it."""

    def __init__(self, graphs: EngineGraphs, *, num_threads: int) -> None:
        super().__init__(graphs, num_threads=num_threads)
        self.whole_slots = graphs.fused
        self._steps = [
            [(part, _Graph(graphs.folder, part.file, num_threads=num_threads)) for part in parts]
            for parts in graphs.steps
        ]

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        ranks = self._given(x, time, first_frame)
        for part, segment in self._steps[self._number]:
            for values in ranks:
                made = segment.run(values)
                for name in made.keys() & {f"{name}.written" for name in values}:
                    values[name.removesuffix(".written")][:] = made.pop(name)  # a fused op returns whole KV slots
                values |= made
                for source, target in part.writes.items():
                    slots = values[target.removesuffix(".written")]
                    slots[:, : values[source].shape[1]] = values[source]
                    values[target] = slots  # not before the write, so that a segment that reads them too early fails
            if part.sent is not None and part.received is not None:
                for rank, values in enumerate(ranks):
                    values[part.received] = np.stack([other[part.sent][rank] for other in ranks])
        return self._flow(ranks)


def emulated_executor(graphs: EngineGraphs, *, num_threads: int) -> EmulatedEngine | EmulatedSegments:
    """An executor that runs all ranks of `graphs`, for rollouts with `rollout_view` of their config."""
    kind = EmulatedEngine if graphs.collectives == "engine" else EmulatedSegments
    return kind(graphs, num_threads=num_threads)


def rollout_view(config: Config) -> tuple[Config, Layout]:
    """Config and layout of a rollout on an emulated executor: float32, one rank with all rows and all ranks' KV slots."""
    layout = layout_from_config(config)
    build = replace(config.build, world_size=1, precision="float32")
    every = replace(layout, world_size=1, shards=layout.shards * layout.world_size)
    return replace(config, build=build), every
