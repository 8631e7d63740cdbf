"""The golden replay is sharp: each of these deliberate mistakes moves the final latents far past its tolerance.

Every mistake of model_spec section 11, made by patching the one function that could make it, and replayed on one
rank in this process. What they have in common is that shapes stay right and nothing raises.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import GOLDEN
from support.tolerances import DETECTED, RECORDED

from causalrt.config import SamplerConfig
from causalrt.engines import eager
from causalrt.engines.bundle import open_bundle
from causalrt.export import checkpoint
from causalrt.export.build import build
from causalrt.model.schedule import Schedule
from causalrt.model.tokens import latents_from_tokens
from causalrt.model.wan import rope, step
from causalrt.model.wan import transformer as wan
from causalrt.proof.recording import Recording, open_recording
from causalrt.runtime import kv_slots, rollout
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.noise import RecordedNoise
from causalrt.runtime.rollout import Rollout
from causalrt.runtime.session_buffers import SessionBufferPool


@functools.cache
def recording(case: str) -> Recording:
    return open_recording(GOLDEN / f"{case}.safetensors", world_size=1)


def replay_error(case: str, folder: Path) -> float:
    """Largest absolute error of the final latents of a recording, built and replayed with whatever is patched."""
    recorded = recording(case)
    config = recorded.config
    weights = recorded.write_checkpoint(folder / "checkpoint.safetensors")
    bundle = open_bundle(build(config, checkpoint=weights, out=folder / "bundle", executors=["eager"]))
    collectives = LocalCollectives()
    text = torch.zeros(config.model.text_len, config.model.text_dim)
    text[: len(recorded.prompt(0))] = recorded.prompt(0)
    executor = eager.EagerExecutor(bundle, collectives, device=torch.device("cpu"))
    session = Rollout(
        executor,
        collectives,
        config,
        bundle.layout,
        text=text,
        noise=RecordedNoise(recorded.noise(0)),
        buffers=SessionBufferPool(executor, config, bundle.layout).take(),
    )
    latents: list[torch.Tensor] = []
    for chunk in range(recorded.num_chunks):
        session.chunk(
            chunk,
            context_pass=True,
            record=False,
            deliver=lambda rows, _: latents.append(latents_from_tokens(rows, config)),
        )
    return float((torch.cat(latents) - recorded.tensors["out.latents"][0]).abs().max())


Mutation = Callable[[pytest.MonkeyPatch, Recording], None]
MUTATIONS: dict[str, tuple[tuple[str, ...], Mutation]] = {}


def mistake(name: str, *cases: str) -> Callable[[Mutation], Mutation]:
    """Register a mistake and the golden cases that shall catch it."""

    def register(mutation: Mutation) -> Mutation:
        MUTATIONS[name] = cases, mutation
        return mutation

    return register


@mistake("RoPE start_frame = 0", "A", "D")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = step.ChunkStep.rotation
    patch.setattr(step.ChunkStep, "rotation", lambda self, rank, frame: right(self, rank, torch.zeros_like(frame)))


@mistake("RoPE positions counted inside the window", "C")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = step.ChunkStep.rotation
    newest = recorded.config.video.capacity_frames - recorded.config.video.chunk_frames
    patch.setattr(step.ChunkStep, "rotation", lambda self, rank, frame: right(self, rank, frame.clamp(max=newest)))


@mistake("t and h widths of a head swapped", "A", "D")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = rope.axis_pairs

    def wrong(head_dim: int) -> tuple[int, int, int]:
        t, y, x = right(head_dim)
        return y, t, x

    patch.setattr(rope, "axis_pairs", wrong)


@mistake("y and x swapped", "B")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = rope.rope_tables

    def wrong(*args: object) -> rope.RopeTables:
        tables = right(*args)  # type: ignore[arg-type]
        half = tables.spatial.shape[-1] // 2
        return dataclasses.replace(tables, spatial=tables.spatial[..., [*range(half, 2 * half), *range(half)]])

    patch.setattr(step, "rope_tables", wrong)


@mistake("half-split pairs", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    def wrong(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
        a, b = x.unflatten(-1, (num_heads, -1)).chunk(2, dim=-1)
        c, s = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    patch.setattr(eager, "rotate_pairs", wrong)


@mistake("per-head RMSNorm", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    heads = recorded.config.model.num_heads

    def wrong(self: wan.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        by_head = x.unflatten(-1, (heads, -1))
        return F.rms_norm(by_head, by_head.shape[-1:], eps=self.eps).flatten(-2) * self.weight

    patch.setattr(wan.RMSNorm, "forward", wrong)


@mistake("sin before cos", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = eager.sinusoid
    patch.setattr(eager, "sinusoid", lambda t, freq_dim: right(t, freq_dim).roll(freq_dim // 2))


@mistake("frequency divisor half - 1", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    def wrong(timestep: float, freq_dim: int) -> torch.Tensor:
        half = freq_dim // 2
        angles = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
        return torch.cat([angles.cos(), angles.sin()])

    patch.setattr(eager, "sinusoid", wrong)


@mistake("no SiLU before the time projection", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    def wrong(self: wan.TimeGraph, sinusoid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        e = self.wan.time_embedding(sinusoid[None])
        return e[0], self.wan.time_projection[1](e).unflatten(-1, (6, -1))[0]

    patch.setattr(wan.TimeGraph, "forward", wrong)


@mistake("SiLU before the head's modulation", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = wan.Head.forward
    patch.setattr(wan.Head, "forward", lambda self, x, e: right(self, x, F.silu(e)))


@mistake("shift and scale swapped", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = wan.Block.modulate
    patch.setattr(wan.Block, "modulate", lambda self, x, shift, scale: right(self, x, scale, shift))


@mistake("norm3 without affine", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    def wrong(self: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)

    patch.setattr(torch.nn.LayerNorm, "forward", wrong)


@mistake("exact-erf GELU", "A", "B", "C", "D")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    patch.setattr(torch.nn.GELU, "forward", lambda self, x: F.gelu(x))


@mistake("text padding masked", "B", "D")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = eager.attend
    rows = int(recorded.prompt(0).abs().sum(dim=-1).count_nonzero())
    assert rows < recorded.config.model.text_len
    patch.setattr(eager, "attend", lambda q, k, v, heads: right(q, k[:, :rows], v[:, :rows], heads))


@mistake("cache ignored", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = KVSlots.filled
    patch.setattr(KVSlots, "filled", lambda self, first_frame, **kind: right(self, 0, **kind))


@mistake("context pass skipped", "A", "C")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = Rollout.chunk
    frames = recorded.config.video.chunk_frames

    def wrong(self: Rollout, index: int, *, context_pass: bool, record: bool, deliver: Callable[..., None]) -> object:
        result = right(self, index, context_pass=False, record=record, deliver=deliver)
        self.slots.commit(index * frames)
        return result

    patch.setattr(Rollout, "chunk", wrong)


@mistake("sink dropped", "C", "R")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = kv_slots.slots_from_config
    patch.setattr(kv_slots, "slots_from_config", lambda config: dataclasses.replace(right(config), sink_frames=0))


@mistake("whole-chunk eviction", "C")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    """W 7 holds two chunks of 3 and one frame of a third, which goes with the rest of its chunk."""
    right = kv_slots.slots_from_config
    frames = recorded.config.video.chunk_frames
    whole = recorded.config.video.capacity_frames // frames * frames
    assert whole < recorded.config.video.capacity_frames
    patch.setattr(
        kv_slots, "slots_from_config", lambda config: dataclasses.replace(right(config), capacity_frames=whole)
    )


@mistake("sigma = t / 1000", "N1")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = rollout.schedule_from_config

    def wrong(sampler: SamplerConfig) -> Schedule:
        schedule = right(sampler)
        return dataclasses.replace(schedule, sigmas=tuple(t / 1000 for t in schedule.timesteps))

    patch.setattr(rollout, "schedule_from_config", wrong)


@mistake("head row order", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = checkpoint._convert
    patch.setattr(
        checkpoint,
        "_convert",
        lambda source, name, *rest: right(source, name.replace("head.head", "other"), *rest),
    )


@mistake("patch order", "A")
def _(patch: pytest.MonkeyPatch, recorded: Recording) -> None:
    right = checkpoint._convert

    def wrong(source: torch.Tensor, name: str, *rest: object) -> tuple[torch.Tensor, str]:
        if name == "patch_embedding.weight":
            source = source.permute(0, 3, 4, 1, 2).contiguous()
        return right(source, name, *rest)  # type: ignore[arg-type]

    patch.setattr(checkpoint, "_convert", wrong)


@pytest.mark.parametrize("case", sorted({case for cases, _ in MUTATIONS.values() for case in cases}))
def test_without_a_mistake(case: str, tmp_path: Path) -> None:
    assert replay_error(case, tmp_path) < RECORDED


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (cases, _) in MUTATIONS.items() for case in cases])
def test_mistake_is_caught(name: str, case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    MUTATIONS[name][1](monkeypatch, recording(case))
    error = replay_error(case, tmp_path)
    assert error > DETECTED, f"the golden replay would not notice: {name} moves the latents of {case} by {error:.1e}"
