"""Run a part in a process of its own, which is killed with everything that it has started when its time is over.

run_part (in gpu-day)  --- python -m causalrt.measure.gpu_day.runner MODULE RECORD SETTINGS --->  main (in the process)
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from causalrt.child_python import python_command, python_environment
from causalrt.engines.streams import own_stream
from causalrt.measure.gpu_day.parts import Part
from causalrt.measure.gpu_day.recorder import Recorder, Settings, SkippedError, one_line

POLL_S = 0.05
REPORT_S = 1.0
LOG_TAIL_LINES = 40
LOG_TAIL_BYTES = 2**16


Status = Literal["waiting", "running", "done", "failed", "timed out", "skipped", "interrupted"]


@dataclass(kw_only=True, slots=True)
class Outcome:
    """The outcome of a part; `record` has its findings (see `recorder.Record`), `log_tail` the end of its log if it failed."""

    name: str
    summary: str
    status: Status = "waiting"
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    log_tail: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def run_part(
    part: Part, outcome: Outcome, settings: Settings, *, limit_s: float, on_change: Callable[[], None]
) -> None:
    """Run a part, and kill its process group after `limit_s` seconds; `on_change` is called when `outcome` has changed."""
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
                [*python_command(__name__), part.module, str(record), settings.as_text()],
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
    """Whether the process ends by itself in time. It is not reaped yet, so that its id still names its process group."""
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
    """Kill what is left of the process group, which includes everything that the part has started."""
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
    """Take over the record that the part has written, and return whether it has changed."""
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


# ---- in the process of the part


def _end_with_parent() -> None:
    """Kill this process group when the parent, which holds the other end of stdin, has ended."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the part, and return the exit code; the record says how it went."""
    module, record, settings = sys.argv[1:]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    recorder = Recorder(Settings.from_text(settings), Path(record))
    recorder.save()
    try:
        if recorder.device.type == "cuda":
            torch.cuda.set_device(recorder.device)
        with own_stream(recorder.device):
            importlib.import_module(module).run(recorder)
    except SkippedError as reason:
        recorder.record.skipped = str(reason)
    except Exception as error:
        traceback.print_exc()
        recorder.record.error = one_line(error)
    recorder.save()
    sys.stdout.flush()
    sys.stderr.flush()
    return 1 if recorder.record.error else 0


if __name__ == "__main__":
    os._exit(main())  # unloading CUDA libraries would take seconds of the budget, and may crash
