"""Launch plans that the fused ops keep from call to call: the right one for every shape, stride, type and device."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch

from causalrt.config import Config, override
from causalrt.errors import OperandError
from causalrt.layout import layout_from_config
from causalrt.plugins import qk_norm_rope, rope_attention
from causalrt.plugins.kernel_launch import TRITON_TYPES, KernelLaunch
from causalrt.recipes import recipe

pytest.importorskip("triton", reason="needs Triton")
CONFIG = override(recipe("tiny"), {"build.world_size": "2"})
LAYOUT = layout_from_config(CONFIG)
DIM = CONFIG.model.head_dim
Launched = list[KernelLaunch]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """What would be launched, on no device; no plan of another test is kept, nor one of this."""
    launches: Launched = []
    kept = qk_norm_rope._plan, rope_attention._plan, rope_attention._blocks
    for plans in kept:
        plans.cache_clear()
    monkeypatch.setattr(KernelLaunch, "run", lambda launch, *tensors: launches.append(launch))
    yield launches
    for plans in kept:
        plans.cache_clear()


def test_qk_norm_rope(launched: Launched) -> None:
    """Twice through all cases, so that each is planned among others, and then found among them."""
    rows, width = LAYOUT.local_tokens, CONFIG.model.num_heads * DIM
    destinations = torch.from_numpy(LAYOUT.scatter_destinations())
    cases = list(product((torch.bfloat16, torch.float32), (False, True), (1e-6, 1e-5)))
    for _ in range(2):
        for dtype, packed, eps in cases:
            qkv = torch.empty(rows, 3 * width, dtype=dtype)
            q, k, v = (part if packed else part.contiguous() for part in qkv.chunk(3, dim=1))
            weight, table = torch.empty(width, dtype=dtype), torch.empty(1, rows, DIM // 2)
            out = torch.empty(2 * LAYOUT.scatter_rows, DIM, dtype=dtype)
            qk_norm_rope.write_rows(out, q, k, v, weight, weight, table, table, destinations, eps)
            launch = launched[-1]
            assert launch.signature["q"] == launch.signature["out"] == f"*{TRITON_TYPES[dtype]}"
            assert launch.constexprs["EPS"] == eps
            assert launch.constexprs["Q_STRIDE"] == (3 * width if packed else width)
    first, second = launched[: len(cases)], launched[len(cases) :]
    assert len({id(launch) for launch in first}) == len(cases)
    assert all(one is other for one, other in zip(first, second, strict=True)), "planned again"


def call_rope_attention(
    *, dtype: torch.dtype, slot_rows: int, whole_slots: bool, rotate: bool, device: str, config: Config = CONFIG
) -> None:
    layout = layout_from_config(config)
    received = torch.empty(2, layout.scatter_rows, DIM, dtype=dtype, device=device)
    heads = [shard.num_heads for shard in layout.shards]
    slots = [
        torch.empty((1, count, slot_rows, DIM) if whole_slots else (1, slot_rows, count * DIM), dtype=dtype)
        for count in heads
        for _ in "kv"
    ]
    table, number = torch.empty(slot_rows, DIM // 2), torch.zeros(1, dtype=torch.int64)
    rotation = (number, table, table) if rotate else ()
    splits = [shard.split for shard in layout.shards]
    rope_attention.run_kernel(received, slots, number, rotation, heads, splits, layout.num_tokens)


def test_rope_attention(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices differ in what the plan asks of them: `meta` stands for a Hopper."""
    facts = {"cpu": (80, 108), "meta": (90, 132)}
    monkeypatch.setattr(rope_attention, "_device_facts", lambda device: facts[device.type])
    tokens = LAYOUT.num_tokens
    cases = list(
        product((torch.bfloat16, torch.float32), (tokens, 2 * tokens), (False, True), (False, True), ("cpu", "meta"))
    )
    for _ in range(2):
        for dtype, slot_rows, whole_slots, rotate, device in cases:
            call_rope_attention(dtype=dtype, slot_rows=slot_rows, whole_slots=whole_slots, rotate=rotate, device=device)
            launch = launched[-1]
            assert launch.signature["received"] == f"*{TRITON_TYPES[dtype]}"
            assert launch.constexprs["ROTATE"] == rotate
            heads = LAYOUT.shards[0].num_heads
            assert launch.constexprs["ROW_STRIDE_0"] == (DIM if whole_slots else heads * DIM)
            assert launch.constexprs["HEAD_STRIDE_0"] == (slot_rows * DIM if whole_slots else DIM)
            if dtype == torch.bfloat16 and not rotate:
                assert launch.num_stages == 3
            if dtype == torch.bfloat16 and rotate:
                assert launch.constexprs["BLOCK_N"] == (64 if device == "meta" else 32)
    first, second = launched[: len(cases)], launched[len(cases) :]
    assert len({id(launch) for launch in first}) == len(cases)
    assert all(one is other for one, other in zip(first, second, strict=True)), "planned again"


def test_a_kept_plan_lets_no_wrong_operand_through(launched: Launched) -> None:
    """The operands are looked at in every call: the kernel sees addresses alone."""
    rows, width = LAYOUT.local_tokens, CONFIG.model.num_heads * DIM
    destinations = torch.from_numpy(LAYOUT.scatter_destinations())

    def norm(weight: torch.Tensor) -> None:
        q, table = torch.empty(rows, width), torch.empty(1, rows, DIM // 2)
        out = torch.empty(2 * LAYOUT.scatter_rows, DIM)
        qk_norm_rope.write_rows(out, q, q, q, weight, weight, table, table, destinations, 1e-6)

    def attend(kv_rows: torch.Tensor) -> None:
        received = torch.empty(2, LAYOUT.scatter_rows, DIM)
        heads = [shard.num_heads for shard in LAYOUT.shards]
        slots = [torch.empty(1, LAYOUT.num_tokens, count * DIM) for count in heads for _ in "kv"]
        splits = [shard.split for shard in LAYOUT.shards]
        rope_attention.run_kernel(received, slots, kv_rows, (), heads, splits, LAYOUT.num_tokens)

    calls: list[tuple[Callable[[torch.Tensor], None], torch.Tensor, torch.Tensor]] = [
        (norm, torch.empty(width), torch.empty(2 * width)[::2]),
        (attend, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)),
    ]
    for call, right, wrong in calls:
        call(right)
        with pytest.raises(OperandError):
            call(wrong)
    assert len(launched) == 2
