"""Converts between latents and rows of tokens: the model's patchify and unpatchify."""

import torch

from causalrt.config import Config


def latents_from_tokens(rows: torch.Tensor, config: Config) -> torch.Tensor:
    """Unpatchify token rows `[N, 64]` to `[F, 16, H, W]`; features are ordered (channel, dy, dx)."""
    m = config.model
    grid = rows.view(-1, config.grid_height, config.grid_width, m.latent_channels, m.patch_height, m.patch_width)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(
        -1, m.latent_channels, config.video.latent_height, config.video.latent_width
    )


def tokens_from_latents(latents: torch.Tensor, config: Config) -> torch.Tensor:
    """Patchify `[F, 16, H, W]` to token rows `[N, 64]`; the inverse of `latents_from_tokens`."""
    m = config.model
    grid = latents.reshape(-1, m.latent_channels, config.grid_height, m.patch_height, config.grid_width, m.patch_width)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, m.patch_features)
