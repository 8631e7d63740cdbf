"""Print the findings of `doctor` on a terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

INDENT = (0, 0, 0, 2)


def print_page(found: Mapping[str, Any], console: Console, *, version: str) -> None:
    """Print all sections; the last one says what to do next.

    Args:
        found: the result of `doctor.examine`.
        console: console to print on.
        version: version of CausalRT.
    """
    console.print(f"CausalRT {version} on this machine", style="bold", highlight=False)
    _section(console, "Machine", _machine_rows(found["machine"], found["extras"]))
    _section(console, "GPUs", _gpu_rows(found["gpus"], found["machine"]["torch"]))
    answers = found["can"].items()
    _section(console, "What works", ((name, f"{_yes(one['ok'])}: {one['detail']}") for name, one in answers))
    advice = found["next"]
    console.print("\nWhat next", style="bold", highlight=False)
    _paragraph(console, advice["summary"])
    for problem in advice["problems"]:
        _paragraph(console, f"Problem: {problem}.")
    _paragraph(console, "Type:")
    for step in advice["commands"]:
        # A command stays on one line, so that it can be copied.
        console.print(f"    {step['command']}", style="bold", highlight=False, soft_wrap=True)
        console.print(Padding(Text(step["purpose"]), (0, 0, 0, 8), expand=False))


def _section(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    console.print(f"\n{title}", style="bold", highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(Padding(table, INDENT, expand=False))


def _paragraph(console: Console, text: str) -> None:
    console.print(Padding(Text(text), INDENT, expand=False))


def _machine_rows(machine: Mapping[str, Any], extras: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "system", machine["platform"]
    quota = (
        ""
        if machine["cpu_quota"] is None
        else f", of which a control group grants the time of {machine['cpu_quota']:g}"
    )
    yield "processors", f"{machine['cores']}{quota}; threads that are used: {machine['threads']}"
    limit = "" if machine["memory_limit_gib"] is None else f", a control group allows {machine['memory_limit_gib']} GiB"
    yield "memory", f"{_gib(machine['memory_available_gib'])} free{limit}"
    yield "/dev/shm", _gib(machine["shared_memory_gib"])
    yield "Python", f"{machine['python']}, numpy {machine['numpy']}"
    yield "compilers", f"C: {machine['c_compiler'] or 'none'}, C++: {machine['cpp_compiler'] or 'none'}"
    yield "Triton", machine["triton"] or "not installed"
    yield "video", f"PyAV {machine['pyav'] or 'not installed'}, program ffmpeg: {machine['ffmpeg'] or 'none'}"
    for extra, lacking in extras.items():
        yield f"extra {extra}", f"lacks {', '.join(lacking)}" if lacking else "complete"


def _gpu_rows(gpus: Mapping[str, Any], torch: str) -> Iterable[tuple[str, str]]:
    yield "driver", gpus["driver"] or "none found"
    needs = f", needs driver {gpus['needed_driver']} or newer" if gpus["needed_driver"] else ""
    yield "torch", f"{torch}, {'CUDA ' + gpus['torch_cuda'] if gpus['torch_cuda'] else 'a build without CUDA'}{needs}"
    yield "NCCL", gpus["nccl"] or "none in this torch"
    if not gpus["found"]:
        yield "GPUs", f"{gpus['counted']} by NVML, none usable" if gpus["counted"] else "none"
        return
    for gpu in gpus["found"]:
        state = gpu["fault"] or f"{gpu['free_gib']} of {gpu['total_gib']} GiB free"
        yield f"GPU {gpu['index']}", f"{gpu['name']} ({gpu['target']}), {state}"
    if len(gpus["found"]) > 1:
        apart = gpus["without_peer_access"]
        yield "peer access", f"not between {len(apart)} pairs" if apart else "between all that work"
    yield "MPS", gpus["mps"] or "unknown"


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size} GiB"


def _yes(ok: bool) -> str:
    return "yes" if ok else "no"
