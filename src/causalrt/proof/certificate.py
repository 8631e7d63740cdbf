"""The certificate: its subject, what was checked and compared, what was not checked, and the verdict."""

import datetime
import logging
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from causalrt.engines.bundle import MANIFEST, Bundle, file_digest
from causalrt.engines.toolchain import toolchain_versions
from causalrt.errors import CausalRTError, RankError
from causalrt.proof.differences import Comparison
from causalrt.proof.traced_rollout import RolloutPlan

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A property that holds or does not hold, without a tolerance.

    Attributes:
        name: of the check.
        count: number of things checked.
        found: the result in words if the check passed.
        faults: a description of each failure.
    """

    name: str
    count: int
    found: str
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """The check found no faults."""
        return not self.faults


@dataclass(frozen=True, kw_only=True, slots=True)
class NotChecked:
    """Something that this certificate does not cover, and why."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A replica's error by chunk, for the picture; a `bound` is a limit for the other series."""

    label: str
    errors: Mapping[int, float]
    bound: bool = False


@dataclass(kw_only=True, slots=True)
class Certificate:
    """The findings about a bundle.

    Attributes:
        subject: bundle, executor, ranks, precision, device and plan, in JSON types.
        tolerance: of every tensor; None in a lower precision, which is limited by a ratio of root mean squares.
        checks: findings without a tolerance.
        comparisons: findings about tensors.
        series: curves of the picture.
        bisected: where the executor leaves eager: layer, part, operations; None if it does not, or if that was not sought.
        not_checked: what the certificate does not cover.
        polygraphy: by segment, the command that repeats its comparison.
    """

    subject: dict[str, Any]
    tolerance: float | None
    checks: list[Check] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    bisected: dict[str, Any] | None = None
    not_checked: list[NotChecked] = field(default_factory=list)
    polygraphy: dict[str, str] = field(default_factory=dict)

    @property
    def executor_ran(self) -> bool:
        """A rollout of the executor itself was compared with eager."""
        return any(
            comparison.name in ("rollout", "processes")
            and comparison.candidate.startswith(f"{self.subject['executor']}, ")
            for comparison in self.comparisons
        )

    @property
    def passed(self) -> bool:
        """Every check and comparison passed, and one of them was of the executor's rollout."""
        return (
            self.executor_ran
            and all(check.passed for check in self.checks)
            and all(comparison.passed for comparison in self.comparisons)
        )

    @property
    def first_wrong(self) -> str | None:
        """The most specific failure; None if the certificate passed."""
        for check in self.checks:
            if check.faults:
                return check.faults[0]
        for comparison in self.comparisons:
            if comparison.faults:
                return f"{comparison.name}, {comparison.candidate}: {comparison.faults[0]}"
            wrong = comparison.first_wrong
            if wrong is not None:
                return f"{comparison.name}, {comparison.candidate}: {wrong.text()}"
        if not self.executor_ran:
            return f"no rollout of {self.subject['executor']} was compared with eager; leave --no-processes out"
        return None


def attempt(what: str, work: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result of `work`, or a description of its failure: on a damaged bundle, any error is a finding.

    Raises:
        CausalRTError: an error that damage does not cause, such as a missing library.
    """
    try:
        return work(), ""
    except CausalRTError as error:
        if isinstance(error, RankError):
            return None, f"{what} failed: {error}"
        raise
    except Exception as error:
        logger.exception("%s failed", what)
        return None, f"{what} failed: {type(error).__name__}: {error}"


def describe_subject(
    bundle: Bundle, executor: str, plan: RolloutPlan, *, device: str, emulated: bool
) -> dict[str, Any]:
    """The bundle, byte by byte, and what runs it, in JSON types."""
    build = bundle.config.build
    return {
        "bundle": {
            "path": str(bundle.path),
            "manifest_sha256": file_digest(bundle.path / MANIFEST),
            "files": dict(bundle.hashes),
            "toolchain": dict(bundle.toolchain),
            "plugins": bundle.fused_ops,
        },
        "executor": f"{executor} (emulated by onnxruntime)" if emulated else executor,
        "world_size": build.world_size,
        "head_plan": build.head_plan,
        "precision": build.precision,
        "device": device,
        "plan": {
            "num_chunks": plan.num_chunks,
            "evicted_chunk": plan.evicted_chunk,
            "switch_chunk": plan.switch_chunk,
            "seed": plan.seed,
            "prompt_seeds": [plan.seed, plan.seed + 1],
            "looked_inside": [f"chunk {chunk} {label}" for chunk, label in plan.places],
        },
        "versions": toolchain_versions()
        | {name: metadata.version(name) for name in ("polygraphy", "numpy")}
        | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {platform.system()}",
        "commit": commit(),
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Commit of the source tree that this package runs from, marked if files have changed; None for an installed package."""
    root = Path(__file__).parents[4]
    if not (root / ".git").exists():
        return None
    try:
        text = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return text or None
