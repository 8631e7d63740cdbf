"""Run recorded rollouts again, free-running: through rank processes, or in this process by a `Player`.

Whatever runs it, a replay gives every forward's outputs under the recording's own names.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from causalrt.config import Config
from causalrt.engines.base import Executor
from causalrt.engines.bundle import open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.export.build import build
from causalrt.layout import Layout
from causalrt.model.tokens import tokens_from_latents
from causalrt.proof.recording import Recording
from causalrt.runtime.collectives import CountingCollectives, LocalCollectives
from causalrt.runtime.engine import Engine
from causalrt.runtime.noise import RecordedNoise
from causalrt.runtime.requests import checked_initial_latents, checked_text
from causalrt.runtime.rollout import ChunkTimes, Rollout, StepRecord, SwitchPolicy
from causalrt.runtime.session_buffers import SessionBufferPool

if TYPE_CHECKING:
    from causalrt.proof.emulate import EngineGraphs

Outputs = dict[tuple[int, str], torch.Tensor]
"""By batch element and the recording's own name (`out.c0.s1.flow`, `out.c0.s1.x0`, `out.c0`: latents): `[N, 64]`."""


def replay(recording: Recording, engine: Engine) -> Outputs:
    """Run every batch element as a session of its own, and keep what each forward computed."""
    outputs: Outputs = {}
    for element in range(recording.batch_size):
        with engine.session(
            recording.prompt(element),
            num_chunks=recording.num_chunks,
            initial_latents=recording.given(element),
            noise=recording.noise(element),
            record=True,
        ) as session:
            for index in range(recording.num_chunks):
                if index == recording.switch_chunk:
                    session.switch_prompt(recording.second_prompt(element))
                outputs[element, f"out.c{index}"] = tokens_from_latents(next(session).latents, recording.config)
        assert len(session.records) == recording.num_chunks
        assert len(session.initial_records) == recording.num_given
        for index, (record,) in enumerate(session.initial_records):
            outputs[element, f"out.g{index}.ctx.flow"] = record.flow
        for index, records in enumerate(session.records):
            outputs |= _outputs_of_chunk(element, index, records)
    return outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Player:
    """What a rollout in this process runs on.

    Attributes:
        executor: of all rows of a chunk, whatever number of ranks it stands for.
        config: that the rollout sees; its precision is that of the KV slots.
        layout: that the rollout sees; its shards are those whose KV slots are bound.
        collectives: of the rank that plays, where several play together.
    """

    executor: Executor
    config: Config
    layout: Layout
    collectives: CountingCollectives = field(default_factory=LocalCollectives)


def emulated_player(graphs: "EngineGraphs", *, num_threads: int = 1) -> Player:
    """The graphs that TensorRT parses, all ranks of them."""
    from causalrt.proof.emulate import emulated_executor, rollout_view  # needs ONNX Runtime, which may be missing

    config, layout = rollout_view(graphs.config)
    return Player(executor=emulated_executor(graphs, num_threads=num_threads), config=config, layout=layout)


def eager_player(config: Config, *, checkpoint: Path, folder: Path) -> Player:
    """Eager on one rank, in the precision of `config`; its bundle is left in `folder`."""
    config = replace(config, build=replace(config.build, world_size=1))
    bundle = open_bundle(build(config, checkpoint=checkpoint, out=folder, executors=["eager"]))
    executor = EagerExecutor(bundle, LocalCollectives(), device=torch.device("cpu"))
    return Player(executor=executor, config=config, layout=bundle.layout)


def replay_here(recording: Recording, player: Player, *, policy: SwitchPolicy = "keep") -> Outputs:
    """`replay` in this process; `policy` is what becomes of history where the prompt changes (the reference keeps it).

    Where several ranks play, each in a thread of its own, rank 0's call returns the outputs, and the others' return none.
    """
    outputs: Outputs = {}
    pool = SessionBufferPool(player.executor, player.config, player.layout)
    for element in range(recording.batch_size):
        noise, text = RecordedNoise(recording.noise(element)), checked_text(player.config, recording.prompt(element))
        session = Rollout(
            player.executor,
            player.collectives,
            player.config,
            player.layout,
            text=text,
            noise=noise,
            buffers=pool.take(),
        )
        for index, rows in enumerate(checked_initial_latents(player.config, recording.given(element))):
            for record in session.take_initial(rows, record=True):
                outputs[element, f"out.g{index}.ctx.flow"] = record.flow
        for index in range(recording.num_chunks):
            if index == recording.switch_chunk:
                session.switch_prompt(checked_text(player.config, recording.second_prompt(element)), policy)
            latents: list[torch.Tensor] = []
            deliver = functools.partial(_keep, latents)
            _, records = session.chunk(index, context_pass=True, record=True, deliver=deliver)
            for rows in latents:
                outputs[element, f"out.c{index}"] = rows
            outputs |= _outputs_of_chunk(element, index, records)
    return outputs


def _keep(latents: list[torch.Tensor], rows: torch.Tensor, times: ChunkTimes) -> None:
    latents.append(rows)


def _outputs_of_chunk(element: int, index: int, records: Sequence[StepRecord]) -> Outputs:
    outputs: Outputs = {}
    for k, record in enumerate(records):
        if record.x0 is None:
            outputs[element, f"out.c{index}.ctx.flow"] = record.flow
        else:
            outputs[element, f"out.c{index}.s{k}.flow"] = record.flow
            outputs[element, f"out.c{index}.s{k}.x0"] = record.x0
    return outputs


def recorded_outputs(recording: Recording) -> Outputs:
    """What the recording holds of the same outputs."""
    expected: Outputs = {}
    for element in range(recording.batch_size):
        for name, tensor in recording.tensors.items():
            if name.startswith(("out.c", "out.g")) and name.endswith((".flow", ".x0")):
                expected[element, name] = tokens_from_latents(tensor[element], recording.config)
        for chunk, latents in enumerate(recording.latents(element)):
            expected[element, f"out.c{chunk}"] = tokens_from_latents(latents, recording.config)
    return expected
