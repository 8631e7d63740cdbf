"""What the ranks exchange, counted on the wire, against the formulas of design section 4; what the KV slots move."""

import math
from itertools import pairwise

import pytest
import torch
from support.small_bundles import Bundles, bundle_factory, prompt, tiny_config
from support.tolerances import WHOLE_MODEL

from causalrt import load
from causalrt.runtime.messages import ChunkCommand, Command

CHUNKS = 3
TWELVE_HEADS = {"model.dim": "96", "model.num_heads": "12"}
RANKS_AND_SIZES = [
    pytest.param(2, {}, id="3 heads on 2 ranks"),
    pytest.param(3, {}, id="3 heads on 3 ranks"),
    pytest.param(8, TWELVE_HEADS, id="12 heads on 8 ranks", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return bundle_factory(tmp_path_factory.mktemp("bundles"))


def rows_of_a_pair(plan: str, heads: int, ranks: int, rows: int) -> int:
    """Rows of one head that one rank sends another in one layer: q, k, v there, attention output back."""

    def both_ways(num_heads: int, split: int) -> int:
        query = math.ceil(rows / split)
        return num_heads * (query + rows + rows) + num_heads * query

    if plan == "padded":
        return both_ways(-(-heads // ranks), 1)
    if plan == "grouped":
        groups = math.gcd(heads, ranks)
        return both_ways(heads // groups, ranks // groups)
    remaining = heads % ranks
    common = math.gcd(remaining, ranks)
    return both_ways(heads // ranks, 1) + (both_ways(remaining // common, ranks // common) if remaining else 0)


def test_the_table_of_the_design() -> None:
    """12 heads on 8 ranks, 585 rows; the halves of an odd number of rows are padded to 293."""
    assert rows_of_a_pair("balanced", 12, 8, 585) == 878 + 4 * 585 + 878 == 4096
    assert rows_of_a_pair("padded", 12, 8, 585) == 8 * 585
    assert rows_of_a_pair("grouped", 12, 8, 585) == 9 * 585 + 3


def generate(
    bundles: Bundles, ranks: int, changes: dict[str, str]
) -> tuple[torch.Tensor, list[dict[int, tuple[int, int]]]]:
    """Latents, and for each chunk (exchanges, rows sent) by rank."""
    with load(bundles(ranks, changes), world_size=ranks) as engine:
        session = engine.session(prompt(), seed=3, num_chunks=CHUNKS)
        latents = torch.cat([chunk.latents for chunk in session])
    counted = [
        {rank: (t.all_to_all_calls, t.rows_sent) for rank, t in times.items()} for times in session.times.values()
    ]
    return latents, counted


@pytest.mark.parametrize(("ranks", "sizes"), RANKS_AND_SIZES)
def test_rows_exchanged(bundles: Bundles, ranks: int, sizes: dict[str, str]) -> None:
    """Two exchanges a layer, of as many rows as the plan's formula says, whatever the chunk; the plans agree."""
    config = tiny_config(ranks, sizes)
    forwards = config.model.num_layers * len(config.sampler.steps)
    local_rows = math.ceil(config.tokens_per_chunk / ranks)
    by_plan = {}
    for plan in ("balanced", "padded", "grouped"):
        latents, counted = generate(bundles, ranks, {**sizes, "build.head_plan": plan})
        pair = rows_of_a_pair(plan, config.model.num_heads, ranks, local_rows)
        expected = (2 * forwards, ranks * pair * forwards)
        assert counted == [dict.fromkeys(range(ranks), expected)] * CHUNKS, plan
        by_plan[plan] = latents
    for plan in ("padded", "grouped"):
        assert float((by_plan[plan] - by_plan["balanced"]).abs().max()) < WHOLE_MODEL, plan


def test_one_rank_exchanges_nothing(bundles: Bundles) -> None:
    _, counted = generate(bundles, 1, {})
    assert counted == [{0: (0, 0)}] * CHUNKS


@pytest.mark.parametrize(
    ("window", "frames_moved"),
    [
        ("7", [3, 3, 3, 3]),
        ("9", [3, 3, 3, 3]),
        ("12", [3, 3, 3, 3]),
        ("none", [3, 3, 3, 3]),
        # with the sink of 1: a ring of one frame, and none at all
        ("5", [2, 1, 1, 1]),
        ("4", [1, 0, 0, 0]),
    ],
)
def test_kv_rows_moved(bundles: Bundles, window: str, frames_moved: list[int]) -> None:
    """A chunk's frames at most, whatever the window; rolling moves nothing that is in history already."""
    changes = {"video.window_frames": window}
    config = tiny_config(1, changes)
    with load(bundles(1, changes)) as engine, engine.session(prompt(), record=True) as session:
        moved = [session.kv_rows_moved for _ in session]  # read with a chunk in hand: of the chunks before it
    each_chunk = [after - before for before, after in pairwise([*moved, session.kv_rows_moved])]
    assert each_chunk == [frames * config.tokens_per_frame for frames in frames_moved]
    assert max(each_chunk) <= config.video.chunk_frames * config.tokens_per_frame


@pytest.mark.parametrize("record", [False, True])
def test_noise_is_drawn_ahead_for_every_chunk_that_follows(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, record: bool
) -> None:
    """After the last chunk none is drawn, though a recorded one is refreshed too."""
    with load(bundles(1)) as engine:
        sent, real = list[Command](), engine.workers.ranks.send

        def send(command: Command) -> None:
            sent.append(command)
            real(command)

        monkeypatch.setattr(engine.workers.ranks, "send", send)
        with engine.session(prompt(), num_chunks=CHUNKS, record=record) as session:
            list(session)
    chunks = [command for command in sent if isinstance(command, ChunkCommand)]
    assert [chunk.draw_next for chunk in chunks] == [True, True, False]
    assert [chunk.context_pass for chunk in chunks] == [True, True, record]
