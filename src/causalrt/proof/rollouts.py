"""Whole rollouts of a side, free-running: what is asked for, and all that comes out of it, by name.

    prompt 0 -> chunk 0, chunk 1 -> prompt 1 (history kept) -> chunk 2 ... the first one after frames have left the window

Chunk 0 hides every mistake of an offset, and a window that is never full those of eviction. Prompts are random and not zero, so
that a refresh that does without one shows in the keys and values that it leaves.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from causalrt.config import Config, ModelConfig
from causalrt.errors import RequestError
from causalrt.layout import Layout
from causalrt.model.schedule import schedule_from_config
from causalrt.proof.sides import Replica
from causalrt.proof.watch import StepId, Trace
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.requests import checked_chunks
from causalrt.runtime.rollout import ChunkTimes, Rollout, StepRecord
from causalrt.runtime.session_buffers import SessionBufferPool


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPlan:
    """What every side generates.

    Attributes:
        num_chunks: of the rollout.
        evicted_chunk: the first one that finds frames gone from the window; None if there is none.
        switch_chunk: from which on the second prompt is attended to; None where there are too few chunks.
        seed: of the noise; prompts follow from it.
        num_steps: denoising steps of a chunk.
    """

    num_chunks: int
    evicted_chunk: int | None
    switch_chunk: int | None
    seed: int
    num_steps: int

    @property
    def chunks(self) -> list[int]:
        """Chunks that are looked at from inside."""
        return sorted({0, min(1, self.num_chunks - 1), self.num_chunks - 1})

    @property
    def places(self) -> list[StepId]:
        """Forwards that are looked at from inside."""
        return [(chunk, label) for chunk in self.chunks for label in ("step 0", "refresh")]

    def prompts(self, model: ModelConfig) -> dict[str, torch.Tensor]:
        """Two prompts `[text_len, text_dim]`, by name: the first with a row of padding, the second full."""
        made = {}
        for number, rows in enumerate((max(1, model.text_len - 1), model.text_len)):
            generator = torch.Generator().manual_seed(self.seed + number)
            made[f"prompt {number}"] = torch.zeros(model.text_len, model.text_dim)
            made[f"prompt {number}"][:rows] = torch.randn(rows, model.text_dim, generator=generator)
        return made


def plan_rollout(config: Config, *, seed: int, num_chunks: int | None = None) -> RolloutPlan:
    """Chunks 0, 1, and one after eviction where the window and the horizon let one come.

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
    """A rollout of a side.

    Attributes:
        outputs: by name, in the order in which they arise; the same names on any number of ranks.
        tapes: of each rank, the forwards that are looked at.
    """

    outputs: dict[str, torch.Tensor]
    tapes: list[Trace]


def recording_bytes(config: Config, layout: Layout, plan: RolloutPlan) -> int:
    """Roughly what is kept of the forwards that are looked at, over two sides of several ranks and their copies as feeds."""
    model, size = config.model, 4 if config.build.precision == "float32" else 2
    slots = 2 * 2 * config.slot_rows * layout.kv_heads
    blocks = 2 * layout.world_size * (layout.scatter_rows + layout.gather_rows)
    per_rank = model.num_layers * ((slots + blocks) * model.head_dim + 3 * layout.local_tokens * model.dim)
    return 3 * size * per_rank * layout.world_size * len(plan.places)


@torch.inference_mode()
def play(side: Replica, plan: RolloutPlan, prompts: Mapping[str, torch.Tensor], *, held_by: Layout) -> RolloutTrace:
    """Generate; keys and values are given as the ranks of `held_by` hold them."""
    side.open()
    config, layout = side.bundle.config, side.bundle.layout
    texts = list(prompts.values())
    tapes = [Trace(plan.places, num_steps=plan.num_steps) for _ in range(side.world_size)]

    def on_rank(rank: int) -> dict[str, torch.Tensor]:
        executor, found = side.executors[rank], dict[str, torch.Tensor]()
        executor.tape = tapes[rank]
        if rank == 0:
            _add_small_graphs(found, side, config, prompts)
        rollout = Rollout(
            executor,
            side.collectives[rank],
            config,
            layout,
            text=texts[0],
            noise=SeededNoise(plan.seed),
            buffers=SessionBufferPool(executor, config, layout).take(),
        )
        for chunk in range(plan.num_chunks):
            tapes[rank].begin_chunk(chunk)
            if chunk == plan.switch_chunk:
                rollout.switch_prompt(texts[1], "keep")
            latents: list[torch.Tensor] = []
            deliver = functools.partial(_keep, latents)
            _, records = rollout.chunk(chunk, context_pass=True, record=True, deliver=deliver)
            if rank == 0:
                found |= outputs_of_chunk(chunk, latents[0], records)
            if chunk in plan.chunks:
                history = rollout.slots.history(config.video.first_frame_of(chunk + 1))
                for name, rows in _as_held(history, layout, rank, held_by).items():
                    found[f"chunk {chunk} {name}"] = rows.cpu().clone()
        executor.tape = None
        return found

    by_rank = side.run(on_rank)
    names = sorted({name for found in by_rank for name in found}, key=_order)
    return RolloutTrace(
        outputs={name: next(found[name] for found in by_rank if name in found) for name in names}, tapes=tapes
    )


def _keep(latents: list[torch.Tensor], rows: torch.Tensor, times: ChunkTimes) -> None:
    latents.append(rows)


def outputs_of_chunk(chunk: int, latents: torch.Tensor, records: Sequence[StepRecord]) -> dict[str, torch.Tensor]:
    """What leaves the ranks, `[N, 64]` each, by name."""
    found = {f"chunk {chunk} latents": latents}
    for number, record in enumerate(records):
        if record.x0 is None:
            found[f"chunk {chunk} refresh flow"] = record.flow
        else:
            found[f"chunk {chunk} step {number} flow"] = record.flow
            found[f"chunk {chunk} step {number} x0"] = record.x0
    return found


def _add_small_graphs(
    found: dict[str, torch.Tensor], side: Replica, config: Config, prompts: Mapping[str, torch.Tensor]
) -> None:
    """Outputs of the prompt's and the time's graph."""
    executor, schedule = side.executors[0], schedule_from_config(config.sampler)
    for prompt, text in prompts.items():
        for name, tensor in executor.encode_prompt(text).items():
            kind, layer = name.split(".")
            found[f"{prompt} layer {layer} {kind}"] = tensor.cpu().clone()
    for timestep in dict.fromkeys((*schedule.timesteps, schedule.context_timestep)):
        for name, tensor in executor.embed_time(timestep).items():
            found[f"time {timestep:g} {name}"] = tensor.cpu().clone()


def _as_held(
    history: Mapping[str, torch.Tensor], layout: Layout, rank: int, held_by: Layout
) -> dict[str, torch.Tensor]:
    """History `[rows, heads, D]` by layer, and by the rank and shard of `held_by` that hold it.

    One rank holds every head; one that plays all ranks holds their shards, rank after rank.
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
    """Sorts names by when they arise: prompts, times, then chunk by chunk steps, latents, refresh, slots."""
    words = name.split()
    kind = ("prompt", "time", "chunk").index(words[0])
    if kind < 2:
        return kind, *map(_number_or_word, words[1:])
    part = ("step", "latents", "refresh", "layer").index(words[2])
    return kind, int(words[1]), part, *map(_number_or_word, words[3:])


def _number_or_word(word: str) -> tuple[float, str]:
    """Sorts numbers by their value, and before words."""
    try:
        return float(word), ""
    except ValueError:
        return math.inf, word
