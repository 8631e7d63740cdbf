"""How far apart results may be that are equal in exact arithmetic.

Absolute errors of values of about one, in float32 unless a name says otherwise. A tolerance is loosened only with a written
reason.
"""

import torch

ROUNDED = 1e-6
"""The same sums in another order: a few roundings."""
ONE_OP = 2e-6
"""An op of ours, in another form or against float64."""
FUSED_OP = 3e-6
"""An op of ours with several steps, in another form."""
REPLAYED = 5e-6
"""A whole rollout of a small model, of which nothing but the order of some sums differs."""
MODULE = 1e-5
"""A module of a few layers, or a decoder, in another form."""
WHOLE_MODEL = 2e-5
"""A rollout by another executor or on another number of ranks."""
RECORDED = 5e-5
"""A rollout against the reference's recording: `TOLERANCE` of `causalrt.proof.differences`."""
DETECTED = 4 * RECORDED
"""What a mistake must move the latents by. The smallest that is tried, exact GELU, moves them by 4e-4."""
CHANGED = 1e-3
"""What another prompt or another history must move the latents by."""

ROPE_ATTENTION = {"float32": 6e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""The attention kernel against float64."""
QK_NORM_ROPE = {torch.float32: 8e-7, torch.float16: 2**-11 + ROUNDED, torch.bfloat16: 2**-8 + ROUNDED}
"""The kernel of norms and rotations against float64: half a step of the format."""
QK_NORM_ROPE_INTERPRETED = QK_NORM_ROPE | {torch.bfloat16: 2**-7 + ROUNDED}
"""Triton 3.7's interpreter drops the low bits where a GPU rounds to nearest: a whole step of bfloat16."""
