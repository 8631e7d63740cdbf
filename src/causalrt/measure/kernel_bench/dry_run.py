"""The cases that `gpu_kernels.py` would run, with their sizes for an H200; no GPU is needed."""

from collections.abc import Iterator

from causalrt.config import Config, override
from causalrt.measure.kernel_bench.cases import KernelBenchOptions
from causalrt.measure.kernel_bench.qk_norm_rope import QkNormRope
from causalrt.measure.kernel_bench.rope_attention import BACKENDS, RopeAttention
from causalrt.measure.kernel_bench.sections import PLANS, TILES
from causalrt.measure.kernel_bench.timing import Facts, Work
from causalrt.plugins.rope_attention_launch import MAX_KV_SPLITS

FLUSH_MS = 0.3
FACTS = Facts()

Line = tuple[str, Work | None, int]
"""A description, the work of a call, and the number of sides."""


def planned_cases(options: KernelBenchOptions, config: Config) -> Iterator[Line]:
    """Yield every case in order."""

    def of(world_size: int, plan: str = "balanced") -> Config:
        return override(config, {"build.world_size": str(world_size), "build.head_plan": plan})

    lengths = options.kv_lengths(config)
    for section in options.sections:
        for world_size in options.world_sizes if section != "plans" else ():
            if section == "qk_norm_rope":
                case = QkNormRope(of(world_size))
                sides = 3 + (1 + options.compile) * (2 if world_size == 1 else 1)
                yield f"{section}, P = {world_size}, {case.layout.local_tokens} rows", case.work, sides
                continue
            for kv_rows in lengths:
                attention = RopeAttention(of(world_size), kv_rows)
                forms = {"rope_attention": options.forms, "tune": options.tune or ["whole"]}.get(section, ["whole"])
                sides = {
                    "rope_attention": len(forms) + len(BACKENDS),
                    "tune": len(TILES) * len(forms),
                    "kv_splits": len(options.kv_splits or range(MAX_KV_SPLITS)),
                }[section]
                yield f"{section}, P = {world_size}, {kv_rows} keys", attention.work, sides
                for form in forms if section == "rope_attention" else ():
                    made = attention.plan(form, FACTS)
                    yield f"  {form}: {made.attend.grid[0]} programs, {made.kv_splits} ranges of keys", None, 0
        for plan in PLANS if section == "plans" else ():
            attention = RopeAttention(of(max(options.world_sizes), plan), config.slot_rows)
            pairs = zip(attention.heads, attention.query_rows, strict=True)
            rows = " + ".join(f"{heads} x {count}" for heads, count in pairs)
            name = f"{section}, P = {attention.world_size}, {config.slot_rows} keys, {plan}: {rows} query rows"
            yield name, attention.work, 1 + len(BACKENDS)


def planned_lines(options: KernelBenchOptions, config: Config) -> Iterator[str]:
    """Yield a line for each case with its size, and one with the least time of all cases."""
    total_ms = 0.0
    for name, work, sides in planned_cases(options, config):
        if work is None:
            yield name
            continue
        calls = work.num_calls(FACTS)
        total_ms += options.repeats * sides * (calls * work.floor_ms + FLUSH_MS)
        yield (
            f"{name}: {work.num_bytes / 1e6:.1f} MB, {work.flops / 1e9:.1f} GFLOP, at least {1e3 * work.floor_ms:.1f} us; "
            f"{sides} sides, {work.num_sets(FACTS)} sets, {calls} calls a graph"
        )
    yield f"at least {total_ms / 1e3:.0f} s of timing on an H200, beside compilation and checks"
