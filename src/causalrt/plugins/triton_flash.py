"""Attention without a score matrix, key block by key block, as device code.

Scores, statistics and sums are float32; probabilities are rounded to the type of v. Where the keys are split into ranges, each
range leaves its output, divided by its own sum, and the base-2 logarithm of that sum; `combine_splits_kernel` weighs them.

Shape suffixes: M query rows, N key rows, R any rows, D channels of a head (padded to a power of two), P pairs of a head.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def load_rows(pointer, offset, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """`[rows, BLOCK_D]` at `offset` each, zero outside; rows are checked where MASKED, channels where there is padding."""
    channel = tl.arange(0, BLOCK_D)
    place = pointer + offset[:, None] + channel[None, :]
    if MASKED:
        x = tl.load(place, mask=is_row[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(place, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(place)
    return x


@triton.jit
def rotate_rows(x_RD, cos, sin, table_row, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Even and odd channels `[rows, BLOCK_D / 2]`, rotated by the tables' rows; the type of `x_RD`."""
    even_RP, odd_RP = tl.split(tl.reshape(x_RD, (x_RD.shape[0], BLOCK_D // 2, 2)))
    cos_RP = load_rows(cos, table_row * (HEAD_DIM // 2), is_row, HEAD_DIM // 2, BLOCK_D // 2, MASKED)
    sin_RP = load_rows(sin, table_row * (HEAD_DIM // 2), is_row, HEAD_DIM // 2, BLOCK_D // 2, MASKED)
    even_RP = even_RP.to(tl.float32)
    odd_RP = odd_RP.to(tl.float32)
    turned_even = even_RP * cos_RP - odd_RP * sin_RP
    turned_odd = even_RP * sin_RP + odd_RP * cos_RP
    return turned_even.to(x_RD.dtype), turned_odd.to(x_RD.dtype)


@triton.jit
def attend_blocks(
    acc_MD,
    max_M,
    sum_M,
    q_MD,
    q_odd_MP,
    k,
    v,
    cos,
    sin,
    first,
    last,
    num_rows,
    ROWS_PER_PIECE: tl.constexpr,
    PIECE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    ROTATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Go on with the online softmax over key blocks [first, last).

    Key row n lies ROW_STRIDE after row n - 1, in pieces of ROWS_PER_PIECE rows that lie PIECE_STRIDE apart; 0: in one piece.
    Rows from `num_rows` on are left out where MASKED. SCALE takes scores to powers of two.
    """
    for block in tl.range(first, last, num_stages=STAGES):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N)
        is_row = row < num_rows
        if ROWS_PER_PIECE > 0:
            offset = row // ROWS_PER_PIECE * PIECE_STRIDE + row % ROWS_PER_PIECE * ROW_STRIDE
        else:
            offset = row * ROW_STRIDE
        k_ND = load_rows(k, offset, is_row, HEAD_DIM, BLOCK_D, MASKED)
        if ROTATE:
            even_NP, odd_NP = rotate_rows(k_ND, cos, sin, row, is_row, HEAD_DIM, BLOCK_D, MASKED)
            scores_MN = tl.dot(q_MD, tl.trans(even_NP), input_precision="ieee")
            scores_MN = tl.dot(q_odd_MP, tl.trans(odd_NP), scores_MN, input_precision="ieee")
        else:
            scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if MASKED:
            scores_MN = tl.where(is_row[None, :], scores_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1) * SCALE)
        weights_MN = tl.exp2(scores_MN * SCALE - new_max_M[:, None])
        keep_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * keep_M + tl.sum(weights_MN, 1)
        v_ND = load_rows(v, offset, is_row, HEAD_DIM, BLOCK_D, MASKED)
        acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD * keep_M[:, None], input_precision="ieee")
        max_M = new_max_M
    return acc_MD, max_M, sum_M


@triton.jit
def combine_splits_kernel(
    parts,
    log_sums,
    out,
    NUM_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`[KV_SPLITS, NUM_ROWS, D]` float32, weighed by the ranges' sums, into `out`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < NUM_ROWS
    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    for kv_split in tl.static_range(KV_SPLITS):
        largest = tl.maximum(largest, tl.load(log_sums + kv_split * NUM_ROWS + row, mask=is_row, other=0.0))
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    sum_RD = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for kv_split in tl.static_range(KV_SPLITS):
        part_row = kv_split * NUM_ROWS + row
        weight = tl.exp2(tl.load(log_sums + part_row, mask=is_row, other=0.0) - largest)
        total += weight
        sum_RD += weight[:, None] * load_rows(parts, part_row * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D, True)
    channel = tl.arange(0, BLOCK_D)[None, :]
    x_RD = (sum_RD * (1.0 / total)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * HEAD_DIM + channel, x_RD, mask=is_row[:, None] & (channel < HEAD_DIM))
