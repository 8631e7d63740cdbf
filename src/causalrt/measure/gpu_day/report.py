"""The report of a GPU day: `gpu.json` for programs, `gpu.md` for people, and pictures of the figures of parts."""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from causalrt.atomic_files import atomic_file
from causalrt.measure.bench.machine import Machine
from causalrt.measure.gpu_day.runner import Outcome
from causalrt.tools.files import write_whole

JSON_FILE, TEXT_FILE = "gpu.json", "gpu.md"


def _draw_kernels(data: Mapping[str, Any], path: Path) -> None:
    from causalrt.measure.kernel_bench.picture import plot

    plot(data, path)


def _draw_steps(data: Mapping[str, Any], path: Path) -> None:
    """Draw the time of a chunk step over the filled KV rows: measured by side, and predicted by the planner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    times, ratios = figure.subplots(1, 2)
    for number, (side, rows) in enumerate(data["sides"].items()):
        keys, colour = [row["KV rows"] for row in rows], f"C{number}"
        times.plot(keys, [row["ms"] for row in rows], marker="o", color=colour, label=side)
        ratios.plot(keys, [row["of eager"] for row in rows], marker="o", color=colour, label=side)
        predicted = [row["predicted ms"] for row in rows]
        if None not in predicted:
            times.plot(keys, predicted, linestyle=":", color=colour, label=f"{side}, predicted")
    times.set(title="a chunk step", xlabel="filled KV rows", ylabel="milliseconds (median)", ylim=(0, None))
    ratios.set(title="relative to the time of eager, in the same run", xlabel="filled KV rows", ylim=(0, None))
    for ax in (times, ratios):
        ax.grid(visible=True, alpha=0.3)
        ax.legend(fontsize=8)
    figure.suptitle(data["title"])
    figure.savefig(path, format="png", dpi=110)


PICTURES: Mapping[str, tuple[str, Callable[[Mapping[str, Any], Path], None]]] = {
    "kernels": ("kernels.png", _draw_kernels),
    "steps": ("steps.png", _draw_steps),
}
"""By part, the file of its picture, and the function that draws it from the data of the part."""


class Report:
    """The outcomes of all parts; `write` may be called at any time.

    Attributes:
        outcomes: outcomes of the parts, in order.
        state: `running`, `finished` or `interrupted`.
    """

    def __init__(self, out: Path, outcomes: Sequence[Outcome], *, asked: Mapping[str, Any], machine: Machine) -> None:
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
            "machine": asdict(self._machine),
            "parts": [asdict(outcome) for outcome in self.outcomes],
        }

    def write(self) -> None:
        """Write both files, each in one step; the text is never behind the JSON."""
        found = self.as_dict()
        write_whole(self._out / TEXT_FILE, as_markdown(found).encode())
        write_whole(self._out / JSON_FILE, json.dumps(found, indent=1).encode())

    def draw(self, outcome: Outcome) -> None:
        """Draw the picture of a part that has one and has recorded data; a failure is noted in its record."""
        name, draw = PICTURES.get(outcome.name, (None, None))
        if name is None or draw is None or not outcome.record.get("data"):
            return
        try:
            with atomic_file(self._out / name) as partial:
                draw(outcome.record["data"], partial)
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
            "finds out": part["summary"],
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
    """Rows as a Markdown table with a column for each key, in the order in which keys first occur."""
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
