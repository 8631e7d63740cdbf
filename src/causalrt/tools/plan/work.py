"""What one chunk step makes one rank do: products, attentions, passes over memory, exchanges. Counts, no times.

The list is `model/wan/step.py`, op for op, which is also what the ONNX graphs hold. S local rows, C channels, F of the
feed-forward, D of a head; L filled KV rows::

    layer   q k v o, cross q o   6 products [S, C] x [C, C]       feed-forward  [S, C] x [C, F], [S, F] x [F, C]
            self-attention       groups x L keys                  cross-attention  S rows x text_len keys, all heads
            passes               norms, rotation, modulation, gates, residuals, GELU, copies around the exchange
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from causalrt.config import Config
from causalrt.tools.plan.head_layouts import HeadLayout

PassKind = Literal["layer_norm", "rms_norm", "rotate", "gelu", "arithmetic", "copy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """`[m, k] x [k, n]`, `count` times a step."""

    m: int
    n: int
    k: int
    count: int

    @property
    def flops(self) -> int:
        """Of one."""
        return 2 * self.m * self.n * self.k

    @property
    def elements(self) -> int:
        """Read and written by one."""
        return self.m * self.k + self.k * self.n + self.m * self.n


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """`num_heads` heads, `rows` query rows against `keys` keys of `head_dim` channels; `count` times a step.

    `over_slots` tells self-attention, whose keys are the filled KV slots, from that to the prompt.
    """

    num_heads: int
    rows: int
    keys: int
    head_dim: int
    count: int
    over_slots: bool

    @property
    def flops(self) -> int:
        """Of one: two products a score."""
        return 4 * self.num_heads * self.rows * self.keys * self.head_dim

    @property
    def scores(self) -> int:
        """Of one."""
        return self.num_heads * self.rows * self.keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """An op that computes little and moves `elements` in and about as many out; `count` times a step.

    Attributes:
        fused: elements that still move, in or out, where a compiler fuses what it can; None for all (twice `elements`).
            Zero: the op has become part of its neighbour, and its launch is gone.
    """

    kind: PassKind
    elements: int
    count: int
    fused: int | None = None

    @property
    def fused_elements(self) -> int:
        """See `fused`."""
        return 2 * self.elements if self.fused is None else self.fused


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A collective in which a rank sends every rank, itself included, `rows` rows of `head_dim` channels."""

    rows: int
    head_dim: int
    count: int


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
        """Products and attentions."""
        products = sum(gemm.count * gemm.flops for gemm in self.gemms)
        return products + sum(attention.count * attention.flops for attention in self.attentions)

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
        """Ops of an eager step, exchanges apart."""
        kinds: tuple[Sequence[Gemm | Attention | Pass], ...] = (self.gemms, self.attentions, self.passes)
        return sum(op.count for ops in kinds for op in ops)


def step_work(config: Config, layout: HeadLayout, *, kv_rows: int, fused_ops: bool = False) -> StepWork:
    """The work of one chunk step.

    Args:
        config: sizes; its head plan is not looked at.
        layout: of a chunk.
        kv_rows: filled KV rows, the chunk's own included.
        fused_ops: our fused ops pack for the exchange, and attend from what was received, without copies of their own.
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
    yield Pass(kind="copy", elements=received, count=layers, fused=unpacked)  # and take apart what comes
    for sent in returned:
        yield Pass(kind="copy", elements=sent, count=layers, fused=unpacked)
        yield Pass(kind="copy", elements=wide, count=layers)
