"""The exchange plan, simulated with integer labels: every rank's q, k, v rows carry the number of what they are."""

import math
from typing import NamedTuple, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from causalrt.config import HeadPlanName, override
from causalrt.layout import Layout, layout_from_config, plan_head_shards
from causalrt.recipes import recipe

PLANS = get_args(HeadPlanName)
sizes = {"num_heads": st.integers(1, 48), "world_size": st.integers(1, 16), "num_tokens": st.integers(1, 700)}


def make_layout(plan, num_heads, world_size, num_tokens):
    shards = plan_head_shards(
        plan, num_heads=num_heads, world_size=world_size, local_tokens=math.ceil(num_tokens / world_size)
    )
    return Layout(world_size=world_size, num_tokens=num_tokens, num_heads=num_heads, shards=shards)


class Attended(NamedTuple):
    """One shard on one rank: labels of the q rows it computes, and of the k and v rows it attends over."""

    q: np.ndarray  # [P * query_rows, heads]
    k: np.ndarray  # [N, heads]
    v: np.ndarray


def exchange(blocks):
    """Block p of rank r arrives as block r of rank p."""
    return blocks.swapaxes(0, 1)


def labels(layout):
    """`[3, P, S, H]`: which of q, k, v, whose row, which head; all distinct."""
    shape = (3, layout.world_size, layout.local_tokens, layout.num_heads)
    return np.arange(math.prod(shape)).reshape(shape)


def scatter(layout, label):
    """What every rank's shards attend over: [rank][shard]."""
    ranks, rows = layout.world_size, layout.local_tokens
    index = layout.scatter_index()  # one constant, used by every rank
    assert index.shape == (ranks, layout.scatter_rows)
    assert index.min() >= 0
    assert index.max() < 3 * rows * layout.num_heads
    received = exchange(label.swapaxes(0, 1).reshape(ranks, -1)[:, index])
    attended = []
    for blocks in received:
        shards, start = [], 0
        for shard in layout.shards:
            parts = []
            for part_rows in (shard.query_rows, rows, rows):
                stop = start + part_rows * shard.num_heads
                parts.append(blocks[:, start:stop].reshape(ranks * part_rows, shard.num_heads))
                start = stop
            q, k, v = parts
            shards.append(Attended(q, k[: layout.num_tokens], v[: layout.num_tokens]))
        assert start == layout.scatter_rows
        attended.append(shards)
    return attended


def gather(layout, outputs):
    """`[P, S * H]`: what every rank reads back, given each rank's and shard's outputs `[P * query_rows, heads]`."""
    ranks = layout.world_size
    sent = np.stack([np.concatenate([out.reshape(ranks, -1) for out in shards], axis=1) for shards in outputs])
    assert sent.shape == (ranks, ranks, layout.gather_rows)
    index = layout.gather_index()
    assert index.shape == (layout.local_tokens * layout.num_heads,)
    assert index.min() >= 0
    return exchange(sent).reshape(ranks, -1)[:, index]


@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=150, deadline=None)
@given(**sizes)
@example(num_heads=12, world_size=8, num_tokens=4680)
@example(num_heads=12, world_size=8, num_tokens=4677)
@example(num_heads=5, world_size=7, num_tokens=1)
@example(num_heads=1, world_size=16, num_tokens=17)
@example(num_heads=47, world_size=13, num_tokens=691)
def test_every_row_and_head_is_attended_for_and_read_back(plan, num_heads, world_size, num_tokens):
    layout = make_layout(plan, num_heads, world_size, num_tokens)
    label = labels(layout)
    q, k, v = label.reshape(3, -1, num_heads)  # rows of all ranks in order: global tokens, then padding
    head_of = label % num_heads
    attended = scatter(layout, label)

    for shards in attended:
        for shard in shards:
            assert np.isin(shard.q, q).all(), "a q slot carries something that is no q row"
            head = head_of.flat[shard.q[0]]
            assert (shard.q % num_heads == head).all(), "a column of a shard mixes heads"
            # Every token of exactly that head, in order, and no padding among them.
            np.testing.assert_array_equal(shard.k, k[:num_tokens, head])
            np.testing.assert_array_equal(shard.v, v[:num_tokens, head])

    # Attention as the identity on q's label: what comes back is the answer to the very row and head that asked.
    back = gather(layout, [[shard.q for shard in shards] for shards in attended])
    np.testing.assert_array_equal(back, label[0].reshape(world_size, -1))


