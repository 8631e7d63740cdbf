"""What one chunk step makes one rank do: products, attentions, passes over memory, exchanges. Counts, no times.

The list follows `model/wan/step.py` op for op, as the ONNX graphs do. S local rows, C channels, F of the feed-forward, D of a
head; L filled KV rows::

    layer   q k v o, cross q o   6 products [S, C] x [C, C]       feed-forward  [S, C] x [C, F], [S, F] x [F, C]
            self-attention       groups x L keys                  cross-attention  S rows x text_len keys, all heads
            passes               norms, rotation, modulation, gates, residuals, GELU, copies around the exchange

A head layout says what a rank attends for and exchanges. The plans `balanced`, `padded` and `grouped` have two all-to-alls a
layer (`causalrt.layout`). `gathered` is for comparison and cannot be built: one all-gather of K and V a layer, every rank holds
the whole cache, and attends for its own rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from causalrt.config import Config, HeadPlanName
from causalrt.layout import layouts_from_config, slots_from_config

PassKind = Literal["layer_norm", "rms_norm", "rotate", "gelu", "arithmetic", "copy"]
LayoutName = Literal["balanced", "padded", "grouped", "gathered"]
LAYOUTS: tuple[LayoutName, ...] = get_args(LayoutName)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """The product `[m, k] x [k, n]`, `count` times a step."""

    m: int
    n: int
    k: int
    count: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of one product."""
        return 2 * self.m * self.n * self.k

    @property
    def elements(self) -> int:
        """Elements that one product reads and writes."""
        return self.m * self.k + self.k * self.n + self.m * self.n


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """`num_heads` heads, `rows` query rows against `keys` keys of `head_dim` channels; `count` times a step.

    `over_slots` is true for self-attention, whose keys are the filled KV slots, and false for attention to the prompt.
    """

    num_heads: int
    rows: int
    keys: int
    head_dim: int
    count: int
    over_slots: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions of one attention: two products for each score."""
        return 4 * self.num_heads * self.rows * self.keys * self.head_dim

    @property
    def scores(self) -> int:
        """Scores of one attention."""
        return self.num_heads * self.rows * self.keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """An op that computes little and moves `elements` in and about as many out; `count` times a step.

    Attributes:
        fused: elements that still move, in or out, where a compiler fuses what it can; None for all (twice `elements`). Zero
            means that the op has become part of its neighbour, and is not launched.
    """

    kind: PassKind
    elements: int
    count: int
    fused: int | None = None

    @property
    def fused_elements(self) -> int:
        """Elements that move in or out once ops are fused."""
        return 2 * self.elements if self.fused is None else self.fused


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A collective in which a rank sends every rank, itself included, `rows` rows of `head_dim` channels."""

    rows: int
    head_dim: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Heads of a rank that attend with the same query rows: `num_heads` x `rows`, padding included."""

    num_heads: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLayout:
    """How one self-attention layer is divided, for one rank.

    Attributes:
        name: name of the layout.
        world_size: P.
        local_tokens: S.
        num_tokens: N.
        groups: heads and query rows that a rank attends for.
        exchanged_rows: rows of D channels that a rank sends each rank, by collective call; empty on one rank.
        kv_heads: heads whose keys and values a rank holds.
    """

    name: LayoutName
    world_size: int
    local_tokens: int
    num_tokens: int
    groups: tuple[Group, ...]
    exchanged_rows: tuple[int, ...]
    kv_heads: int


def head_layout(config: Config, name: LayoutName, *, step: int = 0) -> HeadLayout:
    """The layout of one kind of step of `config` on `config.build.world_size` ranks."""
    plan: HeadPlanName = "balanced" if name == "gathered" else name
    layout = layouts_from_config(replace(config, build=replace(config.build, head_plan=plan)))[step]
    ranks, rows, heads = layout.world_size, layout.local_tokens, layout.num_heads
    groups: tuple[Group, ...]
    exchanged: tuple[int, ...]
    if name == "gathered":
        groups, exchanged, kv_heads = (Group(num_heads=heads, rows=rows),), (2 * heads * rows,), heads
    else:
        groups = tuple(Group(num_heads=s.num_heads, rows=ranks * s.query_rows) for s in layout.shards)
        exchanged, kv_heads = (layout.scatter_rows, layout.gather_rows), layout.kv_heads
    return HeadLayout(
        name=name,
        world_size=ranks,
        local_tokens=rows,
        num_tokens=layout.num_tokens,
        groups=groups,
        exchanged_rows=exchanged if ranks > 1 else (),
        kv_heads=kv_heads,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """One chunk step of one rank."""

    layout: HeadLayout
    gemms: tuple[Gemm, ...]
    attentions: tuple[Attention, ...]
    passes: tuple[Pass, ...]
    exchanges: tuple[Exchange, ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions of products and attentions."""
        ops: tuple[Gemm | Attention, ...] = (*self.gemms, *self.attentions)
        return sum(op.count * op.flops for op in ops)

    @property
    def calls(self) -> int:
        """Collective calls."""
        return sum(exchange.count for exchange in self.exchanges)

    @property
    def rows_sent(self) -> int:
        """Rows of D channels, a rank's own block included, as the runtime counts them."""
        return self.layout.world_size * sum(exchange.count * exchange.rows for exchange in self.exchanges)

    @property
    def ops(self) -> int:
        """Ops of an eager step without its exchanges."""
        kinds: tuple[Sequence[Gemm | Attention | Pass], ...] = (self.gemms, self.attentions, self.passes)
        return sum(op.count for ops in kinds for op in ops)


