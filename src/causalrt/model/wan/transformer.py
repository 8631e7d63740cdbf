"""The causal Wan transformer: parameters under the reference's names, and the components of the three graphs.

Shape letters: S local tokens, C channels (heads x D), T text rows, H heads, D channels of a head. Rows are `[S, C]`.
Two weights are stored in another shape (export/checkpoint.py): `patch_embedding` as a matrix over the token's 64 features, and
`head.head` with its rows in the order of the token's features, so that a chunk stays in token order from noise to latents.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from causalrt.config import ModelConfig


def sinusoid(timestep: float, freq_dim: int) -> torch.Tensor:
    """Return `[freq_dim]` float64: cos half, then sin half, of t * 10000^(-i / half) (model_spec section 2)."""
    half = freq_dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([torch.cos(timestep * frequencies), torch.sin(timestep * frequencies)])


class RMSNorm(nn.Module):
    """RMS norm with a weight over the full width, before the head split."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_SC: torch.Tensor) -> torch.Tensor:
        """Normalise `[S, C]`."""
        return F.rms_norm(x_SC, self.weight.shape, self.weight, self.eps)


class AttentionWeights(nn.Module):
    """Projections of one attention; the caller computes the attention itself."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)


class Block(nn.Module):
    """Parameters of one transformer block, and its row-wise pieces."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.self_attn = AttentionWeights(dim, config.eps)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.cross_attn = AttentionWeights(dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.eps = config.eps

    def modulate(self, x_SC: torch.Tensor, shift_1C: torch.Tensor, scale_1C: torch.Tensor) -> torch.Tensor:
        """See `modulate`."""
        return modulate(x_SC, shift_1C, scale_1C, self.eps)


def modulate(x_SC: torch.Tensor, shift_1C: torch.Tensor, scale_1C: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply LayerNorm without affine parameters, then scale and shift by the timestep's vectors."""
    return F.layer_norm(x_SC, x_SC.shape[-1:], eps=eps) * (1 + scale_1C) + shift_1C


class Head(nn.Module):
    """Output projection. Its modulation is added to the time embedding itself, not to the embedding's projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))
        self.head = nn.Linear(config.dim, config.patch_features)
        self.eps = config.eps

    def forward(self, x_SC: torch.Tensor, e_C: torch.Tensor) -> torch.Tensor:
        """Map rows `[S, C]` and the time embedding `[C]` to `[S, 64]`."""
        shift_1C, scale_1C = (self.modulation + e_C).unbind(1)
        out: torch.Tensor = self.head(modulate(x_SC, shift_1C, scale_1C, self.eps))
        return out


class Wan(nn.Module):
    """All parameters of the model, named as in the reference's state dict."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.patch_embedding = nn.Linear(config.patch_features, dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def layers(self) -> Iterator[Block]:
        """The blocks, in order."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block


def num_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of the model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Wan(config).parameters())


def wan_from_weights(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Wan:
    """Make the model over `weights` (as written by `write_weights`), which are shared and not copied, ready for inference."""
    with torch.device("meta"):
        model = Wan(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


class PromptGraph(nn.Module):
    """Maps text rows to the cross-attention keys and values of every layer; run once per prompt."""

    def __init__(self, wan: Wan) -> None:
        super().__init__()
        self.wan = wan

    def forward(self, text_TE: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Map `[text_len, text_dim]`, zero rows included, to (k, v) of each layer, `[1, text_len, C]` each."""
        context_TC = self.wan.text_embedding(text_TE)
        attentions = [block.cross_attn for block in self.wan.layers()]
        return [(a.norm_k(a.k(context_TC))[None], a.v(context_TC)[None]) for a in attentions]


class TimeGraph(nn.Module):
    """Maps the sinusoid of a timestep to e and e0; run once for each step of the schedule."""

    def __init__(self, wan: Wan) -> None:
        super().__init__()
        self.wan = wan

    def forward(self, sinusoid_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `[freq_dim]` to e `[C]` and e0 `[6, C]` (shift1, scale1, gate1, shift2, scale2, gate2)."""
        e_C = self.wan.time_embedding(sinusoid_Q[None])
        return e_C[0], self.wan.time_projection(e_C).unflatten(-1, (6, -1))[0]
