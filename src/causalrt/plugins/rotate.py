"""`causalrt::rotate`: Causal-RoPE rotation of adjacent channel pairs, in float32 whatever the precision around it."""

from typing import Any

import torch


def rotate_pairs(x_BSC: torch.Tensor, cos_BSP: torch.Tensor, sin_BSP: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rotate channels (2j, 2j+1) of every head by the angle of pair j (model_spec section 4).

    Args:
        x_BSC: `[1, S, H * D]`.
        cos_BSP: `[1, S, D / 2]`, float32, shared by all heads.
        sin_BSP: `[1, S, D / 2]`, float32.
        num_heads: H.

    Returns:
        `[1, S, H * D]` in the dtype of `x_BSC`.
    """
    pairs = torch.view_as_complex(x_BSC.float().view(*x_BSC.shape[:-1], num_heads, -1, 2))
    rotated = pairs * torch.complex(cos_BSP, sin_BSP).unsqueeze(2)
    return torch.view_as_real(rotated).flatten(-3).to(x_BSC.dtype)


def rotate_pairs_real(
    x_BSC: torch.Tensor, cos_BSP: torch.Tensor, sin_BSP: torch.Tensor, num_heads: int
) -> torch.Tensor:
    """`rotate_pairs` without complex numbers, for compilers that do not fuse them."""
    even, odd = x_BSC.float().view(*x_BSC.shape[:-1], num_heads, -1, 2).unbind(-1)
    cos, sin = cos_BSP.unsqueeze(2), sin_BSP.unsqueeze(2)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-3).to(x_BSC.dtype)


@torch.library.custom_op("causalrt::rotate", mutates_args=())
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`rotate_pairs` as an op that a trace keeps whole."""
    return rotate_pairs(x, cos, sin, num_heads)


@rotate.register_fake
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> torch.Tensor:
    return torch.empty_like(x)


def onnx_rotate(op: Any, x: Any, cos: Any, sin: Any, num_heads: int) -> Any:
    """ONNX form: the standard RotaryEmbedding, in float32 between casts."""
    if x.dtype == cos.dtype:
        return op.RotaryEmbedding(x, cos, sin, interleaved=1, num_heads=num_heads)
    rotated = op.RotaryEmbedding(op.Cast(x, to=cos.dtype), cos, sin, interleaved=1, num_heads=num_heads)
    return op.Cast(rotated, to=x.dtype)