@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=150, deadline=None)
@given(**sizes)
def test_every_row_and_head_is_computed_once_but_for_padding(plan, num_heads, world_size, num_tokens):
    layout = make_layout(plan, num_heads, world_size, num_tokens)
    computed = [[np.zeros((world_size * s.query_rows, s.num_heads), dtype=int) for s in layout.shards]] * world_size
    slots = [out.size for shards in computed for out in shards]
    number = np.arange(sum(slots))
    outputs = iter(np.split(number, np.cumsum(slots)[:-1]))
    numbered = [[next(outputs).reshape(out.shape) for out in shards] for shards in computed]
    read = gather(layout, numbered).ravel()
    assert len(np.unique(read)) == world_size * layout.local_tokens * num_heads, "a slot is read twice"
    q = np.concatenate([shard.q.ravel() for shards in scatter(layout, labels(layout)) for shard in shards])
    assert len(np.unique(q[read])) == len(read), "a row and head is computed twice, and both are read"

    # What is not read is padding, and no more of it than the plan says.
    rows = layout.local_tokens
    unread = world_size * layout.gather_rows - rows * num_heads  # of one rank's rows, over all destinations
    bound = {
        "padded": rows * (-num_heads % world_size),
        "grouped": num_heads * (world_size // math.gcd(num_heads, world_size) - 1),
        "balanced": num_heads % world_size * (world_size // math.gcd(num_heads % world_size, world_size) - 1),
    }
    assert 0 <= unread <= bound[plan]


@settings(max_examples=100, deadline=None)
@given(**sizes)
def test_tokens_of_the_ranks_are_the_chunk(num_heads, world_size, num_tokens):
    layout = make_layout("balanced", num_heads, world_size, num_tokens)
    held = [layout.tokens(rank) for rank in range(world_size)]
    assert [token for tokens in held for token in tokens] == list(range(num_tokens))
    for rank, tokens in enumerate(held):
        assert len(tokens) <= layout.local_tokens
        assert not tokens or tokens.start == rank * layout.local_tokens


@settings(max_examples=100, deadline=None)
@given(num_heads=sizes["num_heads"], world_size=sizes["world_size"], num_tokens=sizes["num_tokens"])
def test_shares_give_the_least_work_to_the_busiest_rank(num_heads, world_size, num_tokens):
    layout = make_layout("balanced", num_heads, world_size, num_tokens)
    per_rank = layout.gather_rows  # query rows and heads that one rank computes for one source
    least = math.ceil(num_heads * layout.local_tokens / world_size)
    cut = num_heads % world_size // math.gcd(num_heads % world_size, world_size) if num_heads % world_size else 0
    assert least <= per_rank <= least + cut
    if num_heads % world_size == 0:  # plain Ulysses
        assert layout.shards == make_layout("padded", num_heads, world_size, num_tokens).shards
        assert layout.shards == make_layout("grouped", num_heads, world_size, num_tokens).shards


@pytest.mark.parametrize(
    ("plan", "out", "back", "kv_heads"),
    [("balanced", 878 + 4 * 585, 878, 2), ("padded", 6 * 585, 2 * 585, 2), ("grouped", 879 + 6 * 585, 879, 3)],
)
def test_twelve_heads_on_eight_ranks(plan, out, back, kv_heads):
    # Design section 4; mesh's 9 x 585 is 3 x (2 x 293 + 2 x 585) with its halves of 585 rounded up.
    config = override(recipe("wan_1_3b_480p"), {"build.world_size": "8", "build.head_plan": plan})
    layout = layout_from_config(config)
    assert layout.local_tokens == 585
    assert (layout.scatter_rows, layout.gather_rows, layout.kv_heads) == (out, back, kv_heads)
    total = {"balanced": 4096, "padded": 8 * 585, "grouped": 9 * 585 + 3}
    assert layout.scatter_rows + layout.gather_rows == total[plan]


@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=100, deadline=None)
@given(**sizes)
@example(num_heads=12, world_size=8, num_tokens=4680)
@example(num_heads=12, world_size=8, num_tokens=4677)
@example(num_heads=12, world_size=1, num_tokens=7)
@example(num_heads=5, world_size=7, num_tokens=1)
@example(num_heads=1, world_size=16, num_tokens=17)
def test_destinations_are_the_scatter_index_from_the_other_side(plan, num_heads, world_size, num_tokens):
    layout = make_layout(plan, num_heads, world_size, num_tokens)
    index = layout.scatter_index().ravel()
    table = layout.scatter_destinations()
    assert table.dtype == np.int32
    assert table.shape[:3] == (3, layout.local_tokens, num_heads)
    used = table >= 0
    assert (table[~used] == -1).all()
    assert used.any(axis=(0, 1, 2)).all(), "a column that nothing uses"
    assert used[..., 0].all(), "a row and head that goes nowhere"
    assert (np.diff(used.astype(int), axis=-1) <= 0).all(), "a place after -1"
    # Whatever lies at a source arrives where the index would have fetched it, and every place is written once.
    source = np.broadcast_to(np.arange(table[..., 0].size).reshape(*table.shape[:3], 1), table.shape)
    written = np.full(index.shape, -1)
    written[table[used]] = source[used]
    np.testing.assert_array_equal(written, index)
    assert used.sum() == index.size


@pytest.mark.parametrize("plan", PLANS)
@settings(max_examples=100, deadline=None)
@given(**sizes, other=st.integers(1, 700))
@example(num_heads=12, world_size=8, num_tokens=4680, other=1560)
@example(num_heads=12, world_size=8, num_tokens=27, other=9)
@example(num_heads=5, world_size=7, num_tokens=3, other=1)
def test_a_chunk_of_another_length_has_the_same_heads_on_each_rank(plan, num_heads, world_size, num_tokens, other):
    layout = make_layout(plan, num_heads, world_size, num_tokens)
    changed = layout.with_tokens(other)
    assert changed == make_layout(plan, num_heads, world_size, other)
    for one, two in zip(layout.shards, changed.shards, strict=True):
        assert [one.heads(rank) for rank in range(world_size)] == [two.heads(rank) for rank in range(world_size)]


@pytest.mark.parametrize(("plan", "places"), [("balanced", 2), ("padded", 5), ("grouped", 2)])
def test_most_places_of_a_row_of_twelve_heads_on_eight_ranks(plan, places):
    # shards: keys of a cut head go to both of its ranks; pad: the last head stands in for four more; mesh: to both halves.
    assert make_layout(plan, 12, 8, 4680).scatter_destinations().shape == (3, 585, 12, places)


def test_half_a_head_goes_to_each_of_two_neighbours():
    layout = make_layout("balanced", 12, 8, 4680)
    whole, cut = layout.shards
    assert [list(whole.heads(rank)) for rank in range(8)] == [[rank] for rank in range(8)]
    assert [list(cut.heads(rank)) for rank in range(8)] == [[8 + rank // 2] for rank in range(8)]
    assert [cut.rows(rank, 585) for rank in (0, 1)] == [range(292), range(292, 585)]
    assert cut.query_rows == 293


@pytest.mark.parametrize("plan", PLANS)
def test_one_rank_holds_all_heads_whole(plan):
    layout = make_layout(plan, 5, 1, 7)
    assert [(s.num_heads, s.split, s.query_rows) for s in layout.shards] == [(5, 1, 7)]
    np.testing.assert_array_equal(layout.gather_index(), np.arange(35))
