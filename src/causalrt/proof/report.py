"""A certificate as JSON, as Markdown, and in a few lines; and the folder that holds it all, written whole or not at all."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from causalrt.atomic_files import atomic_folder
from causalrt.errors import RequestError
from causalrt.proof.errors import Comparison, TensorError
from causalrt.proof.picture import draw
from causalrt.proof.record import Certificate

JSON_FILE, MARKDOWN_FILE, PICTURE_FILE = "certificate.json", "certificate.md", "certificate.png"
SCHEMA = 1
SHOWN_OPERATIONS = 12


def check_target(target: Path) -> None:
    """Refuse to replace what is no certificate.

    Raises:
        RequestError: something else is there.
    """
    if target.exists() and not (target / JSON_FILE).is_file():
        raise RequestError(f"{target} exists and is no certificate; it is not overwritten, choose another folder")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to fill; it takes its place if the block ends well, and is removed if not.

    Raises:
        RequestError: something else than a certificate is there, or nothing can be written.
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
    """JSON, Markdown and picture."""
    draw(certificate, folder / PICTURE_FILE)
    (folder / JSON_FILE).write_text(json.dumps(as_plain(certificate), indent=1, allow_nan=False) + "\n")
    (folder / MARKDOWN_FILE).write_text(as_markdown(certificate))


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)


def _plain_error(error: TensorError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    values = {"error": error.error, "got": error.got, "expected": error.expected}
    return {
        "tensor": error.name,
        **{name: _number(value) for name, value in values.items()},
        "index": list(error.index),
        **error.where,
    }


def _plain_comparison(comparison: Comparison) -> dict[str, Any]:
    worst = comparison.worst
    chunks: dict[str, float] = {}
    for error in comparison.errors:
        words = error.name.split()
        if words[0] == "chunk":
            chunks[words[1]] = max(chunks.get(words[1], 0.0), error.error)
    worst_chunk = max(chunks, key=lambda chunk: chunks[chunk], default=None)
    return {
        "name": comparison.name,
        "reference": comparison.reference,
        "candidate": comparison.candidate,
        "rule": comparison.rule,
        "passed": comparison.passed,
        "faults": list(comparison.faults),
        "worst": _plain_error(worst),
        "worst_chunk": None if worst_chunk is None else int(worst_chunk),
        "first_wrong": _plain_error(comparison.first_wrong),
        "figures": {
            group: {name: _number(value) for name, value in figures.items()}
            for group, figures in comparison.figures.items()
        },
        "errors": {error.name: _number(error.error) for error in comparison.errors},
    }


def as_plain(certificate: Certificate) -> dict[str, Any]:
    """In JSON's types; what is not finite is a string."""
    return {
        "schema": SCHEMA,
        "passed": certificate.passed,
        "first_wrong": certificate.first_wrong,
        **certificate.subject,
        "tolerance": certificate.tolerance,
        "checks": [
            {
                "name": check.name,
                "count": check.count,
                "passed": check.passed,
                "found": check.found,
                "faults": check.faults,
            }
            for check in certificate.checks
        ],
        "comparisons": [_plain_comparison(comparison) for comparison in certificate.comparisons],
        "bisected": certificate.bisected,
        "errors_by_chunk": {
            series.label: {str(chunk): _number(error) for chunk, error in series.errors.items()}
            for series in certificate.series
        },
        "not_checked": [{"what": entry.what, "why": entry.why} for entry in certificate.not_checked],
        "polygraphy": certificate.polygraphy,
    }


def worst_text(comparison: Comparison) -> str:
    """The worst that a comparison found, in a line."""
    if comparison.faults:
        return comparison.faults[0]
    if comparison.figures:
        group = max(comparison.figures, key=lambda name: comparison.figures[name]["rms_error"])
        found = comparison.figures[group]
        return f"{group}: rms {found['rms_error']:.2e}, eager's own {found['eager_rms_error']:.2e}"
    return comparison.worst.text() if comparison.worst is not None else "nothing to compare"


def verdict(passed: bool) -> str:
    """In a word."""
    return "passed" if passed else "FAILED"


def as_text(certificate: Certificate, out: Path | None) -> str:
    """Verdict, the worst of each comparison, the first thing that is wrong, where the files are."""
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
    """For a reader."""
    subject, bundle = certificate.subject, certificate.subject["bundle"]
    lines = [
        f"# Parity certificate: {verdict(certificate.passed)}",
        "",
        f"`{bundle['path']}` (manifest sha256 `{bundle['manifest_sha256']}`), executor `{subject['executor']}`, "
        f"{subject['world_size']} rank(s), {subject['precision']}, on {subject['device']}.",
        "",
        f"{subject['plan']['num_chunks']} chunks, seed {subject['plan']['seed']}, two random prompts; first chunk after "
        f"eviction: {subject['plan']['evicted_chunk']}; prompt switched at chunk {subject['plan']['switch_chunk']}. "
        f"Made {subject['made_at']} in {subject['seconds']:.0f} s, commit {subject['commit'] or 'unknown'}.",
        "",
    ]
    if certificate.first_wrong is not None:
        lines += [f"**First thing that is wrong:** {certificate.first_wrong}", ""]
    if certificate.bisected is not None:
        found = certificate.bisected
        title = "Where the largest difference arises" if certificate.passed else "Where the executor leaves eager"
        lines += [
            f"**{title}:** {found['part']}; chunk {found['chunk']} {found['forward']}, rank "
            f"{found['rank']}, in {found['segment']}, made by `{found['made_by']}`.",
            "",
        ]
        if found["operations"]:
            shown = found["operations"][:SHOWN_OPERATIONS]
            more = len(found["operations"]) - len(shown)
            lines += [
                "Operations since the last values that agree, the last one first: "
                + ", ".join(f"`{name}`" for name in shown)
                + (f" and {more} more." if more else "."),
                "",
            ]
    lines += ["| check | | things | |", "|---|---|---|---|"]
    for check in certificate.checks:
        lines.append(
            f"| {check.name} | {verdict(check.passed)} | {check.count} | {'; '.join(check.faults[:5]) or check.found} |"
        )
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
