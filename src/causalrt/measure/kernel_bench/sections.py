"""The sections of `gpu_kernels.py`: the sides of each case, and the claims that are judged.

case -> operands in several sets -> sides -> captured -> checked against float64 -> measured together -> report, claims
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from causalrt.config import Config, override
from causalrt.engines.base import TORCH_DTYPES
from causalrt.errors import KernelError
from causalrt.measure.kernel_bench.cases import KernelBenchOptions, Random
from causalrt.measure.kernel_bench.qk_norm_rope import QkNormRope
from causalrt.measure.kernel_bench.rope_attention import BACKENDS, RopeAttention, Slots
from causalrt.measure.kernel_bench.timing import (
    Call,
    Captured,
    Samples,
    Spread,
    Timer,
    Work,
    judge,
    judge_all,
    machine,
    progress,
    ratio,
)
from causalrt.plugins.ptx import compile_kernel, default_cache
from causalrt.plugins.rope_attention_launch import MAX_KV_SPLITS, RopeAttentionPlan, Tiles

PLANS = ("balanced", "padded", "grouped")
COPY_FRACTION = 0.8
SDPA_RATIO = 1.15
LARGE_COPY_BYTES = 8 * 2**30
SMALL_COPY_BYTES = 2**20

TILES = tuple(
    Tiles(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
    for block_m, block_n, num_warps, num_stages in (
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 32, 8, 3),
        (128, 32, 4, 4),
        (64, 128, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 4),
    )
)

Sides = dict[str, list[Call]]
Checks = dict[str, Callable[[str, Captured], float]]
"""By side, a function that replays it, compares the outputs, and returns the largest error."""


def named(tiles: Tiles) -> str:
    """The name of tiles in tables."""
    return f"{tiles.block_m}x{tiles.block_n}, {tiles.num_warps} warps, {tiles.num_stages} stages"


def fastest(samples: Mapping[str, Samples], names: Iterable[str]) -> str | None:
    """The fastest of the sides that have times."""
    there = [name for name in names if name in samples]
    return min(there, key=lambda name: Spread.of(samples[name]).median) if there else None


class Bench:
    """One run, with a method for each section."""

    def __init__(
        self,
        options: KernelBenchOptions,
        config: Config,
        device: torch.device,
        *,
        keep: Callable[[Mapping[str, Any]], None] = lambda report: None,
    ) -> None:
        """Prepare a run for these options; `keep` is called with the report after each case."""
        self.options, self.base, self.device, self._keep = options, config, device, keep
        self.timer = Timer(device, repeats=options.repeats)
        self.report: dict[str, Any] = {
            "machine": machine(device),
            "options": asdict(options),
            "clocks": self.timer.clocks,
            "claims": [],
        }

    # -- sections

    def qk_norm_rope(self) -> None:
        """Measure the fused op, the unfused ops, and copies."""
        self.report["qk_norm_rope"] = entries = []
        for world_size in self.options.world_sizes:
            entries.append(self._rows_of_a_rank(world_size))
            self._keep(self.report)

    def _rows_of_a_rank(self, world_size: int) -> dict[str, Any]:
        case = QkNormRope(self._config(world_size))
        work = case.work
        progress(f"qk_norm_rope, P = {world_size}: {work.num_bytes / 1e6:.1f} MB")
        first = case.operands(self._random())
        sets = [first, *(first.clone() for _ in range(self._num_sets(work) - 1))]
        reference = case.reference(first)

        def check(name: str, captured: Captured) -> float:
            self._poison_and_replay(captured)
            return case.check(name, captured, reference)

        sides: Sides = case.sides(sets, compiled=self.options.compile)
        checks: Checks = dict.fromkeys(sides, check)
        sides = {name: self._repeated(calls, work) for name, calls in sides.items()}
        large = min(LARGE_COPY_BYTES, torch.cuda.mem_get_info()[0] // 2) if self.on_gpu else SMALL_COPY_BYTES
        copied = {"copy of its size": work.num_bytes, "large copy": large}
        same = case.copies(len(sets), work.num_bytes, self.device)
        sides |= {"copy of its size": self._repeated(same, work), "large copy": case.copies(1, large, self.device)}
        ready, known = self._settle(sides, checks, own=("kernel", *copied))
        known["kernel"]["host_us"] = self.timer.host_us(sides["kernel"][0])
        samples = self._measure(ready, known)
        for name in ready:
            if world_size > 1 or not name.endswith("as the step"):  # a side that does not pack moves less
                known[name]["gb_s"] = round(copied.get(name, work.num_bytes) / known[name]["ms"]["median"] / 1e6, 1)
        fractions = {}
        for name, moved in copied.items():
            fraction = ratio(samples[name], samples["kernel"], work.num_bytes / moved)
            fractions[name] = fraction.as_json()
            limit = ratio(samples["kernel"], samples[name], COPY_FRACTION * moved / work.num_bytes)
            text = f"qk_norm_rope, P = {world_size}: at least {COPY_FRACTION:.0%} of the bandwidth of a {name}"
            self._claim(text, judge(limit), f"{fraction} of {known[name]['gb_s']} GB/s")
        return {"P": world_size, "num_bytes": work.num_bytes, "sides": known, "of_copy": fractions}

    def rope_attention(self) -> None:
        """Measure the fused op in every form, and SDPA."""
        self.report["rope_attention"] = entries = []
        for world_size in self.options.world_sizes:
            by_form: dict[str, dict[int, Spread]] = {}
            for kv_rows in self.options.kv_lengths(self.base):
                entry, ratios = self._attention_of_a_rank(RopeAttention(self._config(world_size), kv_rows))
                entries.append(entry)
                self._keep(self.report)
                for form, spread in ratios.items():
                    by_form.setdefault(form, {})[kv_rows] = spread
            for form, found in by_form.items():
                if form.endswith("rotated"):  # more work than SDPA's
                    continue
                limits = [Spread(*(x / SDPA_RATIO for x in (s.median, s.p10, s.p90))) for s in found.values()]
                worst = max(found, key=lambda rows: found[rows].median)
                text = f"rope_attention, P = {world_size}, {form} slots: at most {SDPA_RATIO} of the fastest SDPA, any length"
                verdict = judge_all([judge(limit) for limit in limits])
                self._claim(text, verdict, f"at worst {found[worst]}, over {worst} keys")

    def _attention_of_a_rank(self, case: RopeAttention) -> tuple[dict[str, Any], dict[str, Spread]]:
        progress(f"rope_attention, P = {case.world_size}, {case.kv_rows} keys: {case.work.flops / 1e9:.1f} GFLOP")
        forms = self.options.forms
        sides, checks = self._attention_sides(case, forms)
        ready, known = self._settle(sides, checks, own=forms)
        for form in forms:
            known[form]["host_us"] = self.timer.host_us(sides[form][0])
        samples = self._measure(ready, known)
        best = fastest(samples, (name for name in sides if name not in forms))
        ratios = {form: ratio(samples[form], samples[best]) for form in forms} if best else {}
        for name in ready:
            known[name]["tflop_s"] = round(case.work.flops / known[name]["ms"]["median"] / 1e9, 1)
        progress("  " + ", ".join(f"{name} {known[name]['ms']['median']:.3f} ms" for name in ready))
        entry = {"P": case.world_size, "kv_rows": case.kv_rows, "flops": case.work.flops, "sides": known}
        entry |= {"best": best, "of_best": {form: spread.as_json() for form, spread in ratios.items()}}
        return entry, ratios

    def plans(self) -> None:
        """Measure all head plans at the most ranks and keys, by our kernel and by SDPA."""
        world_size, kv_rows = max(self.options.world_sizes), self.base.slot_rows
        if world_size == 1:
            progress("plans: needs more than one rank; name them with --world-sizes")
            return
        progress(f"plans, P = {world_size}, {kv_rows} keys")
        sides: Sides = {}
        checks: Checks = {}
        exchanged = {}
        for plan in PLANS:
            case = RopeAttention(self._config(world_size, plan), kv_rows)
            exchanged[plan] = case.layout.scatter_rows + case.layout.gather_rows
            found, their_checks = self._attention_sides(case, ["whole"])
            for name, calls in found.items():
                renamed = f"{plan}, {'kernel' if name == 'whole' else name}"
                sides[renamed], checks[renamed] = calls, their_checks[name]
        ready, known = self._settle(sides, checks, own=[f"{plan}, kernel" for plan in PLANS])
        samples = self._measure(ready, known)
        others: dict[str, str | None] = {}
        for plan in PLANS:
            name = "two SDPA calls" if plan == "balanced" else f"{plan} by SDPA"
            others[name] = fastest(samples, (side for side in sides if side.startswith(f"{plan}, sdpa")))
            others |= {f"{plan} by our kernel": f"{plan}, kernel"} if plan != "balanced" else {}
        ratios = {}
        for name, side in others.items():
            if side is not None:
                ratios[side] = ratio(samples["balanced, kernel"], samples[side])
                text = f"plans, P = {world_size}, {kv_rows} keys: balanced in one launch is faster than {name}"
                self._claim(text, judge(ratios[side]), f"{ratios[side]} of the time of {side}")
        winner = fastest(samples, ready)
        progress(f"  fastest: {winner}")
        self.report["plans"] = {
            "P": world_size,
            "kv_rows": kv_rows,
            "rows_exchanged": exchanged,
            "sides": known,
            "fastest": winner,
            "shares_of": {name: spread.as_json() for name, spread in ratios.items()},
        }

    def tune(self) -> None:
        """Measure the tiles of a short list that fit the device."""
        self.report["tune"] = entries = []
        for world_size in self.options.world_sizes:
            for form in self.options.tune or ["whole"]:
                fitting = self._fitting_tiles(RopeAttention(self._config(world_size), self.base.slot_rows), form)
                for kv_rows in self.options.kv_lengths(self.base):
                    case = RopeAttention(self._config(world_size), kv_rows)
                    plans = {named(tiles): case.plan(form, self.timer.facts, tiles=tiles) for tiles in fitting}
                    entries.append(self._sweep("tune", case, form, plans))

    def kv_splits(self) -> None:
        """Measure numbers of ranges of keys."""
        self.report["kv_splits"] = entries = []
        facts, numbers = self.timer.facts, self.options.kv_splits or range(1, MAX_KV_SPLITS + 1)
        for world_size in self.options.world_sizes:
            for kv_rows in self.options.kv_lengths(self.base):
                case = RopeAttention(self._config(world_size), kv_rows)
                plans = {str(number): case.plan("whole", facts, kv_splits=number) for number in numbers}
                chosen = case.plan("whole", facts).kv_splits
                entries.append(self._sweep("kv_splits", case, "whole", plans) | {"chosen": chosen})

    def _fitting_tiles(self, case: RopeAttention, form: str) -> list[Tiles]:
        """Tiles that compile without spills and fit shared memory; two small ones where kernels are interpreted."""
        if not self.on_gpu:
            return [Tiles(block_m=16, block_n=block_n, num_warps=4, num_stages=2) for block_n in (16, 32)]
        fitting, facts = [], self.timer.facts
        for tiles in TILES:
            launch = case.plan(form, facts, tiles=tiles).attend
            try:
                compiled = compile_kernel(launch, target=facts.capability, cache=default_cache())
            except KernelError as error:
                progress(f"  {named(tiles)}: {str(error).splitlines()[0][:200]}")
                continue
            fits = compiled.spill_bytes == 0 and compiled.shared_bytes <= facts.shared_bytes
            progress(
                f"  {named(tiles)}: {compiled.registers} registers, {compiled.spill_bytes} bytes spilled, "
                f"{compiled.shared_bytes // 1024} KiB shared{'' if fits else ': left out'}"
            )
            fitting += [tiles] if fits else []
        return fitting

    def _sweep(
        self, section: str, case: RopeAttention, form: str, plans: Mapping[str, RopeAttentionPlan]
    ) -> dict[str, Any]:
        """Measure several launch plans of one case side by side."""
        given = case.operands(self._random())[form]
        sets = [given, *(given.clone() for _ in range(self._num_sets(case.work) - 1))]
        check = self._kernel_check(case, given, case.reference(given))
        sides: Sides = {
            name: self._repeated([case.planned(one, plan) for one in sets], case.work) for name, plan in plans.items()
        }
        ready, known = self._settle(sides, dict.fromkeys(sides, check), own=sides)
        samples = self._measure(ready, known)
        best = fastest(samples, ready)
        times = "; ".join(f"{name}: {known[name]['ms']['median']:.3f} ms" for name in ready)
        progress(f"{section}, P = {case.world_size}, {form}, {case.kv_rows} keys: best {best}  [{times}]")
        return {"P": case.world_size, "form": form, "kv_rows": case.kv_rows, "best": best, "sides": known}

    # -- sides of attention

    def _attention_sides(self, case: RopeAttention, forms: Sequence[str]) -> tuple[Sides, Checks]:
        """The fused op in these forms, and every back end of SDPA over prepared keys and values."""
        made, count = case.operands(self._random()), self._num_sets(case.work)
        names = BACKENDS if self.on_gpu else {"flash": BACKENDS["flash"]}
        ready = [case.heads_slow(made["whole"]) for _ in range(count)]
        references = {False: case.reference(made["whole"])}
        sides: Sides = {}
        checks: Checks = {}
        for form in forms:
            rotated = form.endswith("rotated")
            if rotated not in references:
                references[rotated] = case.reference(made["whole-rotated"])
            sets = [made[form], *(made[form].clone() for _ in range(count - 1))]
            sides[form] = [case.kernel(given) for given in sets]
            checks[form] = self._kernel_check(case, made[form], references[rotated])

        def check(name: str, captured: Captured) -> float:
            self._poison_and_replay(captured)
            return case.check(name, captured, references[False], kernel=False)

        for name, backend in names.items():
            sides[f"sdpa {name}"] = [case.sdpa(parts, backend) for parts in ready]
            checks[f"sdpa {name}"] = check
        return {name: self._repeated(calls, case.work) for name, calls in sides.items()}, checks

    def _kernel_check(
        self, case: RopeAttention, given: Slots, reference: Sequence[torch.Tensor]
    ) -> Callable[[str, Captured], float]:
        """A check of outputs, of staging, and of memory that must not be written."""
        before = given.clone() if self.options.check else given

        def check(name: str, captured: Captured) -> float:
            case.poison(given)
            self._poison_and_replay(captured)
            error = case.check(name, captured, reference, kernel=True)
            case.check_slots(name, given, before)
            return error

        return check

    # -- common to all sections

    @property
    def on_gpu(self) -> bool:
        """Whether it is a CUDA device."""
        return self.device.type == "cuda"

    def _config(self, world_size: int, plan: str = "balanced") -> Config:
        return override(self.base, {"build.world_size": str(world_size), "build.head_plan": plan})

    def _random(self) -> Random:
        return Random(self.device, TORCH_DTYPES[self.base.build.precision])

    def _num_sets(self, work: Work) -> int:
        return work.num_sets(self.timer.facts)

    def _repeated(self, calls: Sequence[Call], work: Work) -> list[Call]:
        """Repeat calls until there are as many as a graph should hold."""
        return list(calls) * (work.num_calls(self.timer.facts) // len(calls) if self.on_gpu else 1)

    def _poison_and_replay(self, captured: Captured) -> None:
        """Fill the outputs with NaN and replay, so that values that are not written show."""
        for tensor in captured.tensors():
            tensor.fill_(math.nan)
        captured.replay()

    def _settle(
        self, sides: Sides, checks: Checks, own: Collection[str]
    ) -> tuple[dict[str, Captured], dict[str, dict[str, Any]]]:
        """Capture and check all sides; those not in `own` are left out when they fail, with the reason.

        Returns:
            The captured sides, and the facts about each side.
        """
        ready: dict[str, Captured] = {}
        known: dict[str, dict[str, Any]] = {name: {} for name in sides}
        if self.on_gpu:
            torch.cuda.empty_cache()
        for name, calls in sides.items():
            try:
                captured = self.timer.capture(calls)
                if self.options.check and name in checks:
                    known[name]["error"] = float(f"{checks[name](name, captured):.3g}")
                ready[name] = captured
            except Exception as error:
                if name in own:
                    raise
                known[name]["left out"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
                progress(f"  {name} is left out: {known[name]['left out'].splitlines()[0]}")
        return ready, known

    def _measure(self, ready: Mapping[str, Captured], known: dict[str, dict[str, Any]]) -> dict[str, Samples]:
        """Measure all sides, and add their times to `known`."""
        samples = self.timer.measure(ready)
        for name, times in samples.items():
            known[name]["ms"] = Spread.of(times).as_json()
        return samples

    def _claim(self, text: str, verdict: str, figure: str) -> None:
        self.report["claims"].append({"claim": text, "verdict": verdict, "figure": figure})
        progress(f"  {verdict}: {text}: {figure}")
