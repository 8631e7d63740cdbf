"""Chunks through a decoder: the demo's cosine transform, and Wan's VAE with random weights."""

import statistics
import time

import torch

from causalrt.config import Config
from causalrt.demo_model import demo_files
from causalrt.engines.vae import Vae
from causalrt.errors import ExecutorError
from causalrt.export.random_encoders import SMALL_VAE, random_vae
from causalrt.measure.gpu_day.book import Book
from causalrt.measure.gpu_day.predictions import columns, planner_for
from causalrt.model.codecs.block_dct import BlockDct, BlockDecoder
from causalrt.model.codecs.vae_checkpoint import VaeConfig, load_vae
from causalrt.model.codecs.wan_vae import StreamingDecoder
from causalrt.recipes import recipe

TABLE = "milliseconds of a chunk"


def run(book: Book) -> None:
    """Decode a few chunks by each decoder at the size of the 1.3B model's videos, in a dry run at the smallest."""
    planner = None if book.dry_run else planner_for(book)
    config = recipe("tiny" if book.dry_run else "wan_1_3b_480p")
    with book.attempt("small decoder"):
        small = load_vae(demo_files().codec, dtype=torch.float32, device=book.device)
        assert isinstance(small, BlockDct)
        _decode(book, "cosine transform of the demo", BlockDecoder(small), config, torch.float32)
    name = "Wan's VAE with few channels" if book.dry_run else "Wan's VAE, random weights, bfloat16"
    dtype = torch.float32 if book.dry_run else torch.bfloat16
    try:
        vae = random_vae(SMALL_VAE if book.dry_run else VaeConfig(), seed=0, dtype=dtype).to(book.device)
    except ExecutorError as error:
        book.note(f"{name}: skipped, {error}")
        return
    with book.attempt(name):
        later_ms = _decode(book, name, StreamingDecoder(vae), config, dtype)
        book.headline("decoder", f"A chunk through {name}: {later_ms:.4g} ms.")
        if planner is not None:
            for row, first in zip(book.record.tables[TABLE][-2:], (True, False), strict=True):
                row.update(columns(planner.decode(config, first_chunk=first)))
            book.save()


def _decode(book: Book, name: str, vae: Vae, config: Config, dtype: torch.dtype) -> float:
    """Milliseconds of a later chunk; on a GPU a first video warms up, and a second one is timed."""
    video, device = config.video, book.device
    generator = torch.Generator().manual_seed(0)
    num_chunks = 2 if book.dry_run else 4
    shape = num_chunks, video.chunk_frames, config.model.latent_channels, video.latent_height, video.latent_width
    chunks = torch.randn(shape, generator=generator).to(device, dtype)
    times: list[float] = []
    frames: list[int] = []
    for _ in range(1 if book.dry_run else 2):
        state, times, frames = vae.open(), [], []
        for latents in chunks:
            start = time.perf_counter()
            frames.append(len(state.decode(latents)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
    later = statistics.median(times[1:])
    book.row(TABLE, decoder=name, chunk="first", frames=frames[0], ms=times[0])
    book.row(TABLE, decoder=name, chunk="later", frames=frames[1], ms=later)
    return later
