"""The report of a GPU day: `gpu.json` for programs, `gpu.md` for people, and pictures drawn from the parts' figures."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from causalrt.measure.gpu_day.pictures import draw_kernels, draw_steps
from causalrt.measure.gpu_day.runner import Outcome
from causalrt.tools.files import write_whole

JSON_FILE, TEXT_FILE = "gpu.json", "gpu.md"
PICTURES: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Path], None]]] = {
    "kernels": ("kernels.png", draw_kernels),
    "steps": ("steps.png", draw_steps),
}
"""By part: the file, and what draws it from the part's data."""


class Report:
    """All outcomes, and what was asked for; `write` may be called at any time.

    Attributes:
        outcomes: of every part, in order.
        state: `running`, `finished` or `interrupted`.
    """

    def __init__(
        self, out: Path, outcomes: Sequence[Outcome], *, asked: Mapping[str, Any], machine: Mapping[str, Any]
    ) -> None:
        self._out, self._asked, self._machine = out, asked, machine
        self._start, self._began = time.monotonic(), time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self.outcomes = outcomes
        self.state = "running"

    @property
    def failed(self) -> bool:
        """Whether a part failed or did not end in time."""
        return any(outcome.status in ("failed", "timed out") for outcome in self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """The contents of `gpu.json`."""
        return {
            "state": self.state,
            "began": self._began,
            "seconds": round(time.monotonic() - self._start, 1),
            **self._asked,
            "machine": dict(self._machine),
            "parts": [asdict(outcome) for outcome in self.outcomes],
        }

    def write(self) -> None:
        """Write both files, each whole."""
        found = self.as_dict()
        write_whole(self._out / JSON_FILE, json.dumps(found, indent=1).encode())
        write_whole(self._out / TEXT_FILE, as_markdown(found).encode())

    def draw(self, outcome: Outcome) -> None:
        """Draw a part's picture, if it has one and there is something to draw; a failure to do so is noted."""
        name, draw = PICTURES.get(outcome.name, (None, None))
        if name is None or draw is None or not outcome.record.get("data"):
            return
        try:
            draw(outcome.record["data"], self._out / name)
            outcome.record["files"].append(name)
        except Exception as error:  # a picture is not worth losing the figures for
            outcome.record["notes"].append(f"no picture: {type(error).__name__}: {error}")


def as_markdown(found: Mapping[str, Any]) -> str:
    """The report for people."""
    parts = found["parts"]
    title = "# GPU day, a dry run on a CPU" if found["dry_run"] else "# GPU day"
    lines = [title, "", _headline(found), "", *_summary(parts)]
    for part in parts:
        lines += _section(part)
    return "\n".join(lines) + "\n"


def _headline(found: Mapping[str, Any]) -> str:
    parts = found["parts"]
    counts: dict[str, list[str]] = {}
    for part in parts:
        counts.setdefault(part["status"], []).append(part["name"])
    said = "; ".join(f"{len(names)} {status} ({', '.join(names)})" for status, names in counts.items())
    sentences = [
        f"CausalRT {found['version']}, {found['began']}, {found['seconds']:.0f} of {found['budget_s']:g} s, "
        f"{found['state']}: {said}."
    ]
    for part in parts:
        sentences += part["record"].get("headline", {}).values()
    return " ".join(sentences)


def _summary(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        {
            "part": part["name"],
            "status": part["status"],
            "seconds": part["seconds"],
            "what it tells": part["summary"],
            "remark": part["reason"],
        }
        for part in parts
    ]
    return markdown_table(rows)


def _section(part: Mapping[str, Any]) -> list[str]:
    record = part["record"]
    if not record and not part["log_tail"]:
        return []
    lines = ["", f"## {part['name']}: {part['status']}", ""]
    lines += [f"- **wrong**: {text}" for text in record.get("wrong", ())]
    lines += [f"- {name}: {shown(value)}" for name, value in record.get("facts", {}).items()]
    lines += [f"- {text}" for text in record.get("notes", ())]
    for title, rows in record.get("tables", {}).items():
        lines += ["", f"### {title}", "", *markdown_table(rows)]
    for name in record.get("files", ()):
        lines += ["", f"![{name}]({name})" if name.endswith(".png") else f"[{name}]({name})"]
    if part["log_tail"]:
        lines += ["", "Its last lines:", "", "```", part["log_tail"].replace("```", "'''"), "```"]
    return lines


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a table; a column for each key, in the order in which keys first occur."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    right = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    return [
        _line(columns),
        _line("---:" if number else "---" for number in right),
        *(_line(shown(row.get(column)) for column in columns) for row in rows),
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def shown(value: Any) -> str:
    """A value in a table: four digits of a number, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    return str(value)
