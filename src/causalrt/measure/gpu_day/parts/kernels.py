"""The fused kernels at the sizes of the 1.3B model: compared with float64 first, then timed beside SDPA and copies."""

from collections.abc import Mapping
from typing import Any

import torch

from causalrt.config import Config, override
from causalrt.errors import KernelError
from causalrt.measure.gpu_day.predictions import Planner, columns, planner_for
from causalrt.measure.gpu_day.recorder import Recorder, SkippedError
from causalrt.plugins.kernel_launch import require_triton
from causalrt.recipes import recipe

SECTIONS = ("qk_norm_rope", "rope_attention")
ROWS, ATTENTION = SECTIONS


def run(recorder: Recorder) -> None:
    """Measure each section on each number of ranks; a wrong kernel ends only its own section.

    Raises:
        SkippedError: Triton is missing.
    """
    try:
        require_triton()
    except KernelError as error:
        raise SkippedError(str(error)) from error
    from causalrt.measure.kernel_bench.cases import KernelBenchOptions, interpreted  # these import Triton
    from causalrt.measure.kernel_bench.sections import Bench

    subject = "The fused kernels"
    if recorder.dry_run and interpreted():
        recorder.note("The kernels are interpreted by Triton, over as few rows as there can be.")
    elif recorder.dry_run:
        subject = "The references of the fused kernels"
        recorder.note("References stand in for the kernels: Triton 3.6's interpreter fails with numpy 2.4 and newer.")

    planner, config = planner_for(recorder), _config(recorder)
    merged: dict[str, Any] = {"claims": [], **{section: [] for section in SECTIONS}}
    with torch.no_grad():
        for section in SECTIONS:
            for world_size in (2,) if recorder.dry_run else (1, 8):
                before = list(merged[section])

                def keep(report: Mapping[str, Any], section: str = section, before: list[Any] = before) -> None:
                    merged.update(machine=report["machine"], options=report["options"])
                    merged[section] = [*before, *report[section]]
                    _write(recorder, merged, config, planner, subject)

                with recorder.attempt(f"{section}, {world_size} rank(s)"):
                    options = KernelBenchOptions(
                        **_options(recorder, config), world_sizes=[world_size], sections=[section]
                    )
                    bench = Bench(options, config, recorder.device, keep=keep)
                    getattr(bench, section)()
                    merged["claims"] += bench.report["claims"]
                    _write(recorder, merged, config, planner, subject)


def _config(recorder: Recorder) -> Config:
    return recipe("tiny") if recorder.dry_run else override(recipe("wan_1_3b_480p"), {"build.precision": "bfloat16"})


def _options(recorder: Recorder, config: Config) -> dict[str, Any]:
    chunk, dry_run = config.tokens_per_chunk, recorder.dry_run
    return {
        "recipe": "tiny" if dry_run else "wan_1_3b_480p",
        "dtype": "fp32" if dry_run else "bf16",
        "forms": ["whole", "prefix"],
        "kv_rows": [2 * chunk] if dry_run else [chunk, 4 * chunk, config.slot_rows],
        "repeats": 2 if dry_run else 20,
        "compile": not dry_run,
    }


def _write(recorder: Recorder, merged: Mapping[str, Any], config: Config, planner: Planner, subject: str) -> None:
    """Record all tables again, and the data of the picture."""
    rows = [
        {
            "ranks": entry["P"],
            "side": name,
            **_figures(side),
            "GB/s": side.get("gb_s"),
            **(columns(planner.copy_gb_s(), "GB/s") if name == "large copy" else {}),
        }
        for entry in merged[ROWS]
        for name, side in entry["sides"].items()
    ]
    attention = [
        {
            "ranks": entry["P"],
            "keys": entry["kv_rows"],
            "side": name,
            **_figures(side),
            "TFLOP/s": side.get("tflop_s"),
            "of fastest SDPA": entry["of_best"].get(name, {}).get("median"),
            **columns(_attention(planner, config, entry) if name in entry["of_best"] else None),
        }
        for entry in merged[ATTENTION]
        for name, side in entry["sides"].items()
    ]
    claims = [] if recorder.dry_run else merged["claims"]  # times of an interpreter mean nothing
    tables = {ROWS: rows, ATTENTION: attention, "claims": claims}
    recorder.record.tables = {title: found for title, found in tables.items() if found}
    for name, value in merged.items():
        recorder.record.data[name] = value
    errors = [row["error"] for row in (*rows, *attention) if row["side"] in ("kernel", "whole", "prefix")]
    ratios = [row["of fastest SDPA"] for row in attention if row["side"] == "whole" and row["of fastest SDPA"]]
    said = f"{subject} agree with float64 (largest relative error {max(errors):.1e})"
    if ratios and not recorder.dry_run:
        said += f" and take {min(ratios):.2f} to {max(ratios):.2f} of the time of the fastest SDPA"
    recorder.headline("kernels", f"{said}.")


def _figures(side: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ms": side.get("ms", {}).get("median"),
        "error": side.get("error"),
        "host us": side.get("host_us"),
        "left out": side.get("left out"),
    }


def _attention(planner: Planner, config: Config, entry: Mapping[str, Any]) -> Any:
    ranks = {"build.world_size": str(entry["P"])}
    return planner.attention(override(config, ranks), kv_rows=entry["kv_rows"])
