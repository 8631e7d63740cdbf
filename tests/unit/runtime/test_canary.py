"""The canary of the exchange, on ranks that are threads: what arrives wrongly says where it comes from."""

import re

import pytest
import torch

from causalrt.config import Config, override
from causalrt.proof.ranks import ThreadCollectives, meet, run_threads
from causalrt.recipes import recipe
from causalrt.runtime.canary import ExchangeCheck, check_exchanges
from causalrt.runtime.collectives import LocalCollectives

CPU = torch.device("cpu")


def config(world_size: int, **changes: str) -> Config:
    return override(recipe("tiny"), {"build.world_size": str(world_size), **changes})


def checks(found: Config, dtype: torch.dtype = torch.float32) -> list[ExchangeCheck]:
    meeting, collectives = meet(found.build.world_size, ThreadCollectives)
    by_rank = run_threads(meeting, lambda rank: check_exchanges(collectives[rank], found, dtype=dtype, device=CPU))
    assert all(ranks.take_traffic().all_to_all_calls == 0 for ranks in collectives)
    return [check for rank in by_rank for check in rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_a_right_exchange_passes_in_any_precision(world_size, dtype):
    found = checks(config(world_size), dtype)
    assert [check.name for check in found] == ["scatter_heads", "gather_heads"] * world_size
    assert [check.fault for check in found] == [""] * 2 * world_size
    assert all(check.rows > 0 for check in found)


def test_each_kind_of_step_has_exchanges_of_its_own():
    two_kinds = config(2, **{"video.independent_first_frame": "true", "video.horizon_frames": "13"})
    names = [check.name for check in checks(two_kinds) if check.rank == 0]
    assert names[2:] == ["scatter_heads of a 1-frame step", "gather_heads of a 1-frame step"]


def test_one_rank_has_nothing_to_exchange():
    assert check_exchanges(LocalCollectives(), config(1), dtype=torch.float32, device=CPU) == ()


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (
            lambda received: received.flip(0),
            "rank 0 expected row 0, channel 0 of what rank 0 sends it, and got row 0, channel 0 of what rank 1 sends rank 0 (",
        ),
        (
            lambda received: received.roll(1, dims=1),
            r"expected row 0, channel 0 of what rank 0 sends it, and got row \d+, channel 0 of what rank 0 sends rank 0 \(",
        ),
        (lambda received: received.flip(2), r"and got row 0, channel 15 of what rank 0 sends rank 0 \("),
        (lambda received: received * torch.nan, "and got nan, which no rank has sent"),
        (lambda received: received + 0.25, "which no rank has sent"),
    ],
)
def test_what_arrives_wrongly_is_named(monkeypatch, spoil, fault):
    right = ThreadCollectives.all_to_all

    def wrong(self: ThreadCollectives, received: torch.Tensor, sent: torch.Tensor) -> None:
        right(self, received, sent)
        if self.rank == 0:
            received.copy_(spoil(received))

    monkeypatch.setattr(ThreadCollectives, "all_to_all", wrong)
    found = checks(config(2), torch.bfloat16)
    pattern = fault if "\\" in fault else re.escape(fault)
    assert all(re.search(pattern, check.fault) for check in found if check.rank == 0)
    assert [check.fault for check in found if check.rank == 1] == ["", ""]
