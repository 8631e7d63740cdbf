"""The kernel in Triton's interpreter; `test_qk_norm_rope.py` starts this file in a process of its own."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from causalrt.plugins.kernel_launch import is_interpreted
from causalrt.plugins.qk_norm_rope import qk_norm_rope, write_rows
from causalrt.plugins.triton_qk_norm_rope import qk_norm_rope_kernel
from support.qk_norm_rope_cases import CASES, Case, check, operands
from support.tolerances import QK_NORM_ROPE, QK_NORM_ROPE_INTERPRETED

DTYPES = list(QK_NORM_ROPE)
GUARD_ROWS = 2


def run_kernel(case, dtype, out_dtype, seed=0):
    """(operands, output); memory around the output is found as it was."""
    given = operands(case, dtype, seed)
    rows = given.out_rows
    around = torch.full((rows + 2 * GUARD_ROWS, case.head_dim), math.nan, dtype=out_dtype)
    out = around[GUARD_ROWS:-GUARD_ROWS]
    write_rows(out, *given[:7], given.destinations, given.eps)
    assert around[:GUARD_ROWS].isnan().all()
    assert around[-GUARD_ROWS:].isnan().all()
    return given, out


def test_this_process_interprets():
    assert is_interpreted(qk_norm_rope_kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])  # to shrink takes minutes here
@given(
    case=st.builds(
        Case,
        plan=st.sampled_from(["balanced", "padded", "grouped"]),
        num_heads=st.integers(1, 13),
        world_size=st.integers(1, 16),
        num_tokens=st.integers(1, 48),
        head_dim=st.sampled_from([2, 16, 24, 32, 64, 128]),
        scale=st.sampled_from([1e-3, 1.0, 300.0]),
        eps=st.sampled_from([1e-6, 1e-2]),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_kernel_against_float64(dtype, case, seed):
    operands, out = run_kernel(case, dtype, dtype, seed)
    check(out, operands, QK_NORM_ROPE_INTERPRETED[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_last_rounding_is_low(case, dtype):
    # Low rows in, float32 out: all but the rounding of the output.
    operands, out = run_kernel(case, dtype, torch.float32)
    check(out, operands, QK_NORM_ROPE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_op_on_a_cpu_is_the_reference_even_here(dtype):
    given = operands(CASES[0], dtype)
    check(qk_norm_rope(*given.arguments), given, QK_NORM_ROPE[dtype])
