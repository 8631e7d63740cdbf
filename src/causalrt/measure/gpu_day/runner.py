"""A part in a process of its own, which is ended with all that it has started when its time is over."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causalrt.child_python import python_command, python_environment
from causalrt.measure.gpu_day.book import Settings
from causalrt.measure.gpu_day.parts import Part

POLL_S = 0.05
REPORT_S = 1.0
LOG_TAIL_LINES = 40
LOG_TAIL_BYTES = 2**16


@dataclass(kw_only=True, slots=True)
class Outcome:
    """How a part went.

    Attributes:
        name: of the part.
        summary: what it tells.
        status: `waiting`, `running`, `done`, `failed`, `timed out`, `skipped` or `interrupted`.
        reason: why it was skipped, or how it ended.
        seconds: that it took.
        limit_s: seconds that it was given.
        log_tail: last lines of what its process wrote, unless the part is done.
        record: what it found (see `book.Record`).
    """

    name: str
    summary: str
    status: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    log_tail: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def run_part(
    part: Part, outcome: Outcome, settings: Settings, *, limit_s: float, on_change: Callable[[], None]
) -> None:
    """Run a part, and write how it went to `outcome`.

    Args:
        part: what to run.
        outcome: of the part; its record follows what the part writes down.
        settings: for the part.
        limit_s: seconds after which its process and all of the same process group are killed.
        on_change: called whenever the outcome has changed.
    """
    record, log = settings.work / f"{part.name}.json", settings.work / f"{part.name}.log"
    outcome.status, outcome.limit_s = "running", round(limit_s, 1)
    on_change()
    start = time.monotonic()
    environment = python_environment(
        PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1", **(part.dry_environment() if settings.dry_run else {})
    )
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*python_command("causalrt.measure.gpu_day.child"), part.module, str(record), settings.as_text()],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            ended = False
            try:
                ended = _wait(process, start + limit_s, lambda: _follow(outcome, record, start, on_change))
            finally:
                _end(process)
    except BaseException:
        _read_record(outcome, record)
        outcome.status, outcome.reason = "interrupted", "gpu-day was stopped while this part ran"
        raise
    finally:
        outcome.seconds = round(time.monotonic() - start, 1)
    _read_record(outcome, record)
    _judge(outcome, process.returncode, ended=ended)
    if outcome.status in ("failed", "timed out"):
        outcome.log_tail = _tail(log)
    on_change()


def _wait(process: "subprocess.Popen[bytes]", until: float, each: Callable[[], None]) -> bool:
    """Whether the process ends by itself in time. It is not reaped yet, so that its number still names its group."""
    reported = time.monotonic()
    while (now := time.monotonic()) < until:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return True
        if now - reported >= REPORT_S:
            reported = now
            each()
        time.sleep(min(POLL_S, max(0.0, until - now)))
    return False


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of the group; whatever the part has started and left behind is in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _follow(outcome: Outcome, record: Path, start: float, on_change: Callable[[], None]) -> None:
    if _read_record(outcome, record):
        outcome.seconds = round(time.monotonic() - start, 1)
        on_change()


def _read_record(outcome: Outcome, path: Path) -> bool:
    """Take over what the part has written; whether that is new."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    changed = found != outcome.record
    outcome.record = found
    return bool(changed)


def _judge(outcome: Outcome, code: int, *, ended: bool) -> None:
    record = outcome.record
    if not ended:
        outcome.status = "timed out"
        outcome.reason = f"stopped after {outcome.limit_s:g} s; what it had found until then is kept"
    elif code < 0:
        outcome.status, outcome.reason = "failed", f"its process was ended by {signal.Signals(-code).name}"
    elif record.get("error"):
        outcome.status, outcome.reason = "failed", record["error"]
    elif code != 0 or not record:
        outcome.status, outcome.reason = "failed", f"its process ended with exit code {code}"
    elif record["skipped"]:
        outcome.status, outcome.reason = "skipped", record["skipped"]
    elif record["wrong"]:
        outcome.status, outcome.reason = "failed", f"{len(record['wrong'])} result(s) are wrong"
    else:
        outcome.status = "done"


def _tail(log: Path) -> str:
    try:
        text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
