"""Chunk 0 of the eager executor against `diffusers.WanTransformer3DModel` on the same weights (model_spec section 9).

The weights are saved by diffusers and read by our checkpoint loader, so the conversion of names and layouts is compared
too. A chunk without history is what diffusers computes for a video of that length.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.tolerances import MODULE, RECORDED

from causalrt import Config, build, override, recipe
from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.model.tokens import latents_from_tokens, tokens_from_latents
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.session_buffers import SessionBuffers

diffusers = pytest.importorskip("diffusers")

TIMESTEPS = (1000.0, 937.5, 833.33331298828125, 625.0, 0.0)


class Float64Sinusoid(torch.nn.Module):
    """The timestep embedding of the reference in place of diffusers' float32 one."""

    def __init__(self, freq_dim: int) -> None:
        super().__init__()
        self.half = freq_dim // 2

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """`[B]` -> `[B, freq_dim]`, cos half first."""
        i = torch.arange(self.half, dtype=torch.float64)
        angles = timestep.double()[:, None] * 10000.0 ** (-i / self.half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


@dataclass(kw_only=True)
class Pair:
    """diffusers' model, and a bundle built from what it saved."""

    config: Config
    theirs: torch.nn.Module
    bundle: Bundle


def _enliven(model: torch.nn.Module) -> None:
    """Random values for every parameter, biases, norms and modulations included, so that each of them matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean, std = 0.0, 1 / math.sqrt(max(1, parameter[0].numel()))
            if name.endswith(("norm_q.weight", "norm_k.weight")):
                mean, std = 1.35, 0.35
            elif name.endswith("norm2.weight"):
                mean, std = 1.0, 0.3
            elif name.endswith((".bias", "scale_shift_table")):
                std = 0.2
            parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))


CASES = {
    "tiny": {},
    # head_dim 20 splits 8/6/6: no two axes could be swapped unseen; an odd number of rows, one frame a chunk
    "one-frame": {
        "model.dim": "80",
        "model.num_heads": "4",
        "video.chunk_frames": "1",
        "video.latent_height": "6",
        "video.latent_width": "10",
    },
}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = override(recipe("tiny"), CASES[request.param])
    model = config.model
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, model.patch_height, model.patch_width),
        num_attention_heads=model.num_heads,
        attention_head_dim=model.head_dim,
        in_channels=model.latent_channels,
        out_channels=model.latent_channels,
        text_dim=model.text_dim,
        freq_dim=model.freq_dim,
        ffn_dim=model.ffn_dim,
        num_layers=model.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=model.eps,
        rope_max_seq_len=1024,
    ).eval()
    _enliven(theirs)
    folder = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(folder / "checkpoint")
    bundle = build(config, checkpoint=folder / "checkpoint", out=folder / "bundle", executors=["eager"])
    return Pair(config=config, theirs=theirs, bundle=open_bundle(Path(bundle)))


@pytest.fixture(params=("as shipped", "float64 sinusoid"))
def tolerance(request: pytest.FixtureRequest, pair: Pair) -> Iterator[float]:
    """The tolerance that goes with the sinusoid which diffusers' model has during the test."""
    if request.param == "as shipped":
        # diffusers computes t * frequency in float32, which alone costs up to 2.4e-5.
        yield RECORDED
        return
    embedder = pair.theirs.condition_embedder
    shipped = embedder.timesteps_proj
    embedder.timesteps_proj = Float64Sinusoid(pair.config.model.freq_dim)
    # Both in float32 with a float64 sinusoid; the specification's replay is within 2.2e-6.
    yield MODULE
    embedder.timesteps_proj = shipped


@pytest.mark.parametrize("timestep", TIMESTEPS)
def test_chunk_0_agrees_with_diffusers(pair: Pair, tolerance: float, timestep: float) -> None:
    config = pair.config
    video, model = config.video, config.model
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(
        video.chunk_frames, model.latent_channels, video.latent_height, video.latent_width, generator=generator
    )
    text = torch.zeros(model.text_len, model.text_dim)
    text[:5] = torch.randn(5, model.text_dim, generator=generator)

    with torch.inference_mode():
        (expected,) = pair.theirs(
            hidden_states=latents.transpose(0, 1)[None],
            timestep=torch.tensor([timestep]),
            encoder_hidden_states=text[None],
            return_dict=False,
        )
    expected = expected[0].transpose(0, 1)

    executor = EagerExecutor(pair.bundle, LocalCollectives(), device=torch.device("cpu"))
    buffers = SessionBuffers(0, KVSlots(config, pair.bundle.layout, torch.float32))
    buffers.begin(executor.encode_prompt(text))
    executor.bind(buffers.view(0))
    rows = executor.step(tokens_from_latents(latents, config), executor.embed_time(timestep), first_frame=0)
    flow = latents_from_tokens(rows, config)

    assert expected.std() > 0.3, "a flow this small would hide mistakes"
    difference = (flow - expected).abs()
    worst = torch.unravel_index(difference.argmax(), difference.shape)
    assert difference.max() < tolerance, (
        f"at [frame, channel, y, x] {[int(i) for i in worst]}: {flow[worst]} instead of {expected[worst]}"
    )


def test_float32_sinusoid_is_the_whole_difference(pair: Pair) -> None:
    """The reason for two tolerances: the sinusoids differ by what the outputs differ by."""
    shipped = pair.theirs.condition_embedder.timesteps_proj(torch.tensor(TIMESTEPS))
    exact = Float64Sinusoid(pair.config.model.freq_dim)(torch.tensor(TIMESTEPS))
    assert 1e-6 < (shipped - exact).abs().max() < 1e-4
