"""One rollout, free-running, from a recording or from a seed: by a replica in this process, or through the rank processes.

Either way the flow and x0 of every forward and the latents of every chunk come out under the same names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from causalrt.model.tokens import tokens_from_latents
from causalrt.proof.replica import Replica
from causalrt.runtime.engine import Engine
from causalrt.runtime.noise import RecordedNoise, SeededNoise
from causalrt.runtime.requests import checked_initial_latents, checked_text
from causalrt.runtime.rollout import Rollout, StepRecord, SwitchPolicy

Outputs = dict[str, torch.Tensor]
"""By name, `[N, 64]` each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputNames:
    """Names of a rollout's outputs, as format strings."""

    step: str = "chunk {chunk} step {step} {kind}"
    context: str = "chunk {chunk} refresh flow"
    latents: str = "chunk {chunk} latents"
    initial: str = "initial chunk {chunk} flow"

    def of_chunk(self, chunk: int, records: Sequence[StepRecord]) -> Outputs:
        """The flows and x0 of a chunk's forwards by name."""
        outputs: Outputs = {}
        for step, record in enumerate(records):
            if record.x0 is None:
                outputs[self.context.format(chunk=chunk)] = record.flow
            else:
                outputs[self.step.format(chunk=chunk, step=step, kind="flow")] = record.flow
                outputs[self.step.format(chunk=chunk, step=step, kind="x0")] = record.x0
        return outputs

    def of_initial(self, records: Sequence[Sequence[StepRecord]]) -> Outputs:
        """The flows of the forwards over initial latents by name."""
        return {
            self.initial.format(chunk=chunk): record.flow for chunk, found in enumerate(records) for record in found
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutSpec:
    """What a rollout is generated from.

    Attributes:
        num_chunks: chunks to generate.
        prompt: `[rows, text_dim]`.
        second_prompt: `[rows, text_dim]`, used from `switch_chunk` on.
        switch_chunk: the first chunk of the second prompt; None for one prompt.
        initial_latents: `[G, 16, H, W]` that the video begins with, or None.
        noise: for each chunk `[steps, N, 64]`; None draws it from `seed`.
        seed: of the noise.
        names: of the outputs.
    """

    num_chunks: int
    prompt: torch.Tensor
    second_prompt: torch.Tensor | None = None
    switch_chunk: int | None = None
    initial_latents: torch.Tensor | None = None
    noise: Sequence[torch.Tensor] | None = None
    seed: int = 0
    names: OutputNames = field(default_factory=OutputNames)

    def make_noise(self) -> RecordedNoise | SeededNoise:
        """A new source of the rollout's noise."""
        return SeededNoise(self.seed) if self.noise is None else RecordedNoise(list(self.noise))


def play(
    replica: Replica,
    spec: RolloutSpec,
    *,
    policy: SwitchPolicy = "keep",
    inspect: Callable[[int, int, Rollout], Mapping[str, torch.Tensor]] = lambda *_: {},
) -> Outputs:
    """Generate a rollout on all ranks of a replica.

    Args:
        replica: what runs it.
        spec: what is generated.
        policy: what becomes of the history when the prompt changes; the reference keeps it.
        inspect: called on each rank as `inspect(rank, chunk, rollout)` after each chunk; its result is added to the outputs.
    """

    def on_rank(rank: int) -> Outputs:
        rollout = Rollout(
            replica.executors[rank],
            replica.collectives[rank],
            replica.config,
            replica.layout,
            text=checked_text(replica.config, spec.prompt),
            noise=spec.make_noise(),
            buffers=replica.pools[rank].take(),
        )
        initial = checked_initial_latents(replica.config, spec.initial_latents)
        outputs = spec.names.of_initial([rollout.take_initial(rows, record=True) for rows in initial])
        for chunk in range(spec.num_chunks):
            if chunk == spec.switch_chunk and spec.second_prompt is not None:
                rollout.switch_prompt(checked_text(replica.config, spec.second_prompt), policy)
            outputs |= _one_chunk(rollout, chunk, spec.names)
            outputs |= inspect(rank, chunk, rollout)
        return outputs

    merged: Outputs = {}
    for outputs in replica.run(on_rank):
        merged |= {name: tensor for name, tensor in outputs.items() if name not in merged}
    return merged


def _one_chunk(rollout: Rollout, chunk: int, names: OutputNames) -> Outputs:
    latents: list[torch.Tensor] = []
    _, records = rollout.chunk(chunk, context_pass=True, record=True, deliver=lambda rows, _: latents.append(rows))
    return {names.latents.format(chunk=chunk): rows for rows in latents} | names.of_chunk(chunk, records)


def play_session(engine: Engine, spec: RolloutSpec) -> Outputs:
    """Generate a rollout in a session of an engine, which runs it in its rank processes."""
    outputs: Outputs = {}
    with engine.session(
        spec.prompt,
        num_chunks=spec.num_chunks,
        initial_latents=spec.initial_latents,
        noise=spec.noise,
        seed=spec.seed,
        record=True,
    ) as session:
        for chunk in range(spec.num_chunks):
            if chunk == spec.switch_chunk and spec.second_prompt is not None:
                session.switch_prompt(spec.second_prompt, policy="keep")
            outputs[spec.names.latents.format(chunk=chunk)] = tokens_from_latents(next(session).latents, engine.config)
    outputs |= spec.names.of_initial(session.initial_records)
    for chunk, records in enumerate(session.records):
        outputs |= spec.names.of_chunk(chunk, records)
    return outputs
