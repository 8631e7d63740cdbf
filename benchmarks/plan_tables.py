"""Compute the tables and the picture of docs/performance.md anew: `python benchmarks/plan_tables.py`."""

from collections.abc import Sequence
from pathlib import Path

from causalrt.config import Config, override
from causalrt.recipes import recipe
from causalrt.tools.ops.work import LAYOUTS, head_layout
from causalrt.tools.plan import assumptions as assumed
from causalrt.tools.plan.assumptions import Bound, Estimate
from causalrt.tools.plan.hardware import GPUS
from causalrt.tools.plan.predict import Forecast, forecast
from causalrt.tools.plan.published import compare_published
from causalrt.tools.plan.roofline import GpuMachine, Lowering, decode_fraction
from causalrt.tools.plan.timeline import draw_timeline, timeline

DOCS = Path(__file__).parents[1] / "docs"

TARGETS = (16, 24, 40)
LOWERINGS: tuple[Lowering, ...] = ("engine", "runtime")
RANKS = range(1, 17)


def _config() -> Config:
    return override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(estimate: Estimate, factor: float = 1.0, digits: int = 0) -> str:
    return estimate.text(factor, digits, to=" to ")


def layouts_table() -> str:
    """8 x A800: every layout, both ways to exchange, self-attention launched for each shard or once."""
    rows = []
    for lowering in LOWERINGS:
        for fused in (False, True):
            machine = GpuMachine(gpu=GPUS["a800"], lowering=lowering, fused_ops=fused)
            for layout in LAYOUTS:
                found = forecast(_config(), machine, layout, world_size=8, executor="tensorrt", vae="none")
                last = found.chunks[-1]
                parts = last.parts
                rows.append(
                    [
                        lowering,
                        "one launch" if fused else "a launch a shard",
                        layout,
                        _spread(last.step_s, 1e3),
                        " / ".join(
                            f"{1e3 * s:.1f}"
                            for s in (
                                parts.gemm_s,
                                parts.attention_s,
                                parts.pass_s,
                                parts.exchange_s,
                                parts.idle_s,
                            )
                        ),
                        _spread(last.denoise_s, 1e3),
                        _spread(found.steady_frames_per_second, 1),
                        f"{found.bound_frames_per_second:.0f}",
                        f"{found.memory_bytes['total_bytes'] / 2**30:.1f}",
                        f"{found.counts['bytes_sent'] / 1e6:.0f}",
                        str(found.counts["all_to_all_calls"]),
                    ]
                )
    header = (
        "exchange",
        "self-attention",
        "layout",
        "step, ms",
        "product / attention / pass / exchange / gaps",
        "4 steps, ms",
        "frames/s, no VAE",
        "limit",
        "GiB",
        "MB sent",
        "calls",
    )
    return _rows(header, rows)


def ranks_table() -> str:
    """A800: numbers of ranks, with frames decoded on a GPU of their own or on that of rank 0."""
    machine = GpuMachine(gpu=GPUS["a800"], fused_ops=True)
    rows = []
    for ranks in (1, 2, 3, 4, 6, 7, 8, 16):
        own, shared = (
            forecast(_config(), machine, "balanced", world_size=ranks, executor="tensorrt", vae=vae)
            for vae in ("own", "shared")
        )
        rows.append(
            [
                str(ranks),
                _spread(own.chunks[-1].denoise_s, 1e3),
                _spread(own.first_frame_s, 1e3),
                _spread(own.steady_frames_per_second, 1, 1),
                _spread(shared.first_frame_s, 1e3),
                _spread(shared.steady_frames_per_second, 1, 1),
            ]
        )
    header = (
        "P",
        "4 steps, ms",
        "first frame, ms, own",
        "frames/s, own",
        "first frame, ms, shared",
        "frames/s, shared",
    )
    return _rows(header, rows)


