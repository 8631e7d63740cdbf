"""The planner's counts against torch's own counter, what a step hands to its exchange, and memory that is allocated."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from causalrt.config import Config, override
from causalrt.export.random_encoders import SMALL_VAE, random_vae
from causalrt.export.random_weights import random_weights
from causalrt.layout import layout_from_config
from causalrt.model.codecs.wan_vae import FirstFrame, NextFrame, cache_slots
from causalrt.model.wan.step import ChunkStep, StepOps
from causalrt.model.wan.transformer import Wan, wan_from_weights
from causalrt.plugins.attention import attend, kv_attention_in_place
from causalrt.plugins.rotate import rotate_pairs
from causalrt.recipes import recipe
from causalrt.runtime.kv_slots import KVSlots
from causalrt.tools.ops.work import LAYOUTS, head_layout, step_work
from causalrt.tools.plan.decode_work import decode_flops, decode_weights
from causalrt.tools.plan.hardware import GPUS
from causalrt.tools.plan.predict import forecast
from causalrt.tools.plan.roofline import GpuMachine

TWELVE_HEADS = {"model.dim": "96", "model.num_heads": "12"}


def config_for(ranks: int, **changes: str) -> Config:
    return override(recipe("tiny"), {"build.world_size": str(ranks), **changes})


def counted_step(config: Config, kv_frames: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Products' operations of a real step, those of its self-attentions by their shapes, and its exchanges (ranks, rows)."""
    layout, model = layout_from_config(config), config.model
    exchanged: list[tuple[int, int]] = []
    attended = 0

    def all_to_all(sent: torch.Tensor) -> torch.Tensor:
        exchanged.append((sent.shape[0], sent.shape[1]))
        return sent

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        nonlocal attended
        attended += 4 * q.shape[1] * k.shape[1] * q.shape[2]
        return q

    def kv_attention(q, k_new, v_new, k_slots, v_slots, heads):
        return counting(q, k_slots, v_slots, heads), k_slots, v_slots

    ops = StepOps(all_to_all=all_to_all, rotate=rotate_pairs, attention=counting, kv_attention=kv_attention)
    shapes = {name: parameter.shape for name, parameter in Wan(model).state_dict().items()}
    weights = {name: value.reshape(shapes[name]) for name, value in random_weights(model, seed=0)}
    step = ChunkStep(wan_from_weights(model, weights), config, layout, ops).eval()
    slots = KVSlots(config, layout, torch.float32, whole_slots=False, device=torch.device("cpu"))
    kv = slots.filled(kv_frames - config.video.chunk_frames)
    cross = [(torch.zeros(1, model.text_len, model.dim),) * 2] * model.num_layers
    zero = torch.zeros(1, dtype=torch.int64)
    inputs = torch.zeros(layout.local_tokens, model.patch_features), torch.zeros(model.dim), torch.zeros(6, model.dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        step(*inputs, zero, zero, kv, cross)
    return counter.get_total_flops(), attended, exchanged


@pytest.mark.parametrize("plan", ["balanced", "padded", "grouped"])
@pytest.mark.parametrize(("ranks", "changes"), [(1, {}), (2, {}), (8, TWELVE_HEADS)])
def test_a_step_is_counted_as_torch_counts_it(plan: str, ranks: int, changes: dict[str, str]) -> None:
    config = config_for(ranks, **changes, **{"build.head_plan": plan})
    products, attended, exchanged = counted_step(config, kv_frames=6)
    work = step_work(config, head_layout(config, plan), kv_rows=6 * config.tokens_per_frame)
    assert sum(gemm.count * gemm.flops for gemm in work.gemms) == products
    assert sum(attention.count * attention.flops for attention in work.attentions) == attended
    assert work.calls == len(exchanged)
    assert work.rows_sent == sum(p * rows for p, rows in exchanged)


@pytest.mark.parametrize("plan", ["balanced", "padded", "grouped"])
def test_kv_bytes_are_those_of_the_slots(plan: str) -> None:
    config = config_for(8, **TWELVE_HEADS, **{"build.head_plan": plan})
    layout = layout_from_config(config)
    slots = KVSlots(config, layout, torch.float32, whole_slots=False, device=torch.device("cpu"))
    whole = slots.filled(config.video.horizon_frames - config.video.chunk_frames)
    allocated = sum(t.numel() * t.element_size() for layer in whole for pair in layer for t in pair)
    machine = GpuMachine(gpu=GPUS["a800"])
    predicted = forecast(config, machine, plan, world_size=8, executor="eager")
    assert config.video.capacity_frames * config.tokens_per_frame == whole[0][0][0].shape[1]
    assert predicted.memory_bytes["kv_bytes"] == allocated


def test_the_table_of_the_design() -> None:
    """12 heads on 8 ranks, 585 rows (design section 4): K/V heads, query tiles, rows a pair exchanges."""
    config = override(recipe("wan_1_3b_480p"), {"build.world_size": "8"})
    found = {name: head_layout(config, name) for name in LAYOUTS}
    assert {name: layout.kv_heads for name, layout in found.items()} == {
        "balanced": 2,
        "padded": 2,
        "grouped": 3,
        "gathered": 12,
    }
    assert {name: sum(layout.exchanged_rows) for name, layout in found.items()} == {
        "balanced": 4096,
        "padded": 8 * 585,
        "grouped": 9 * 585 + 3,
        "gathered": 24 * 585,
    }
    tiles = {
        name: [group.num_heads * math.ceil(group.rows / 128) for group in layout.groups]
        for name, layout in found.items()
    }
    assert tiles == {"balanced": [37, 19], "padded": [74], "grouped": [57], "gathered": [60]}


def test_the_work_of_the_design() -> None:
    """One forward at 1.3B, chunk 7: 11.7 TFLOP linear, 28.3 self-attention (design section 13)."""
    config = recipe("wan_1_3b_480p")
    work = step_work(config, head_layout(config, "balanced"), kv_rows=config.slot_rows)
    inner = sum(attention.count * attention.flops for attention in work.attentions if attention.over_slots)
    assert sum(gemm.count * gemm.flops for gemm in work.gemms) / 1e12 == pytest.approx(11.7, abs=0.05)
    assert inner / 1e12 == pytest.approx(28.3, abs=0.05)


def test_decoding_is_counted_as_torch_counts_it() -> None:
    """But for the two products of attention, which torch's counter does not see on a CPU."""
    vae, size = random_vae(SMALL_VAE, seed=0), {"latent_height": 4, "latent_width": 6}
    caches = [torch.zeros(slot.shape) for slot in cache_slots(SMALL_VAE, **size)]
    latent = torch.zeros(1, 16, 4, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as first:
        FirstFrame(vae).eval()(latent)
    with torch.no_grad(), FlopCounterMode(display=False) as later:
        NextFrame(vae).eval()(latent, caches)
    attention = 4 * (4 * 6) ** 2 * SMALL_VAE.base_dim * SMALL_VAE.dim_mult[-1]
    assert decode_flops(SMALL_VAE, **size, first=True) == first.get_total_flops() + attention
    assert decode_flops(SMALL_VAE, **size) == later.get_total_flops() + attention


def test_weights_of_the_decoder() -> None:
    vae = random_vae(SMALL_VAE, seed=0)
    kernels = [p.numel() for p in (*vae.decoder.parameters(), *vae.post_quant_conv.parameters()) if p.dim() > 3]
    surplus = 2 * SMALL_VAE.base_dim * SMALL_VAE.dim_mult[-1]
    norms = sum(p.numel() for p in vae.decoder.parameters() if p.dim() > 3 and p.shape[1:].numel() == 1)
    assert decode_weights(SMALL_VAE) - surplus == pytest.approx(sum(kernels) - norms, rel=0.01)


def test_attention_ops_are_what_the_planner_times() -> None:
    """`attend` and `kv_attention_in_place` agree, so one calibration serves self- and cross-attention."""
    q, k = torch.randn(1, 4, 8), torch.randn(1, 6, 8)
    out, _, _ = kv_attention_in_place(q, k[:, :2], k[:, :2], k.clone(), k.clone(), 2)
    torch.testing.assert_close(out, attend(q, k, k, 2))
