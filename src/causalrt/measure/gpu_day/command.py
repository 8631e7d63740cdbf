"""`causalrt gpu-day`: run the parts in order, each up to its time limit or the end of the budget, and report after each."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from causalrt.errors import ExecutorError, Faults, RequestError
from causalrt.measure.bench.machine import describe_machine
from causalrt.measure.gpu_day.arguments import GpuDayRequest
from causalrt.measure.gpu_day.parts import PARTS, Part
from causalrt.measure.gpu_day.recorder import Settings
from causalrt.measure.gpu_day.report import JSON_FILE, TEXT_FILE, Report
from causalrt.measure.gpu_day.runner import Outcome, run_part
from causalrt.owned_paths import TemporaryFolder
from causalrt.tools.files import check_writable_in, make_folder

GOLDEN = Path(__file__).parents[4] / "tests" / "data" / "golden"
"""Recorded rollouts in a source tree; an installed package has none."""
RESERVE_S = 2.0
"""Seconds of the budget that are kept for the end of a part and the report."""
DRY_RUN_PATIENCE = 4.0
"""Factor by which a part may take longer in a dry run, where the CPU is slow and may be shared."""


def run(request: GpuDayRequest, *, version: str, write: Callable[[str], None], on_stage: Callable[[str], None]) -> bool:
    """Run the command.

    Returns:
        Whether no part failed.

    Raises:
        RequestError: the budget is not a positive number, or the report cannot be written.
        ExecutorError: torch sees no GPU, and this is no dry run.
    """
    chosen = [part for part in PARTS if request.parts is None or part.name in request.parts]
    if request.list:
        if request.json:
            write(json.dumps([{"name": part.name, "summary": part.summary} for part in chosen]))
        for part in chosen if not request.json else ():
            write(f"{part.name:10}{part.summary}")
        return True
    _check(request)
    make_folder(request.out)
    _remove_earlier(request.out)
    report = run_day(
        chosen,
        out=request.out,
        golden=request.golden or GOLDEN,
        budget_s=request.budget,
        dry_run=request.dry_run,
        version=version,
        on_stage=on_stage,
    )
    write(json.dumps(report.as_dict()) if request.json else f"{request.out / TEXT_FILE}")
    return not report.failed


def _check(request: GpuDayRequest) -> None:
    faults = Faults()
    with faults:
        if not (math.isfinite(request.budget) and request.budget > 0):
            raise RequestError(f"--budget must be a positive number of seconds, got {request.budget}")
    with faults:
        if not request.dry_run and not torch.cuda.is_available():
            raise ExecutorError(
                "torch sees no CUDA device here; `causalrt doctor` says why, and --dry-run tries the parts on the CPU"
            )
    with faults:
        if request.golden is not None and not request.golden.is_dir():
            raise RequestError(f"--golden {request.golden} is no folder; give the one with B.safetensors in it")
    with faults:
        check_writable_in(request.out, (JSON_FILE, TEXT_FILE))
    faults.report()


def _remove_earlier(out: Path) -> None:
    """Remove the files that an earlier report in this folder names, which would be taken for files of this one."""
    try:
        parts = json.loads((out / JSON_FILE).read_text())["parts"]
        names = [name for part in parts for name in part["record"].get("files", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name in names:
        if isinstance(name, str) and Path(name).name == name:
            (out / name).unlink(missing_ok=True)


def run_day(
    parts: Sequence[Part],
    *,
    out: Path,
    golden: Path,
    budget_s: float,
    dry_run: bool,
    version: str,
    on_stage: Callable[[str], None],
) -> Report:
    """Run parts one after another until the budget is used up; the report is on disk after each."""
    until = time.monotonic() + budget_s
    outcomes = [Outcome(name=part.name, summary=part.summary) for part in parts]
    asked = {"version": version, "dry_run": dry_run, "budget_s": budget_s}
    report = Report(out, outcomes, asked=asked, machine=describe_machine("cpu"))
    with TemporaryFolder("gpuday") as work:
        settings = Settings(out=out.absolute(), work=work, golden=golden.absolute(), dry_run=dry_run)
        try:
            for part, outcome in zip(parts, outcomes, strict=True):
                left = until - time.monotonic() - RESERVE_S
                limit_s = min(part.limit_s * (DRY_RUN_PATIENCE if dry_run else 1.0), left)
                if left < part.least_s:
                    outcome.status = "skipped"
                    outcome.reason = f"it needs at least {part.least_s:g} s, and {max(0.0, left):.0f} s were left"
                else:
                    on_stage(f"{part.name}: {part.summary} (at most {limit_s:.0f} s)")
                    run_part(part, outcome, settings, limit_s=limit_s, on_change=report.write)
                    report.draw(outcome)
                report.write()
                remark = f": {outcome.reason}" if outcome.reason else ""
                on_stage(f"{part.name}: {outcome.status} after {outcome.seconds:.0f} s{remark}")
            report.state = "finished"
        except BaseException:
            report.state = "interrupted"
            raise
        finally:
            report.write()
    return report