def targets_table() -> str:
    """A800: ranks, and how much faster decoding, that each target needs."""
    machine = GpuMachine(gpu=GPUS["a800"], fused_ops=True)
    found = [
        forecast(_config(), machine, "balanced", world_size=ranks, executor="tensorrt", vae="own") for ranks in RANKS
    ]
    rows = []
    for target in TARGETS:
        budget_s = found[0].chunks[-1].frames / target
        decode = found[0].chunks[-1].decode_s
        split = next((n for n, gain in assumed.SPLIT_DECODE_SPEEDUP.items() if decode.nominal / gain <= budget_s), None)
        rows.append(
            [
                str(target),
                f"{1e3 * budget_s:.0f}",
                _first(found, budget_s, "nominal"),
                _first(found, budget_s, "worst"),
                f"{max(1.0, decode.nominal / budget_s):.1f} x",
                "none of them" if split is None else str(split),
            ]
        )
    header = (
        "frames/s",
        "ms a chunk",
        "ranks, nominal",
        "ranks, worst case",
        "faster decoder, of one A800",
        "or GPUs that split it",
    )
    return _rows(header, rows)


def _first(found: Sequence[Forecast], budget_s: float, bound: Bound) -> str:
    for each in found:
        last = each.chunks[-1]
        if last.denoise_s.at(bound) + last.step_s.at(bound) <= budget_s:
            return str(each.world_size)
    return f"more than {found[-1].world_size}"


def published_table() -> str:
    """Published figures beside predictions."""
    rows = []
    for each in compare_published():
        digits = 2 if each.unit == "x" else 0
        rows.append(
            [
                each.what,
                f"{each.published:.{digits}f} {each.unit}",
                _spread(each.predicted, 1, digits),
                f"{each.error:+.0%}",
                "yes" if each.inside else "**no**",
                each.source + (f"; {each.note}" if each.note else ""),
            ]
        )
    return _rows(("what", "published", "predicted", "error", "in bars", "source and note"), rows)


def sources_table() -> str:
    """The GPUs, the fractions of their figures that are assumed to be reached, and the sources."""
    rows = []
    for name, gpu in GPUS.items():
        reached = assumed.REACHED[gpu.architecture]
        rows.append(
            [
                name,
                f"{gpu.tensor_tflops:g}",
                f"{gpu.memory_gbs:g}",
                str(gpu.num_multiprocessors),
                f"{gpu.link_gbs:g} ({gpu.link})",
                gpu.source,
                f"{_spread(reached.gemm, 100)} %: {reached.gemm_source}",
                f"{_spread(reached.attention, 100)} %: {reached.attention_source}",
                f"{_spread(decode_fraction(gpu), 100)} %",
            ]
        )
    header = (
        "",
        "TFLOP/s",
        "GB/s",
        "SMs",
        "link, GB/s",
        "source",
        "products reach",
        "attention reaches",
        "VAE reaches",
    )
    return _rows(header, rows)


def waves_table() -> str:
    """Query tiles of each layout on 108 multiprocessors."""
    config = override(_config(), {"build.world_size": "8"})
    rows = []
    for name in LAYOUTS:
        tiles = [group.num_heads * -(-group.rows // 128) for group in head_layout(config, name).groups]
        apart = sum(-(-each // 108) for each in tiles)
        rows.append([name, " + ".join(map(str, tiles)), str(apart), f"{sum(tiles) / 108:.2f}"])
    return _rows(("layout", "query tiles of 128 rows", "waves, a launch each", "of a wave, if it were fluid"), rows)


TABLES = {
    "layouts": layouts_table,
    "waves": waves_table,
    "ranks": ranks_table,
    "targets": targets_table,
    "published": published_table,
    "sources": sources_table,
}


def with_tables(text: str) -> str:
    """Compute what stands between `<!-- table: NAME -->` and `<!-- end -->` in `text` anew."""
    for name, make in TABLES.items():
        start = f"<!-- table: {name} -->\n"
        before, found, rest = text.partition(start)
        if found:
            _, end, after = rest.partition("<!-- end -->")
            text = before + start + make() + "\n" + end + after
    return text


def main() -> None:
    """Write the tables and the picture."""
    page = DOCS / "performance.md"
    page.write_text(with_tables(page.read_text()))
    machine = GpuMachine(gpu=GPUS["a800"], fused_ops=True)
    found = forecast(_config(), machine, "balanced", world_size=7, executor="tensorrt", vae="own")
    title = "7 ranks and a decoder on 8 x A800, balanced: predicted"
    draw_timeline(timeline(found, chunks=8), DOCS / "plan-timeline.png", title=title)


if __name__ == "__main__":
    main()
