"""A certificate as JSON, as Markdown, as a picture and as a few lines of text, in a folder that is written atomically."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from causalrt.atomic_files import atomic_folder
from causalrt.errors import ExecutorError, RequestError
from causalrt.install_hint import install_extra
from causalrt.proof.certificate import Certificate, Series
from causalrt.proof.differences import Comparison, TensorError

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "certificate.json", "certificate.md", "certificate.png"
SCHEMA = 1
SHOWN_OPERATIONS = 12
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
MARKERS = ("o", "s", "^", "D")
LOWEST = 1e-9
"""The picture shows an error of zero as this."""


def check_target(target: Path) -> None:
    """Refuse to replace anything but a certificate.

    Raises:
        RequestError: something else is there.
    """
    if target.exists() and not (target / JSON_FILE).is_file():
        raise RequestError(f"{target} exists and is no certificate; it is not overwritten, choose another folder")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which replaces `target` if the block ends without an error, and is removed otherwise.

    Raises:
        RequestError: something other than a certificate is there, or the folder cannot be written.
    """
    target = target.absolute()
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target, replaces=JSON_FILE) as work:
            yield work
    except OSError as error:
        raise RequestError(
            f"cannot write a certificate to {target}, what was there is as it was: {error}; "
            "make room, or choose a writable folder"
        ) from error


def write_report(certificate: Certificate, folder: Path) -> None:
    """Write JSON, Markdown and picture."""
    draw(certificate, folder / PICTURE_FILE)
    (folder / JSON_FILE).write_text(json.dumps(as_plain(certificate), indent=1, allow_nan=False) + "\n")
    (folder / MARKDOWN_FILE).write_text(as_markdown(certificate))


