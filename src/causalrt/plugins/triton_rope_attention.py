"""The Triton kernel of `causalrt::rope_attention`.

One launch takes all of a rank's shards; a program finds out from its number what it is::

    | shard 0: head, query tile ... | shard 1 ... | the same tiles, next key range ... | copy of the chunk to staging |
    0                               TILES_0       TILES                                TILES * KV_SPLITS

A tile is BLOCK_M query rows of one head. Its keys are blocks of BLOCK_N rows: first those of the new chunk, out of the received
blocks, then history, out of the slots. Staging is written by other programs of the same launch, in no order that could be
relied on, so nobody reads it::

    key blocks   | new chunk: full ... tail | history: full ... tail |      tails alone are masked
    key range r             [first, last)                                   KV_SPLITS ranges of about the same length

All shapes are compile-time numbers; the count of filled rows is read on the device, so one launch serves every chunk.
`rope_attention` says what is computed, `rope_attention_launch` plans the launch.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

from causalrt.plugins.triton_flash import attend_blocks, load_rows, rotate_rows


@triton.jit
def attend_tile(
    received,
    k_slots,
    v_slots,
    kv_rows,
    rank,
    cos,
    sin,
    out,
    log_sums,
    tile,
    kv_split,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    Q_START: tl.constexpr,
    OUT_START: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    LOCAL_TOKENS: tl.constexpr,
    SCATTER_ROWS: tl.constexpr,
    GATHER_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of a shard, over one range of keys."""
    tiles_per_head: tl.constexpr = (WORLD_SIZE * QUERY_ROWS + BLOCK_M - 1) // BLOCK_M
    head = tile // tiles_per_head
    row_M = tile % tiles_per_head * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row_M = row_M < WORLD_SIZE * QUERY_ROWS
    source_M = row_M // QUERY_ROWS
    place_M = row_M % QUERY_ROWS
    q_row_M = source_M * SCATTER_ROWS + Q_START + place_M * HEADS + head
    q_MD = load_rows(received, q_row_M * HEAD_DIM, is_row_M, HEAD_DIM, BLOCK_D, True)
    q_odd_MP = q_MD
    if ROTATE:
        first_row = tl.load(rank).to(tl.int32) % SPLIT * LOCAL_TOKENS // SPLIT
        token_M = source_M * LOCAL_TOKENS + tl.minimum(first_row + place_M, LOCAL_TOKENS - 1)
        token_M = tl.minimum(token_M, NUM_TOKENS - 1)
        q_MD, q_odd_MP = rotate_rows(q_MD, cos, sin, token_M, is_row_M, HEAD_DIM, BLOCK_D, True)

    history_rows = tl.load(kv_rows).to(tl.int32) - NUM_TOKENS
    new_blocks: tl.constexpr = (NUM_TOKENS + BLOCK_N - 1) // BLOCK_N
    new_full: tl.constexpr = NUM_TOKENS // BLOCK_N
    num_blocks = new_blocks + tl.cdiv(history_rows, BLOCK_N)
    first = kv_split * num_blocks // KV_SPLITS
    last = (kv_split + 1) * num_blocks // KV_SPLITS
    k_new = received + (Q_START + HEADS * QUERY_ROWS + head) * HEAD_DIM
    v_new = k_new + HEADS * LOCAL_TOKENS * HEAD_DIM
    piece: tl.constexpr = SCATTER_ROWS * HEAD_DIM
    step: tl.constexpr = HEADS * HEAD_DIM

    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    max_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    if new_full > 0:  # sm_90's assembler has crashed over a loop that is never run
        acc_MD, max_M, sum_M = attend_blocks(
            acc_MD, max_M, sum_M, q_MD, q_odd_MP, k_new, v_new, cos, sin, first, tl.minimum(last, new_full), NUM_TOKENS,
            LOCAL_TOKENS, piece, step, SCALE, HEAD_DIM, BLOCK_D, BLOCK_N, False, ROTATE, STAGES,
        )  # fmt: skip
    if new_full < new_blocks:
        acc_MD, max_M, sum_M = attend_blocks(
            acc_MD, max_M, sum_M, q_MD, q_odd_MP, k_new, v_new, cos, sin,
            tl.maximum(first, new_full), tl.minimum(last, new_blocks), NUM_TOKENS,
            LOCAL_TOKENS, piece, step, SCALE, HEAD_DIM, BLOCK_D, BLOCK_N, True, ROTATE, 1,
        )  # fmt: skip

    k_old = k_slots + NUM_TOKENS * ROW_STRIDE + head * HEAD_STRIDE
    v_old = v_slots + NUM_TOKENS * ROW_STRIDE + head * HEAD_STRIDE
    if ROTATE:
        cos += NUM_TOKENS * (HEAD_DIM // 2)
        sin += NUM_TOKENS * (HEAD_DIM // 2)
    first = tl.maximum(first - new_blocks, 0)
    last = last - new_blocks
    old_full = history_rows // BLOCK_N
    acc_MD, max_M, sum_M = attend_blocks(
        acc_MD, max_M, sum_M, q_MD, q_odd_MP, k_old, v_old, cos, sin, first, tl.minimum(last, old_full), history_rows,
        0, 0, ROW_STRIDE, SCALE, HEAD_DIM, BLOCK_D, BLOCK_N, False, ROTATE, STAGES,
    )  # fmt: skip
    acc_MD, max_M, sum_M = attend_blocks(
        acc_MD, max_M, sum_M, q_MD, q_odd_MP, k_old, v_old, cos, sin, tl.maximum(first, old_full), last, history_rows,
        0, 0, ROW_STRIDE, SCALE, HEAD_DIM, BLOCK_D, BLOCK_N, True, ROTATE, 1,
    )  # fmt: skip

    # No sum is negative: this only ties the addresses to the end of the loops, lest they sit in registers through them.
    row_M = tile % tiles_per_head * BLOCK_M + tl.arange(0, BLOCK_M) + (sum_M < 0).to(tl.int32)
    is_row_M = row_M < WORLD_SIZE * QUERY_ROWS
    out_row_M = row_M // QUERY_ROWS * GATHER_ROWS + OUT_START + row_M % QUERY_ROWS * HEADS + head
    if KV_SPLITS > 1:
        out_row_M += kv_split * (WORLD_SIZE * GATHER_ROWS)
        tl.store(log_sums + out_row_M, max_M + tl.log2(sum_M), mask=is_row_M)  # no keys: -inf
        sum_M = tl.where(sum_M > 0, sum_M, 1.0)
    channel = tl.arange(0, BLOCK_D)[None, :]
    x_MD = acc_MD * (1.0 / sum_M)[:, None]
    is_out_MD = is_row_M[:, None] & (channel < HEAD_DIM)
    tl.store(out + out_row_M[:, None] * HEAD_DIM + channel, x_MD.to(out.dtype.element_ty), mask=is_out_MD)


@triton.jit
def stage_tile(
    received,
    k_slots,
    v_slots,
    tile,
    HEADS: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    Q_START: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    LOCAL_TOKENS: tl.constexpr,
    SCATTER_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy BLOCK_ROWS rows of the chunk's keys and values to staging; row: token slow, head fast."""
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < NUM_TOKENS * HEADS
    token = row // HEADS
    head = row % HEADS
    k_row = token // LOCAL_TOKENS * SCATTER_ROWS + Q_START + HEADS * QUERY_ROWS + token % LOCAL_TOKENS * HEADS + head
    v_row = k_row + HEADS * LOCAL_TOKENS
    k_RD = load_rows(received, k_row * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D, True)
    v_RD = load_rows(received, v_row * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D, True)
    channel = tl.arange(0, BLOCK_D)[None, :]
    target_RD = (token * ROW_STRIDE + head * HEAD_STRIDE)[:, None] + channel
    is_in_RD = is_row[:, None] & (channel < HEAD_DIM)
    tl.store(k_slots + target_RD, k_RD, mask=is_in_RD)
    tl.store(v_slots + target_RD, v_RD, mask=is_in_RD)


@triton.jit
def rope_attention_kernel(
    received,
    k_slots_0,
    v_slots_0,
    k_slots_1,
    v_slots_1,
    kv_rows,
    rank,
    cos,
    sin,
    out,
    log_sums,
    HEADS_0: tl.constexpr,
    SPLIT_0: tl.constexpr,
    QUERY_ROWS_0: tl.constexpr,
    ROW_STRIDE_0: tl.constexpr,
    HEAD_STRIDE_0: tl.constexpr,
    HEADS_1: tl.constexpr,
    SPLIT_1: tl.constexpr,
    QUERY_ROWS_1: tl.constexpr,
    ROW_STRIDE_1: tl.constexpr,
    HEAD_STRIDE_1: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    LOCAL_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    KV_SPLITS: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the module; shard 1 has no heads where there is one shard."""
    scatter_0: tl.constexpr = HEADS_0 * (QUERY_ROWS_0 + 2 * LOCAL_TOKENS)
    scatter_rows: tl.constexpr = scatter_0 + HEADS_1 * (QUERY_ROWS_1 + 2 * LOCAL_TOKENS)
    gather_0: tl.constexpr = HEADS_0 * QUERY_ROWS_0
    gather_rows: tl.constexpr = gather_0 + HEADS_1 * QUERY_ROWS_1
    tiles_0: tl.constexpr = HEADS_0 * ((WORLD_SIZE * QUERY_ROWS_0 + BLOCK_M - 1) // BLOCK_M)
    tiles: tl.constexpr = tiles_0 + HEADS_1 * ((WORLD_SIZE * QUERY_ROWS_1 + BLOCK_M - 1) // BLOCK_M)
    copies_0: tl.constexpr = (NUM_TOKENS * HEADS_0 + BLOCK_ROWS - 1) // BLOCK_ROWS

    program = tl.program_id(0)
    tile = program % tiles
    kv_split = program // tiles
    copy = program - tiles * KV_SPLITS
    if copy >= 0:
        if copy < copies_0:
            stage_tile(
                received, k_slots_0, v_slots_0, copy, HEADS_0, QUERY_ROWS_0, 0, ROW_STRIDE_0, HEAD_STRIDE_0,
                NUM_TOKENS, LOCAL_TOKENS, scatter_rows, HEAD_DIM, BLOCK_ROWS, BLOCK_D,
            )  # fmt: skip
        elif HEADS_1 > 0:
            stage_tile(
                received, k_slots_1, v_slots_1, copy - copies_0, HEADS_1, QUERY_ROWS_1, scatter_0, ROW_STRIDE_1,
                HEAD_STRIDE_1, NUM_TOKENS, LOCAL_TOKENS, scatter_rows, HEAD_DIM, BLOCK_ROWS, BLOCK_D,
            )  # fmt: skip
    elif tile < tiles_0:
        attend_tile(
            received, k_slots_0, v_slots_0, kv_rows, rank, cos, sin, out, log_sums, tile, kv_split,
            HEADS_0, SPLIT_0, QUERY_ROWS_0, 0, 0, ROW_STRIDE_0, HEAD_STRIDE_0, WORLD_SIZE, NUM_TOKENS, LOCAL_TOKENS,
            scatter_rows, gather_rows, HEAD_DIM, SCALE, KV_SPLITS, ROTATE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
        )  # fmt: skip
    elif HEADS_1 > 0:
        attend_tile(
            received, k_slots_1, v_slots_1, kv_rows, rank, cos, sin, out, log_sums, tile - tiles_0, kv_split,
            HEADS_1, SPLIT_1, QUERY_ROWS_1, scatter_0, gather_0, ROW_STRIDE_1, HEAD_STRIDE_1, WORLD_SIZE, NUM_TOKENS,
            LOCAL_TOKENS, scatter_rows, gather_rows, HEAD_DIM, SCALE, KV_SPLITS, ROTATE, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
        )  # fmt: skip
