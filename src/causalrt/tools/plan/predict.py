"""Predict chunk times, first frame, frames a second, memory and counts of a recipe on a machine, for one head layout.

A chunk is 4 denoising steps | gather | decode (9 frames, then 12) | context pass, which does not add to the latency

How these overlap depends on where the VAE decodes. `own`: on a GPU beside the ranks, which go on meanwhile. `shared`: on the
GPU of rank 0, which does both in turn. `split`: by rows over all ranks, which the runtime cannot do yet. `none`: not at all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from causalrt.config import Config, override
from causalrt.engines.base import TORCH_DTYPES
from causalrt.layout import slots_from_config
from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.runtime.memory import DecoderMemory, predict_decoder_memory, predict_memory
from causalrt.tools.ops.work import LayoutName, StepWork, head_layout, step_work
from causalrt.tools.plan.assumptions import BOUNDS, SPLIT_DECODE_SPEEDUP, Bound, Estimate, over_bounds
from causalrt.tools.plan.decode_work import decode_weights
from causalrt.tools.plan.hardware import VaePlace
from causalrt.tools.plan.roofline import GpuMachine, StepTime


class Machine(Protocol):
    """A machine whose step times are known."""

    @property
    def name(self) -> str:
        """Name of the machine."""

    def step_time(self, work: StepWork, bound: Bound, *, slot_rows: int) -> StepTime:
        """Seconds of one chunk step on one rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkForecast:
    """Seconds of one chunk.

    Attributes:
        index: index of the chunk.
        kv_frames: latent frames attended to.
        frames: frames that it shows.
        parts: nominal seconds of one step by part.
        step_s: one chunk step; the context pass is one too.
        denoise_s: all denoising steps.
        decode_s: decoding on all GPUs of the VAE; zero without a VAE.
    """

    index: int
    kv_frames: int
    frames: int
    parts: StepTime
    step_s: Estimate
    denoise_s: Estimate
    decode_s: Estimate

    def period_s(self, vae: VaePlace, bound: Bound) -> float:
        """Seconds until the next chunk can follow, in a stream that is made as fast as possible."""
        ranks = self.denoise_s.at(bound) + self.step_s.at(bound)
        decode = self.decode_s.at(bound)
        return max(ranks, decode) if vae == "own" else ranks + decode

    def latency_s(self, vae: VaePlace, bound: Bound) -> float:
        """Seconds from its start to its frames without a queue; a shared GPU alternates between context pass and decoding."""
        context_pass = self.step_s.at(bound) if vae == "shared" else 0.0
        return self.denoise_s.at(bound) + self.decode_s.at(bound) + context_pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The prediction for one head layout on one number of ranks.

    Attributes:
        machine: name of the machine.
        world_size: P.
        layout: name of the head layout.
        vae: where the VAE decodes.
        counts: of one chunk on one rank, the context pass included: `flops`, `all_to_all_calls`, `rows_sent`, and
            `bytes_sent`, which excludes the rank's own block.
        memory_bytes: memory of a rank, by part.
        decoder_bytes: memory of the decoder, by part; empty without one.
        chunks: chunks of a video as long as the horizon.
        first_frame_s: seconds to the first frame, from prompt embeddings, with everything warm.
        latency_s: latency of the last chunk.
        frames_per_second: rate over the whole video.
        steady_frames_per_second: rate with the history of the last chunk.
        bound_frames_per_second: upper bound of the steady rate, of the transformer only and at the makers' figures; None for a
            machine that was measured.
    """

    machine: str
    world_size: int
    layout: LayoutName
    vae: VaePlace
    counts: Mapping[str, int]
    memory_bytes: Mapping[str, int]
    decoder_bytes: Mapping[str, int]
    chunks: tuple[ChunkForecast, ...]
    first_frame_s: Estimate
    latency_s: Estimate
    frames_per_second: Estimate
    steady_frames_per_second: Estimate
    bound_frames_per_second: float | None

    @property
    def gpus(self) -> int:
        """Number of GPUs in use."""
        return self.world_size + (self.vae == "own")

    def as_dict(self) -> dict[str, Any]:
        """The forecast in plain JSON types."""
        return {**asdict(self), "gpus": self.gpus}


def forecast(
    config: Config,
    machine: Machine,
    layout_name: LayoutName,
    *,
    world_size: int,
    executor: str,
    vae: VaePlace = "none",
) -> Forecast:
    """Predict a video as long as the horizon.

    Args:
        config: the recipe; its world size and head plan are ignored.
        machine: the machine.
        layout_name: name of the head layout.
        world_size: P.
        executor: name of the executor, on which memory depends.
        vae: where the VAE decodes; its times are known for GPUs of the table only.
    """
    config = override(config, {"build.world_size": str(world_size)})
    gpu = machine if isinstance(machine, GpuMachine) else None
    forecasts = [_chunk(config, machine, layout_name, index, vae) for index in range(config.video.horizon_chunks)]
    chunks, work = [chunk for chunk, _ in forecasts], forecasts[-1][1]
    forwards = len(config.sampler.steps) + 1
    last = chunks[-1]
    vae_config = gpu.vae if gpu is not None else VaeConfig()
    return Forecast(
        machine=machine.name,
        world_size=world_size,
        layout=layout_name,
        vae=vae,
        counts=_counts(config, work, forwards),
        memory_bytes=_memory(config, layout_name, work.layout.kv_heads, executor),
        decoder_bytes={} if vae == "none" else asdict(_decoder_memory(config, vae_config)),
        chunks=tuple(chunks),
        first_frame_s=over_bounds(lambda bound: chunks[0].latency_s(vae, bound)),
        latency_s=over_bounds(lambda bound: last.latency_s(vae, bound)),
        frames_per_second=over_bounds(
            lambda bound: sum(chunk.frames for chunk in chunks) / _video_seconds(chunks, vae, bound)
        ),
        steady_frames_per_second=over_bounds(lambda bound: last.frames / last.period_s(vae, bound)),
        bound_frames_per_second=None if gpu is None else last.frames / (forwards * gpu.bound_seconds(work)),
    )


def _chunk(
    config: Config, machine: Machine, layout_name: LayoutName, index: int, vae: VaePlace
) -> tuple[ChunkForecast, StepWork]:
    video, slots = config.video, slots_from_config(config)
    gpu = machine if isinstance(machine, GpuMachine) else None
    first = video.first_frame_of(index)
    kind, frames = video.step_at(first), video.frames_at(first)
    kv_frames = slots.valid_frames(first, step=kind)
    work = step_work(
        config,
        head_layout(config, layout_name, step=kind),
        kv_rows=kv_frames * config.tokens_per_frame,
        fused_ops=gpu is not None and gpu.fused_ops,
    )
    times = {bound: machine.step_time(work, bound, slot_rows=config.slot_rows) for bound in BOUNDS}
    step = over_bounds(lambda bound: times[bound].total_s)
    decode = Estimate(best=0.0, nominal=0.0, worst=0.0)
    if gpu is not None and vae != "none":
        split = config.build.world_size if vae == "split" else 1
        decode = _decode(config, gpu, frames=frames, first_chunk=index == 0, split=split)
    chunk = ChunkForecast(
        index=index,
        kv_frames=kv_frames,
        frames=config.video.codec.frames_of(frames, first=index == 0),
        parts=times["nominal"],
        step_s=step,
        denoise_s=step.scaled(len(config.sampler.steps)),
        decode_s=decode,
    )
    return chunk, work


def _video_seconds(chunks: list[ChunkForecast], vae: VaePlace, bound: Bound) -> float:
    """Seconds from the start of the first chunk to the last frame; nothing waits for the last context pass."""
    if vae != "own":
        spared = 0.0 if vae == "shared" else chunks[-1].step_s.at(bound)
        return sum(chunk.period_s(vae, bound) for chunk in chunks) - spared
    ranks = decoder = 0.0
    for chunk in chunks:
        decoder = max(decoder, ranks + chunk.denoise_s.at(bound)) + chunk.decode_s.at(bound)
        ranks += chunk.denoise_s.at(bound) + chunk.step_s.at(bound)
    return decoder


def _decode(config: Config, gpu: GpuMachine, *, frames: int, first_chunk: bool, split: int) -> Estimate:
    size = (config.video.latent_height, config.video.latent_width)
    known = max(ranks for ranks in SPLIT_DECODE_SPEEDUP if ranks <= split)
    return over_bounds(
        lambda bound: (
            gpu.decode_seconds(bound, latent_size=size, latent_frames=frames, first_chunk=first_chunk)
            / SPLIT_DECODE_SPEEDUP[known]
        )
    )


def _counts(config: Config, work: StepWork, forwards: int) -> dict[str, int]:
    ranks = work.layout.world_size
    size = TORCH_DTYPES[config.build.precision].itemsize
    return {
        "flops": forwards * work.flops,
        "all_to_all_calls": forwards * work.calls,
        "rows_sent": forwards * work.rows_sent,
        "bytes_sent": forwards * work.rows_sent * (ranks - 1) // ranks * config.model.head_dim * size,
    }


def _memory(config: Config, name: LayoutName, kv_heads: int, executor: str) -> dict[str, int]:
    plan = "balanced" if name == "gathered" else name
    memory = predict_memory(override(config, {"build.head_plan": plan}), executor)
    if name == "gathered":
        model, size = config.model, TORCH_DTYPES[config.build.precision].itemsize
        rows = 2 * model.num_layers * config.slot_rows * model.head_dim * size
        memory = replace(memory, kv_bytes=rows * kv_heads)
    return {**asdict(memory), "total_bytes": memory.total_bytes}


def _decoder_memory(config: Config, vae: VaeConfig) -> DecoderMemory:
    """Memory of a decoder that runs engines: the weights that decoding needs, and both sets of caches."""
    weights = decode_weights(vae) * TORCH_DTYPES[config.build.precision].itemsize
    return predict_decoder_memory(vae, config, "tensorrt", weights_bytes=weights)