def as_plain(certificate: Certificate) -> dict[str, Any]:
    """The certificate in JSON types; numbers that are not finite are strings."""
    plain: dict[str, Any] = _json(
        {
            "schema": SCHEMA,
            "passed": certificate.passed,
            "first_wrong": certificate.first_wrong,
            **certificate.subject,
            "tolerance": certificate.tolerance,
            "checks": [asdict(check) | {"passed": check.passed} for check in certificate.checks],
            "comparisons": [_plain_comparison(comparison) for comparison in certificate.comparisons],
            "bisected": certificate.bisected,
            "errors_by_chunk": {series.label: series.errors for series in certificate.series},
            "not_checked": [asdict(entry) for entry in certificate.not_checked],
            "polygraphy": certificate.polygraphy,
        }
    )
    return plain


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain_error(error: TensorError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    numbers = {"error": error.error, "got": error.got, "expected": error.expected}
    return {"tensor": error.name, **numbers, "index": error.index, **error.where}


def _plain_comparison(comparison: Comparison) -> dict[str, Any]:
    chunks: dict[int, float] = {}
    for error in comparison.errors:
        first, number, *_ = f"{error.name} 0".split()
        if first == "chunk":
            chunks[int(number)] = max(chunks.get(int(number), 0.0), error.error)
    return {
        "name": comparison.name,
        "reference": comparison.reference,
        "candidate": comparison.candidate,
        "rule": comparison.rule,
        "passed": comparison.passed,
        "faults": comparison.faults,
        "worst": _plain_error(comparison.worst),
        "worst_chunk": max(chunks, key=lambda chunk: chunks[chunk], default=None),
        "first_wrong": _plain_error(comparison.first_wrong),
        "figures": comparison.figures,
        "errors": {error.name: error.error for error in comparison.errors},
    }


def worst_text(comparison: Comparison) -> str:
    """The worst finding of a comparison in one line."""
    if comparison.faults:
        return comparison.faults[0]
    if comparison.figures:
        kind = max(comparison.figures, key=lambda name: comparison.figures[name]["rms_error"])
        found = comparison.figures[kind]
        return f"{kind}: rms {found['rms_error']:.2e}, eager's own {found['eager_rms_error']:.2e}"
    return comparison.worst.text() if comparison.worst is not None else "nothing to compare"


def verdict(passed: bool) -> str:
    """The verdict in one word."""
    return "passed" if passed else "FAILED"


def as_text(certificate: Certificate, out: Path | None) -> str:
    """The verdict, the worst finding of each comparison, the first failure, and the path of the certificate."""
    subject = certificate.subject
    bound = "eager's own error" if certificate.tolerance is None else f"tolerance {certificate.tolerance:.0e}"
    ran = f"{subject['executor']}, {subject['world_size']} rank(s), {subject['precision']}"
    lines = [f"{verdict(certificate.passed)}: {ran}, {bound}"]
    lines += [f"{check.name:11} {verdict(check.passed)}  {check.found}" for check in certificate.checks if check.passed]
    lines += [f"{check.name:11} FAILED  {check.faults[0]}" for check in certificate.checks if not check.passed]
    lines += [
        f"{comparison.name:11} {verdict(comparison.passed)}  {comparison.candidate}: {worst_text(comparison)}"
        for comparison in certificate.comparisons
    ]
    if certificate.bisected is not None:
        found = certificate.bisected
        title = "largest at" if certificate.passed else "leaves at"
        lines.append(f"{title:11} {found['part']}, made by {found['made_by']} ({found['segment']})")
    elif certificate.first_wrong is not None:
        lines.append(f"first       {certificate.first_wrong}")
    if certificate.not_checked:
        lines.append("not checked " + "; ".join(entry.what for entry in certificate.not_checked))
    if out is not None:
        lines.append(f"certificate {out / MARKDOWN_FILE}")
    return "\n".join(lines)


def as_markdown(certificate: Certificate) -> str:
    """The certificate as a page."""
    subject = certificate.subject
    bundle, plan = subject["bundle"], subject["plan"]
    lines = [
        f"# Parity certificate: {verdict(certificate.passed)}",
        "",
        f"`{bundle['path']}` (manifest sha256 `{bundle['manifest_sha256']}`), executor `{subject['executor']}`, "
        f"{subject['world_size']} rank(s), {subject['precision']}, on {subject['device']}.",
        "",
        f"{plan['num_chunks']} chunks, seed {plan['seed']}, two random prompts; first chunk after "
        f"eviction: {plan['evicted_chunk']}; prompt switched at chunk {plan['switch_chunk']}. "
        f"Made {subject['made_at']} in {subject['seconds']:.0f} s, commit {subject['commit'] or 'unknown'}.",
        "",
    ]
    if certificate.first_wrong is not None:
        lines += [f"**First thing that is wrong:** {certificate.first_wrong}", ""]
    if certificate.bisected is not None:
        lines += _bisected_lines(certificate.bisected, passed=certificate.passed)
    lines += ["| check | | things | |", "|---|---|---|---|"]
    for check in certificate.checks:
        found = "; ".join(check.faults[:5]) or check.found
        lines.append(f"| {check.name} | {verdict(check.passed)} | {check.count} | {found} |")
    lines += ["", "| comparison | reference | candidate | | worst | rule |", "|---|---|---|---|---|---|"]
    for comparison in certificate.comparisons:
        lines.append(
            f"| {comparison.name} | {comparison.reference} | {comparison.candidate} | {verdict(comparison.passed)} | "
            f"{worst_text(comparison)} | {comparison.rule}, {len(comparison.errors)} tensors |"
        )
    lines += ["", "Errors are the largest difference over the larger of 1 and the tensor's largest value.", ""]
    lines += [f"![error over chunks]({PICTURE_FILE})", ""]
    if certificate.not_checked:
        lines += ["## Not checked", "", *(f"- {entry.what}: {entry.why}" for entry in certificate.not_checked), ""]
    if certificate.polygraphy:
        lines += ["## Check it again with Polygraphy", "", "```sh", *certificate.polygraphy.values(), "```", ""]
    versions = ", ".join(f"{name} {version}" for name, version in subject["versions"].items())
    return "\n".join([*lines, f"Versions: {versions}.", ""])


def _bisected_lines(found: Mapping[str, Any], *, passed: bool) -> list[str]:
    title = "Where the largest difference arises" if passed else "Where the executor leaves eager"
    lines = [
        f"**{title}:** {found['part']}; chunk {found['chunk']} {found['forward']}, rank "
        f"{found['rank']}, in {found['segment']}, made by `{found['made_by']}`.",
        "",
    ]
    if found["operations"]:
        shown = ", ".join(f"`{name}`" for name in found["operations"][:SHOWN_OPERATIONS])
        more = len(found["operations"]) - SHOWN_OPERATIONS
        end = f" and {more} more." if more > 0 else "."
        lines += [f"Operations since the last values that agree, the last one first: {shown}{end}", ""]
    return lines


def draw(certificate: Certificate, path: Path) -> None:
    """Draw each replica's error by chunk, with the tolerance, as a PNG.

    Raises:
        ExecutorError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExecutorError(f"a certificate wants matplotlib ({error}); {install_extra('proof')}") from error
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    shown = [series for series in certificate.series if series.errors]
    for number, series in enumerate(shown):
        _draw_series(ax, series, number, len(shown))
    if certificate.tolerance is not None:
        label = f"tolerance {certificate.tolerance:.0e}"
        ax.axhline(certificate.tolerance, color="tab:red", linestyle="--", label=label)
    ax.set_yscale("log")
    ax.set_xticks(sorted({chunk for series in shown for chunk in series.errors}))
    kind = "largest error" if certificate.tolerance is not None else "root mean square error, relative,"
    subject = certificate.subject
    lowest = ", an error of 0 drawn as 1e-9" if any(0.0 in series.errors.values() for series in shown) else ""
    ax.set(xlabel=f"chunk{lowest}", ylabel=f"{kind} of flow, x0 and latents")
    ran = f"{subject['executor']}, {subject['world_size']} rank(s), {subject['precision']}"
    ax.set_title(f"{verdict(certificate.passed)}: {ran}, free-running", fontsize=10)
    ax.grid(True, which="major", color="0.9")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise ExecutorError(f"cannot write the picture {path}: {error}") from error


def _draw_series(ax: Any, series: Series, number: int, count: int) -> None:
    finite = {chunk: max(error, LOWEST) for chunk, error in series.errors.items() if math.isfinite(error)}
    colour, style = COLOURS[number % len(COLOURS)], f"-{MARKERS[number % len(MARKERS)]}"
    if series.bound:
        colour, style = "tab:red", "--"
    size = 5 + 3 * (
        count - number
    )  # where lines coincide, the markers of the later one are inside those of the earlier
    points = list(finite), list(finite.values())
    ax.plot(*points, style, color=colour, label=series.label, markersize=size, fillstyle="none")
    lost = sorted(set(series.errors) - set(finite))
    if lost:
        ax.plot(lost, [1.0] * len(lost), "x", color=colour, markersize=9, label=f"{series.label}: not finite")
