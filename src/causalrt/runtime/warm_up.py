"""Generate short videos before the first session, so that no session waits for compilation or the capture of CUDA graphs."""

import torch

from causalrt.config import Config
from causalrt.engines.base import Executor
from causalrt.layout import Layout
from causalrt.runtime.collectives import CountingCollectives
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.rollout import ChunkTimes, Rollout
from causalrt.runtime.session_buffers import SessionBufferPool


def warm_up(
    executor: Executor, collectives: CountingCollectives, config: Config, layout: Layout, pool: SessionBufferPool
) -> None:
    """Generate a chunk of each kind, and run a step over each number of KV rows that occurs.

    On a GPU this happens in the buffers that the first session will take; nothing of it remains visible.
    Collective: every rank calls it once it has made its executor.
    """
    model, video, buffers = config.model, config.video, pool.take()
    text, clean = (
        torch.zeros(model.text_len, model.text_dim),
        torch.zeros(config.tokens_per_chunk, model.patch_features),
    )
    # After a first chunk of another length, history is that chunk and whole ones, or whole ones alone once a flush dropped it.
    for flush in (False, True) if len(video.step_frames) > 1 else (False,):
        rollout = Rollout(executor, collectives, config, layout, text=text, noise=SeededNoise(0), buffers=buffers)
        attended = _play(rollout, 0)
        if flush:
            rollout.switch_prompt(text, "flush")
            attended = _play(rollout, 1)
        for _ in range(2 if flush else 1, video.horizon_chunks):
            if rollout.kv_frames == attended:
                break  # the window is full
            attended = rollout.kv_frames
            rollout.take_initial(clean, record=False)
    collectives.take_traffic()
    pool.give_back(buffers)
    executor.warmed_up()


def _play(rollout: Rollout, index: int) -> int:
    """Generate a chunk, drop its latents, and return how many frames it attended over."""
    times, _ = rollout.chunk(index, context_pass=True, record=False, deliver=_drop)
    return times.kv_frames


def _drop(latents: torch.Tensor, times: ChunkTimes) -> None:
    """Drop the latents."""
