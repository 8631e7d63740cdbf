"""Chunks through a decoder: the demo's cosine transform, and Wan's VAE with random weights."""

import functools
import statistics

import torch

from causalrt.config import Config
from causalrt.demo_model import demo_files
from causalrt.errors import ExecutorError
from causalrt.export.random_encoders import SMALL_VAE, random_vae
from causalrt.measure.gpu_day.predictions import columns, planner_for
from causalrt.measure.gpu_day.recorder import Recorder
from causalrt.model.codecs.decode_state import DecodeState
from causalrt.model.codecs.protocol import Decoder
from causalrt.model.codecs.registry import eager_decoder, load_vae
from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.recipes import recipe
from causalrt.tools.ops.timing import seconds_of

TABLE = "milliseconds of a chunk"


def run(recorder: Recorder) -> None:
    """Decode a few chunks with each decoder at the size of the 1.3B model's videos, or at the smallest size in a dry run."""
    planner = None if recorder.dry_run else planner_for(recorder)
    config = recipe("tiny" if recorder.dry_run else "wan_1_3b_480p")
    with recorder.attempt("small decoder"):
        small = load_vae(demo_files().codec, dtype=torch.float32, device=recorder.device)
        _decode(recorder, "cosine transform of the demo", eager_decoder(small), config, torch.float32)
    name = "Wan's VAE with few channels" if recorder.dry_run else "Wan's VAE, random weights, bfloat16"
    dtype = torch.float32 if recorder.dry_run else torch.bfloat16
    try:
        vae = random_vae(SMALL_VAE if recorder.dry_run else VaeConfig(), seed=0, dtype=dtype).to(recorder.device)
    except ExecutorError as error:
        recorder.note(f"{name}: skipped, {error}")
        return
    with recorder.attempt(name):
        later_ms = _decode(recorder, name, eager_decoder(vae), config, dtype)
        recorder.headline("decoder", f"A chunk through {name}: {later_ms:.4g} ms.")
        if planner is not None:
            for row, first in zip(recorder.record.tables[TABLE][-2:], (True, False), strict=True):
                row.update(columns(planner.decode(config, first_chunk=first)))
            recorder.save()


def _decode(recorder: Recorder, name: str, vae: Decoder, config: Config, dtype: torch.dtype) -> float:
    """Milliseconds of a later chunk; on a GPU the first video warms up, and the second one is timed."""
    video, device = config.video, recorder.device
    generator = torch.Generator().manual_seed(0)
    num_chunks = 2 if recorder.dry_run else 4
    shape = num_chunks, video.chunk_frames, config.model.latent_channels, video.latent_height, video.latent_width
    chunks = torch.randn(shape, generator=generator).to(device, dtype)
    times: list[float] = []
    frames: list[int] = []
    for _ in range(1 if recorder.dry_run else 2):
        state, times, frames = vae.open(), [], []
        for latents in chunks:
            decode = functools.partial(_decode_chunk, state, latents, frames)
            times.append(1e3 * seconds_of(decode, device))
    later = statistics.median(times[1:])
    recorder.row(TABLE, decoder=name, chunk="first", frames=frames[0], ms=times[0])
    recorder.row(TABLE, decoder=name, chunk="later", frames=frames[1], ms=later)
    return later


def _decode_chunk(state: DecodeState, latents: torch.Tensor, frames: list[int]) -> None:
    frames.append(len(state.decode(latents)))
