"""From a machine and a recipe: times of chunks, first frame, frames a second, memory and counts, for one head layout.

Times of a chunk:  4 denoising steps | gather | decode (9 frames, then 12) | refresh, off the latency path

Where the VAE decodes says how these overlap. `own`: on a GPU beside the ranks, while they refresh and go on. `shared`: on rank
0's, which then does both in turn. `split`: by rows over all ranks, which the runtime cannot do yet. `none`: latents.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from causalrt.config import Config, override
from causalrt.engines.base import TORCH_DTYPES
from causalrt.layout import slots_from_config
from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.model.codecs.wan_vae import TEMPORAL_SCALE
from causalrt.runtime.memory import DecoderMemory, predict_decoder_memory, predict_memory
from causalrt.tools.plan.assumptions import SPLIT_DECODE_SPEEDUP
from causalrt.tools.plan.decode_work import decode_weights
from causalrt.tools.plan.hardware import VaePlace
from causalrt.tools.plan.head_layouts import LayoutName, head_layout
from causalrt.tools.plan.roofline import GpuMachine, StepTime
from causalrt.tools.plan.spans import Case, Estimate, over_cases
from causalrt.tools.plan.work import StepWork, step_work


class Machine(Protocol):
    """What can tell the time of a step."""

    @property
    def name(self) -> str:
        """For people."""

    def step_time(self, work: StepWork, case: Case, *, slot_rows: int) -> StepTime:
        """Seconds of one chunk step on one rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkForecast:
    """Seconds of one chunk.

    Attributes:
        index: of the chunk.
        kv_frames: latent frames attended to.
        frames: that are shown of it.
        parts: of one step, nominal.
        step_s: one chunk step; the refresh is one too.
        denoise_s: all denoising steps.
        decode_s: by the VAE, on as many GPUs as it has; zero without one.
    """

    index: int
    kv_frames: int
    frames: int
    parts: StepTime
    step_s: Estimate
    denoise_s: Estimate
    decode_s: Estimate

    def period_s(self, vae: VaePlace, case: Case) -> float:
        """Until the next chunk can follow, in a stream that is made as fast as it can be."""
        ranks = self.denoise_s.at(case) + self.step_s.at(case)
        decode = self.decode_s.at(case)
        return max(ranks, decode) if vae == "own" else ranks + decode

    def latency_s(self, vae: VaePlace, case: Case) -> float:
        """From its start to its frames, if nothing is queued; on a shared GPU, the refresh takes turns with decoding."""
        refresh = self.step_s.at(case) if vae == "shared" else 0.0
        return self.denoise_s.at(case) + self.decode_s.at(case) + refresh


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """One layout on one number of ranks.

    Attributes:
        machine: in words.
        world_size: P.
        layout: its name.
        vae: where it decodes.
        counts: of one chunk on one rank, refresh included: `flops`, `all_to_all_calls`, `rows_sent`, and `bytes_sent`, which
            leaves its own block out.
        memory_bytes: of a rank, by part.
        decoder_bytes: of the decoder, by part; empty without one.
        chunks: of a video as long as the horizon.
        first_frame_s: prompt embeddings at hand, everything warm.
        latency_s: of the last chunk.
        frames_per_second: over the whole video.
        steady_frames_per_second: at the last chunk's length of history.
        bound_frames_per_second: steady, transformer alone, at the makers' peaks; None for a machine that was measured.
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
        """Devices in use."""
        return self.world_size + (self.vae == "own")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
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
        config: recipe; world size and head plan are taken from the arguments.
        machine: whose times.
        layout_name: how attention is divided.
        world_size: P.
        executor: for the memory: what of it an executor needs.
        vae: where it decodes; only a GPU of the table can tell its time.
    """
    config = override(config, {"build.world_size": str(world_size)})
    video, slots = config.video, slots_from_config(config)
    gpu = machine if isinstance(machine, GpuMachine) else None
    fused = gpu is not None and gpu.fused_ops
    chunks = []
    for index in range(video.horizon_chunks):
        first = video.first_frame_of(index)
        kind, frames = video.step_at(first), video.frames_at(first)
        layout = head_layout(config, layout_name, step=kind)
        kv_frames = slots.valid_frames(first, step=kind)
        work = step_work(config, layout, kv_rows=kv_frames * config.tokens_per_frame, fused_ops=fused)
        times = {
            case: machine.step_time(work, case, slot_rows=config.slot_rows) for case in ("best", "nominal", "worst")
        }
        step = over_cases(lambda case: times[case].total_s)  # noqa: B023
        decode = Estimate(best=0.0, nominal=0.0, worst=0.0)
        if gpu is not None and vae != "none":
            decode = _decode(
                config, gpu, frames=frames, first_chunk=index == 0, split=world_size if vae == "split" else 1
            )
        chunks.append(
            ChunkForecast(
                index=index,
                kv_frames=kv_frames,
                frames=TEMPORAL_SCALE * frames - (TEMPORAL_SCALE - 1) * (index == 0),
                parts=times["nominal"],
                step_s=step,
                denoise_s=step.scaled(len(config.sampler.steps)),
                decode_s=decode,
            )
        )
    forwards = len(config.sampler.steps) + 1
    last = chunks[-1]
    bound = None if gpu is None else last.frames / (forwards * gpu.bound_seconds(work))
    vae_config = gpu.vae if gpu is not None else VaeConfig()
    return Forecast(
        machine=machine.name,
        world_size=world_size,
        layout=layout_name,
        vae=vae,
        counts=_counts(config, work, forwards),
        memory_bytes=_memory(config, layout_name, layout.kv_heads, executor),
        decoder_bytes={} if vae == "none" else asdict(_decoder_memory(config, vae_config)),
        chunks=tuple(chunks),
        first_frame_s=over_cases(lambda case: chunks[0].latency_s(vae, case)),
        latency_s=over_cases(lambda case: last.latency_s(vae, case)),
        frames_per_second=over_cases(
            lambda case: sum(chunk.frames for chunk in chunks) / _video_seconds(chunks, vae, case)
        ),
        steady_frames_per_second=over_cases(lambda case: last.frames / last.period_s(vae, case)),
        bound_frames_per_second=bound,
    )


def _video_seconds(chunks: list[ChunkForecast], vae: VaePlace, case: Case) -> float:
    """Start of the first chunk to the last frame; nothing waits for the last refresh."""
    if vae != "own":
        spared = 0.0 if vae == "shared" else chunks[-1].step_s.at(case)
        return sum(chunk.period_s(vae, case) for chunk in chunks) - spared
    ranks = decoder = 0.0
    for chunk in chunks:
        decoder = max(decoder, ranks + chunk.denoise_s.at(case)) + chunk.decode_s.at(case)
        ranks += chunk.denoise_s.at(case) + chunk.step_s.at(case)
    return decoder


def _decode(config: Config, gpu: GpuMachine, *, frames: int, first_chunk: bool, split: int) -> Estimate:
    size = (config.video.latent_height, config.video.latent_width)
    known = max(ranks for ranks in SPLIT_DECODE_SPEEDUP if ranks <= split)
    return over_cases(
        lambda case: (
            gpu.decode_seconds(case, latent_size=size, latent_frames=frames, first_chunk=first_chunk)
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
    """As engines hold it: the weights that decoding needs, and both sets of caches."""
    weights = decode_weights(vae) * TORCH_DTYPES[config.build.precision].itemsize
    return predict_decoder_memory(vae, config, "tensorrt", weights_bytes=weights)
