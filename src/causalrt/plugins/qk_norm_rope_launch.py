"""The launch of `causalrt::qk_norm_rope`'s kernel, planned from shapes and types alone: one program a token row."""

import torch

from causalrt.plugins.kernel_launch import KernelLaunch, pointer_to
from causalrt.plugins.triton_qk_norm_rope import qk_norm_rope_kernel

VALUES_PER_THREAD = 16
"""Of q, of k and of v: two loads of 16 bytes each in the low types, and registers enough to have several programs at once."""

MAX_WARPS = 16


def power_of_two_from(number: int) -> int:
    """The smallest power of two that is no smaller than `number`."""
    return 1 << (number - 1).bit_length()


def plan(
    *,
    num_rows: int,
    num_heads: int,
    head_dim: int,
    num_places: int,
    dtype: torch.dtype,
    eps: float,
    row_strides: tuple[int, int, int],
) -> KernelLaunch:
    """The launch for one rank's rows.

    Args:
        num_rows: S.
        num_heads: H.
        head_dim: D, even.
        num_places: M, the last dimension of `destinations`.
        dtype: of q, k, v, the norms and the output.
        eps: added to the mean square.
        row_strides: of q, k and v, in elements; H * D where they are contiguous.
    """
    padded_heads, padded_dim = power_of_two_from(num_heads), power_of_two_from(head_dim)
    names = ("q", "k", "v", "norm_q", "norm_k", "cos", "sin", "destinations", "out")
    types = {"cos": torch.float32, "sin": torch.float32, "destinations": torch.int32}
    return KernelLaunch(
        kernel=qk_norm_rope_kernel,
        signature={name: pointer_to(types.get(name, dtype)) for name in names},
        constexprs={
            "ROWS": num_rows,
            "HEADS": num_heads,
            "DIM": head_dim,
            "PLACES": num_places,
            "EPS": eps,
            "Q_STRIDE": row_strides[0],
            "K_STRIDE": row_strides[1],
            "V_STRIDE": row_strides[2],
            "PADDED_HEADS": padded_heads,
            "PADDED_DIM": padded_dim,
        },
        grid=(num_rows, 1, 1),
        num_warps=min(MAX_WARPS, max(1, padded_heads * padded_dim // (32 * VALUES_PER_THREAD))),
        num_stages=1,
    )
