"""Complete configurations by name."""

from collections.abc import Callable, Mapping

from causalrt.config import BuildConfig, Config, ModelConfig, VideoConfig
from causalrt.errors import ConfigError


def wan_1_3b_480p() -> Config:
    """Self-Forcing on Wan2.1-T2V-1.3B: 832x480 pixels, 3 latent frames a chunk, 21 latent frames (81 RGB frames)."""
    return Config(
        model=ModelConfig(dim=1536, num_heads=12, num_layers=30, ffn_dim=8960),
        video=VideoConfig(latent_height=60, latent_width=104),
    )


def wan_14b_480p() -> Config:
    """The 14B sizes of Wan2.1-T2V under the same schedule and geometry."""
    return Config(
        model=ModelConfig(dim=5120, num_heads=40, num_layers=40, ffn_dim=13824),
        video=VideoConfig(latent_height=60, latent_width=104),
    )


def tiny() -> Config:
    """The smallest model that exercises everything, for tests: 3 heads, so that 2 ranks already cut one."""
    return Config(
        model=ModelConfig(dim=48, num_heads=3, num_layers=2, ffn_dim=96, freq_dim=32, text_dim=24, text_len=8),
        video=VideoConfig(latent_height=4, latent_width=6, window_frames=7, sink_frames=1, horizon_frames=12),
    )


def demo() -> Config:
    """What `causalrt demo` runs, a small trained model: 6 heads, 16 tokens a frame, a rolling window with a sink."""
    return Config(
        model=ModelConfig(dim=144, num_heads=6, num_layers=4, ffn_dim=384, freq_dim=64, text_dim=32, text_len=12),
        video=VideoConfig(latent_height=8, latent_width=8, window_frames=12, sink_frames=3, horizon_frames=126),
        build=BuildConfig(world_size=2),
    )


def small() -> Config:
    """A small model of which nothing is trained, for trials: 5 heads on 2 ranks, a rolling window with a sink, 7 chunks."""
    return Config(
        model=ModelConfig(dim=320, num_heads=5, num_layers=4, ffn_dim=1280, text_dim=128, text_len=64),
        video=VideoConfig(latent_height=24, latent_width=40, window_frames=12, sink_frames=3),
        build=BuildConfig(world_size=2),
    )


def bench_cpu() -> Config:
    """The size at which executors are compared on a CPU: 17 M parameters, 720 tokens a frame, 5 chunks."""
    return Config(
        model=ModelConfig(dim=384, num_heads=6, num_layers=6, ffn_dim=1536),
        video=VideoConfig(latent_height=40, latent_width=72, horizon_frames=15),
    )


RECIPES: Mapping[str, Callable[[], Config]] = {
    recipe.__name__: recipe for recipe in (wan_1_3b_480p, wan_14b_480p, tiny, demo, small, bench_cpu)
}


def recipe(name: str) -> Config:
    """The complete config of a recipe by name.

    Raises:
        ConfigError: no such recipe; the known ones are listed.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; the recipes are: {', '.join(RECIPES)}")
    return RECIPES[name]()
