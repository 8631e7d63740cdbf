"""Validation of requests to the engine."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from causalrt.config import Config
from causalrt.errors import PromptError, RequestError
from causalrt.model.tokens import tokens_from_latents

Embeddings = torch.Tensor | npt.NDArray[np.floating[Any]]


def checked_chunks(config: Config, num_chunks: int | None, *, num_given: int = 0) -> int:
    """Chunks to generate after `num_given` chunks of initial latents: those asked for, or as many as the horizon holds.

    Raises:
        RequestError: not a whole number, or more than the horizon holds where `video.time_index` is global.
    """
    video = config.video
    within_horizon = video.horizon_chunks - num_given
    endless = video.time_index == "relative"
    if num_chunks is None and (within_horizon >= 1 or endless):
        return max(1, within_horizon)
    if isinstance(num_chunks, int) and num_chunks >= 1 and (endless or num_chunks <= within_horizon):
        return num_chunks
    if endless:
        raise RequestError(f"num_chunks must be a whole number of at least 1, got {num_chunks}")
    after = f" after {num_given} of initial latents" if num_given else ""
    raise RequestError(
        f"{1 if num_chunks is None else num_chunks} chunks of {video.chunk_frames} latent frames asked for{after}, but the "
        f"bundle's horizon is {video.horizon_frames} latent frames ({max(0, within_horizon)} chunks); build with "
        "`--set video.horizon_frames=...` for more, or with `--set video.time_index=relative` for a rollout without an end"
    )


def checked_text(config: Config, prompt_embeds: Embeddings) -> torch.Tensor:
    """Pad embeddings with zero rows to `[text_len, text_dim]` float32, as the ranks take them.

    Raises:
        PromptError: wrong shape or type, or values that are not finite.
    """
    model = config.model
    if isinstance(prompt_embeds, np.ndarray) and np.issubdtype(prompt_embeds.dtype, np.floating):
        prompt_embeds = torch.from_numpy(np.ascontiguousarray(prompt_embeds, dtype=np.float32))
    if not isinstance(prompt_embeds, torch.Tensor) or not prompt_embeds.is_floating_point():
        raise PromptError(
            f"prompt embeddings must be a floating-point tensor, got {getattr(prompt_embeds, 'dtype', type(prompt_embeds))}"
        )
    if prompt_embeds.dim() != 2 or prompt_embeds.shape[1] != model.text_dim:
        raise PromptError(
            f"prompt embeddings must be [rows, {model.text_dim}], got {list(prompt_embeds.shape)}; "
            "a batch element is a session of its own"
        )
    rows = prompt_embeds.shape[0]
    if not 1 <= rows <= model.text_len:
        raise PromptError(f"prompt embeddings must have 1 to {model.text_len} rows, got {rows}; shorten the prompt")
    text = torch.zeros(model.text_len, model.text_dim)
    text[:rows] = prompt_embeds.detach()
    bad = int((~torch.isfinite(text)).sum())
    if bad:
        raise PromptError(f"prompt embeddings hold {bad} values that are not finite; check the text encoder")
    return text


def checked_initial_latents(config: Config, latents: torch.Tensor | None) -> list[torch.Tensor]:
    """Split initial latents into the rows `[N, 64]` of each chunk; None has no chunks.

    Raises:
        RequestError: wrong shape or type, not a whole number of chunks, or values that are not finite.
    """
    if latents is None:
        return []
    video = config.video
    frame = (config.model.latent_channels, video.latent_height, video.latent_width)
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point() or tuple(latents.shape[1:]) != frame:
        found = (
            f"{list(latents.shape)} {latents.dtype}" if isinstance(latents, torch.Tensor) else type(latents).__name__
        )
        raise RequestError(
            f"initial latents must be a floating-point tensor [frames, {', '.join(map(str, frame))}], got {found}"
        )
    chunks = video.chunks_in(len(latents))
    if not chunks or video.first_frame_of(chunks) != len(latents):
        first = (
            "" if video.frames_at(0) == video.chunk_frames else f"a first chunk of {video.frames_at(0)} frame(s), then "
        )
        raise RequestError(
            f"{len(latents)} initial latent frames; the bundle takes {first}whole chunks of {video.chunk_frames}: drop some"
        )
    rows = tokens_from_latents(latents.detach().to("cpu", torch.float32), config)
    if not torch.isfinite(rows).all():
        raise RequestError("initial latents hold values that are not finite; check the encoder that they come from")
    return list(torch.split(rows, [frames * config.tokens_per_frame for frames in video.frames_of_chunks(chunks)]))
