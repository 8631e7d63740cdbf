"""The Triton kernel of `causalrt::qk_norm_rope`.

One program takes one token row. It reads q, k and v of all heads once, and writes each head to every block that wants it::

    q, k [S, C] --> mean square over C --> weight --> rotate pairs --+
    v    [S, C] -----------------------------------------------------+--> out [P * scatter_rows, D]
                                                        at destinations [3, S, H, M]; -1: nowhere

A row is a tile `[heads, D]`, both padded to powers of two and masked. The two channels of a pair lie side by side in one
thread, so that `reshape`, `split` and `join` move nothing and loads and stores keep their full width. Places are read
before anything is written: a warp issues in order, and a place behind a store would wait for it. Statistics, weight and
rotation are float32; what is written is rounded once, to the type of `out`.

`qk_norm_rope` says what is computed, `qk_norm_rope_launch` plans the launch. Shape suffixes: H heads, D channels of a head,
P pairs of a head.
"""

# mypy: ignore-errors
import triton
import triton.language as tl


@triton.jit
def load_places(destinations, head_H, HEADS: tl.constexpr, PLACES: tl.constexpr):
    """Where the heads of a row go: `PLACES` columns `[heads, 1]`, -1 where a head has fewer."""
    places = ()
    for number in tl.static_range(PLACES):
        place_H = tl.load(destinations + head_H * PLACES + number, mask=head_H < HEADS, other=-1)
        places = places + (place_H[:, None],)  # noqa: RUF005 (Triton has no starred tuples)
    return places


@triton.jit
def norm_rope(x_HD, weight_HD, cos_1P, sin_1P, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """RMS norm over the whole row, then rotation of adjacent channels, in float32."""
    x_HD = x_HD.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_HD * x_HD) / WIDTH + EPS)
    normed_HD = x_HD * scale * weight_HD.to(tl.float32)
    even_HP, odd_HP = tl.split(tl.reshape(normed_HD, (x_HD.shape[0], x_HD.shape[1] // 2, 2)))
    turned_HP2 = tl.join(even_HP * cos_1P - odd_HP * sin_1P, even_HP * sin_1P + odd_HP * cos_1P)
    return tl.reshape(turned_HP2, x_HD.shape)


@triton.jit
def store_heads(out, x_HD, places, dim_1D, inside_HD, DIM: tl.constexpr, PLACES: tl.constexpr):
    """Each head of a row to its places."""
    x_HD = x_HD.to(out.dtype.element_ty)
    for number in tl.static_range(PLACES):
        place_H1 = places[number]
        tl.store(out + place_H1.to(tl.int64) * DIM + dim_1D, x_HD, mask=inside_HD & (place_H1 >= 0))


@triton.jit
def qk_norm_rope_kernel(
    q,
    k,
    v,
    norm_q,
    norm_k,
    cos,
    sin,
    destinations,
    out,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PLACES: tl.constexpr,
    EPS: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """One token row; grid `[ROWS]`."""
    row = tl.program_id(0).to(tl.int64)
    head_H = tl.arange(0, PADDED_HEADS)
    dim_1D = tl.arange(0, PADDED_DIM)[None, :]
    inside_HD = (head_H[:, None] < HEADS) & (dim_1D < DIM)
    channel_HD = head_H[:, None] * DIM + dim_1D
    pair_1P = tl.arange(0, PADDED_DIM // 2)[None, :]
    pair_row = row * (DIM // 2)
    place_row = row * HEADS * PLACES

    q_HD = tl.load(q + row * Q_STRIDE + channel_HD, mask=inside_HD, other=0.0)
    k_HD = tl.load(k + row * K_STRIDE + channel_HD, mask=inside_HD, other=0.0)
    v_HD = tl.load(v + row * V_STRIDE + channel_HD, mask=inside_HD, other=0.0)
    v_places = load_places(destinations + 2 * ROWS * HEADS * PLACES + place_row, head_H, HEADS, PLACES)
    q_places = load_places(destinations + place_row, head_H, HEADS, PLACES)
    k_places = load_places(destinations + ROWS * HEADS * PLACES + place_row, head_H, HEADS, PLACES)
    norm_q_HD = tl.load(norm_q + channel_HD, mask=inside_HD, other=0.0)
    norm_k_HD = tl.load(norm_k + channel_HD, mask=inside_HD, other=0.0)
    cos_1P = tl.load(cos + pair_row + pair_1P, mask=pair_1P < DIM // 2, other=0.0)
    sin_1P = tl.load(sin + pair_row + pair_1P, mask=pair_1P < DIM // 2, other=0.0)

    store_heads(out, v_HD, v_places, dim_1D, inside_HD, DIM, PLACES)
    q_HD = norm_rope(q_HD, norm_q_HD, cos_1P, sin_1P, HEADS * DIM, EPS)
    store_heads(out, q_HD, q_places, dim_1D, inside_HD, DIM, PLACES)
    k_HD = norm_rope(k_HD, norm_k_HD, cos_1P, sin_1P, HEADS * DIM, EPS)
    store_heads(out, k_HD, k_places, dim_1D, inside_HD, DIM, PLACES)
