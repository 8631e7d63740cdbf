"""`causalrt gpu-day`: the parts in order, each as long as it wishes or as is left, and the report after each."""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from causalrt.errors import ExecutorError, Faults, RequestError
from causalrt.measure.bench.machine import describe_machine
from causalrt.measure.gpu_day.book import Settings
from causalrt.measure.gpu_day.parts import PARTS, Part
from causalrt.measure.gpu_day.report import JSON_FILE, TEXT_FILE, Report
from causalrt.measure.gpu_day.runner import Outcome, run_part
from causalrt.owned_paths import TemporaryFolder
from causalrt.tools.files import check_writable_in, make_folder

GOLDEN = Path(__file__).parents[4] / "tests" / "data" / "golden"
"""Where a source tree has the recorded rollouts; an installed package has none."""
RESERVE_S = 2.0
"""Seconds of the budget that are left for the end of a part and the report."""
DRY_RUN_PATIENCE = 4.0
"""How many times its wish a part may take in a dry run, where the CPU is slow and may be shared."""


def run(
    arguments: argparse.Namespace, *, version: str, write: Callable[[str], None], on_stage: Callable[[str], None]
) -> bool:
    """Run the command.

    Args:
        arguments: see `arguments.py`.
        version: of the package.
        write: takes what is printed.
        on_stage: takes a line when a part begins or ends.

    Returns:
        Whether no part failed.

    Raises:
        RequestError: the budget is not a positive number, or the report cannot be written.
        ExecutorError: torch sees no GPU, and this is no dry run.
    """
    chosen = [part for part in PARTS if arguments.parts is None or part.name in arguments.parts]
    if arguments.list:
        if arguments.json:
            write(json.dumps([{"name": part.name, "summary": part.summary} for part in chosen]))
        for part in chosen if not arguments.json else ():
            write(f"{part.name:10}{part.summary}")
        return True
    faults = Faults()
    with faults:
        if not (math.isfinite(arguments.budget) and arguments.budget > 0):
            raise RequestError(f"--budget must be a positive number of seconds, got {arguments.budget}")
    with faults:
        if not arguments.dry_run and not torch.cuda.is_available():
            raise ExecutorError(
                "torch sees no CUDA device here; `causalrt doctor` says why, and --dry-run tries the parts on the CPU"
            )
    with faults:
        if arguments.golden is not None and not arguments.golden.is_dir():
            raise RequestError(f"--golden {arguments.golden} is no folder; give the one with B.safetensors in it")
    with faults:
        check_writable_in(arguments.out, (JSON_FILE, TEXT_FILE))
    faults.report()
    make_folder(arguments.out)
    _remove_earlier(arguments.out)
    report = run_day(
        chosen,
        out=arguments.out,
        golden=arguments.golden or GOLDEN,
        budget_s=arguments.budget,
        dry_run=arguments.dry_run,
        version=version,
        on_stage=on_stage,
    )
    if arguments.json:
        write(json.dumps(report.as_dict()))
    else:
        write(f"{arguments.out / TEXT_FILE}")
    return not report.failed


def _remove_earlier(out: Path) -> None:
    """Remove the files that an earlier report in this folder names, so that nobody takes them for this one's."""
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
    """Run parts one after another until the budget is used up; the report is on disk after each.

    Args:
        parts: in order.
        out: an existing folder.
        golden: the folder of recorded rollouts.
        budget_s: seconds for all parts together.
        dry_run: on the CPU, at the smallest size.
        version: of the package.
        on_stage: takes a line when a part begins or ends.
    """
    until = time.monotonic() + budget_s
    outcomes = [Outcome(name=part.name, summary=part.summary) for part in parts]
    asked = {"version": version, "dry_run": dry_run, "budget_s": budget_s}
    report = Report(out, outcomes, asked=asked, machine=describe_machine("cpu"))
    with TemporaryFolder("gpuday") as work:
        settings = Settings(out=out.absolute(), work=work, golden=golden.absolute(), dry_run=dry_run)
        try:
            for part, outcome in zip(parts, outcomes, strict=True):
                left = until - time.monotonic() - RESERVE_S
                limit_s = min(part.wish_s * (DRY_RUN_PATIENCE if dry_run else 1.0), left)
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
