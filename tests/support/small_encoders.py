"""A small random text encoder and VAE, in released layouts, that fit the `tiny` recipe."""

from pathlib import Path

from causalrt.export import random_encoders
from causalrt.export.random_encoders import SMALL_VAE as VAE_CONFIG
from causalrt.export.random_encoders import random_vae
from support.small_bundles import tiny_config


def write_text_encoder(folder: Path) -> Path:
    """In the layout of a diffusers folder."""
    words = ("a", "fox", "cat", "runs", "sleeps")
    return random_encoders.write_text_encoder(folder, text_dim=tiny_config().model.text_dim, words=words)


def write_vae(folder: Path) -> Path:
    """In the layout of a diffusers folder."""
    random_vae(VAE_CONFIG, seed=0).save_pretrained(folder / "vae")
    return folder
