"""The rollout of a certificate, run free by every replica, and everything that is recorded of it.

    prompt 0 -> chunk 0, chunk 1 -> prompt 1 (history kept) -> chunk 2 ... up to the first chunk after an eviction

Errors in offsets do not show in chunk 0, and errors in eviction do not show while the window is not full. Prompts are random
rather than zero, so that a context pass that ignores the prompt shows in the keys and values that it writes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from causalrt.config import Config, ModelConfig
from causalrt.errors import RequestError
from causalrt.layout import Layout
from causalrt.model.schedule import schedule_from_config
from causalrt.proof.replica import Replica
from causalrt.proof.rollouts import Outputs, RolloutSpec, play
from causalrt.proof.trace import StepId, StepTrace, Trace
from causalrt.runtime.requests import checked_chunks
from causalrt.runtime.rollout import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """The rollout that every replica generates.

    Attributes:
        num_chunks: chunks to generate.
        evicted_chunk: the first chunk after frames have left the window; None if the horizon has none.
        switch_chunk: the first chunk of the second prompt; None if there is only one chunk.
        seed: of the noise; the prompts are drawn from it too.
        num_steps: denoising steps of a chunk.
    """

    num_chunks: int
    evicted_chunk: int | None
    switch_chunk: int | None
    seed: int
    num_steps: int

    @property
    def chunks(self) -> list[int]:
        """Chunks of which forwards are traced."""
        return sorted({0, min(1, self.num_chunks - 1), self.num_chunks - 1})

    @property
    def places(self) -> list[StepId]:
        """Forwards that are traced."""
        return [(chunk, label) for chunk in self.chunks for label in ("step 0", "refresh")]

    def prompts(self, model: ModelConfig) -> dict[str, torch.Tensor]:
        """Two prompts `[text_len, text_dim]` by name; the first one ends with a row of padding."""
        made = {}
        for number, rows in enumerate((max(1, model.text_len - 1), model.text_len)):
            generator = torch.Generator().manual_seed(self.seed + number)
            made[f"prompt {number}"] = torch.zeros(model.text_len, model.text_dim)
            made[f"prompt {number}"][:rows] = torch.randn(rows, model.text_dim, generator=generator)
        return made

    def spec(self, model: ModelConfig) -> RolloutSpec:
        """The rollout as a replica or a session plays it."""
        first, second = self.prompts(model).values()
        return RolloutSpec(
            num_chunks=self.num_chunks,
            prompt=first,
            second_prompt=second,
            switch_chunk=self.switch_chunk,
            seed=self.seed,
        )


def plan_rollout(config: Config, *, seed: int, num_chunks: int | None = None) -> RolloutPlan:
    """Plan chunks 0 and 1, and up to the first chunk after an eviction if the horizon holds one.

    Raises:
        RequestError: the horizon does not hold `num_chunks`, or the seed is out of range.
    """
    video = config.video
    if not 0 <= seed < 2**63:
        raise RequestError(f"seed must be a whole number in [0, 2**63), got {seed}")
    held = video.capacity_frames - video.chunk_frames
    most = checked_chunks(config, num_chunks)
    evicted = next((c for c in range(most) if video.first_frame_of(c) > held), None)
    if num_chunks is None:
        most = min(most, 3) if evicted is None else max(evicted + 1, 3 if most >= 3 else most)
    return RolloutPlan(
        num_chunks=most,
        evicted_chunk=evicted,
        switch_chunk=most - 1 if most > 1 else None,
        seed=seed,
        num_steps=len(config.sampler.steps),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutTrace:
    """The rollout of a replica.

    Attributes:
        outputs: by name, in the order in which they are computed; the names do not depend on the number of ranks.
        traces: of each rank.
    """

    outputs: Outputs
    traces: list[Trace]

    def forwards(self, place: StepId) -> list[StepTrace]:
        """One traced forward on every rank."""
        return [trace.forwards[place] for trace in self.traces]


def trace_bytes(config: Config, layout: Layout, plan: RolloutPlan) -> int:
    """Approximate size of the traces of two replicas with several ranks, and of the copies that steps are run from."""
    model, size = config.model, 4 if config.build.precision == "float32" else 2
    slots = 2 * 2 * config.slot_rows * layout.kv_heads
    blocks = 2 * layout.world_size * (layout.scatter_rows + layout.gather_rows)
    per_rank = model.num_layers * ((slots + blocks) * model.head_dim + 3 * layout.local_tokens * model.dim)
    return 3 * size * per_rank * layout.world_size * len(plan.places)


def trace_rollout(replica: Replica, plan: RolloutPlan, *, held_by: Layout) -> RolloutTrace:
    """Generate the planned rollout; keys and values are named after the ranks of `held_by` that hold them."""
    config = replica.config
    prompts = plan.prompts(config.model)

    def history(rank: int, chunk: int, rollout: Rollout) -> Mapping[str, torch.Tensor]:
        if chunk not in plan.chunks:
            return {}
        held = rollout.slots.history(config.video.first_frame_of(chunk + 1))
        rows = _as_held(held, replica.layout, rank, held_by)
        return {f"chunk {chunk} {name}": tensor.cpu().clone() for name, tensor in rows.items()}

    replica.open()
    traces = [Trace(plan.places, num_steps=plan.num_steps) for _ in replica.executors]
    small, *_ = replica.run(lambda rank: {} if rank else _small_graphs(replica, prompts))
    for executor, trace in zip(replica.executors, traces, strict=True):
        executor.trace = trace
    try:
        outputs = small | play(replica, plan.spec(config.model), inspect=history)
    finally:
        for executor in replica.executors:
            executor.trace = None
    return RolloutTrace(outputs={name: outputs[name] for name in sorted(outputs, key=_order)}, traces=traces)


def _small_graphs(replica: Replica, prompts: Mapping[str, torch.Tensor]) -> Outputs:
    """Outputs of the prompt graph and of the time graph."""
    found: Outputs = {}
    executor, schedule = replica.executors[0], schedule_from_config(replica.config.sampler)
    for prompt, text in prompts.items():
        for name, tensor in executor.encode_prompt(text).items():
            kind, layer = name.split(".")
            found[f"{prompt} layer {layer} {kind}"] = tensor.cpu().clone()
    for timestep in dict.fromkeys((*schedule.timesteps, schedule.context_timestep)):
        for name, tensor in executor.embed_time(timestep).items():
            found[f"time {timestep:g} {name}"] = tensor.cpu().clone()
    return found


def _as_held(
    history: Mapping[str, torch.Tensor], layout: Layout, rank: int, held_by: Layout
) -> dict[str, torch.Tensor]:
    """History `[rows, heads, D]` by layer, and by the rank and head shard of `held_by` that hold it.

    A single rank holds every head; one that emulates all ranks holds their shards, rank after rank.
    """
    found = {}
    for name, rows in history.items():
        kind, layer, number = name.split(".")
        if len(layout.shards) > 1 and layout.world_size < held_by.world_size:
            other, shard_number = divmod(int(number), len(held_by.shards))
            found[f"layer {layer} rank {other} shard {shard_number} {kind}"] = rows
            continue
        if layout.world_size == held_by.world_size:
            found[f"layer {layer} rank {rank} shard {number} {kind}"] = rows
            continue
        for other in range(held_by.world_size):
            for index, shard in enumerate(held_by.shards):
                heads = [min(head, held_by.num_heads - 1) for head in shard.heads(other)]
                found[f"layer {layer} rank {other} shard {index} {kind}"] = rows[:, heads]
    return found


def _order(name: str) -> tuple[Any, ...]:
    """Sort key for the order of computation: prompts, times, then for each chunk steps, latents, context pass, slots."""
    words = name.split()
    kind = ("prompt", "time", "chunk").index(words[0])
    if kind < 2:
        return kind, *map(_number_or_word, words[1:])
    part = ("step", "latents", "refresh", "layer").index(words[2])
    return kind, int(words[1]), part, *map(_number_or_word, words[3:])


def _number_or_word(word: str) -> tuple[float, str]:
    """Sort key: numbers by value, before words."""
    try:
        return float(word), ""
    except ValueError:
        return math.inf, word