def step_work(config: Config, layout: HeadLayout, *, kv_rows: int, fused_ops: bool = False) -> StepWork:
    """Count the work of one chunk step.

    Args:
        config: sizes; its own head plan is ignored.
        layout: the head layout of a chunk.
        kv_rows: filled KV rows, the chunk's own included.
        fused_ops: whether the fused ops pack for the exchange and attend from what was received, without copies of their own.
    """
    model = config.model
    rows, channels, layers = layout.local_tokens, model.dim, model.num_layers

    def gemm(n: int, k: int, count: int) -> Gemm:
        return Gemm(m=rows, n=n, k=k, count=count)

    def attention(heads: int, queries: int, keys: int, *, over_slots: bool) -> Attention:
        return Attention(
            num_heads=heads, rows=queries, keys=keys, head_dim=model.head_dim, count=layers, over_slots=over_slots
        )

    return StepWork(
        layout=layout,
        gemms=(
            gemm(channels, model.patch_features, 1),
            gemm(channels, channels, 6 * layers),
            gemm(model.ffn_dim, channels, layers),
            gemm(channels, model.ffn_dim, layers),
            gemm(model.patch_features, channels, 1),
        ),
        attentions=(
            *(attention(group.num_heads, group.rows, kv_rows, over_slots=True) for group in layout.groups),
            attention(model.num_heads, rows, model.text_len, over_slots=False),
        ),
        passes=tuple(_passes(config, layout, fused_ops=fused_ops)),
        exchanges=tuple(Exchange(rows=sent, head_dim=model.head_dim, count=layers) for sent in layout.exchanged_rows),
    )


def _passes(config: Config, layout: HeadLayout, *, fused_ops: bool) -> Iterator[Pass]:
    model = config.model
    layers, rows, depth = model.num_layers, layout.local_tokens, model.head_dim
    wide, ranks = rows * model.dim, layout.world_size
    # norm1, norm2, norm3 of each layer, and the head's; scales and shifts go into them, gates and GELU into products.
    yield Pass(kind="layer_norm", elements=wide, count=3 * layers + 1)
    yield Pass(kind="arithmetic", elements=wide, count=4 * layers + 2, fused=0)
    yield Pass(kind="arithmetic", elements=wide, count=2 * layers, fused=0)
    yield Pass(kind="arithmetic", elements=wide, count=3 * layers, fused=wide)  # residuals: one more operand
    yield Pass(kind="gelu", elements=rows * model.ffn_dim, count=layers, fused=0)
    yield Pass(kind="rms_norm", elements=wide, count=3 * layers)
    yield Pass(kind="rotate", elements=wide, count=2 * layers, fused=0)
    staged = layout.num_tokens * layout.kv_heads * depth
    yield Pass(kind="copy", elements=staged, count=2 * layers, fused=2 * staged)
    if ranks == 1:
        return
    received, *returned = (ranks * sent * depth for sent in layout.exchanged_rows)
    unpacked = 0 if fused_ops else None
    yield Pass(kind="copy", elements=3 * wide, count=layers, fused=0)
    yield Pass(kind="copy", elements=received, count=layers, fused=unpacked)  # pack by the index
    yield Pass(kind="copy", elements=received, count=layers, fused=unpacked)  # and unpack what arrives
    for sent in returned:
        yield Pass(kind="copy", elements=sent, count=layers, fused=unpacked)
        yield Pass(kind="copy", elements=wide, count=layers)


def work_of(config: Config, *, kv_frames: int) -> StepWork:
    """The work of a step with the head plan of the config, which attends to `kv_frames` latent frames."""
    layout = head_layout(config, config.build.head_plan)
    return step_work(config, layout, kv_rows=kv_frames * config.tokens_per_frame)


def full_work(config: Config) -> StepWork:
    """The work of a step in the last chunk of the horizon."""
    slots, video = slots_from_config(config), config.video
    return work_of(config, kv_frames=slots.valid_frames(video.first_frame_of(video.horizon_chunks - 1)))
