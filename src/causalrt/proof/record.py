"""The certificate: what was checked, what was compared, what was not and why, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from causalrt.proof.errors import Comparison


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Something that is right or wrong, without a tolerance.

    Attributes:
        name: in words.
        count: things looked at.
        found: in words, if all is well.
        faults: what is wrong, named.
    """

    name: str
    count: int
    found: str
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing is wrong."""
        return not self.faults


@dataclass(frozen=True, kw_only=True, slots=True)
class NotChecked:
    """Something that this certificate does not vouch for, and why."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A side's error chunk by chunk; `bound` is a line that others must stay below."""

    label: str
    errors: Mapping[int, float]
    bound: bool = False


@dataclass(kw_only=True, slots=True)
class Certificate:
    """What was found.

    Attributes:
        subject: bundle, executor, ranks, precision, device, plan: what is vouched for.
        tolerance: of every tensor; None in a lower precision, where a ratio takes its place.
        checks: without a tolerance.
        comparisons: of tensors.
        series: for the picture.
        bisected: where the executor parts from eager: layer, part, operations; None if it does not, or nobody looked.
        not_checked: what is not vouched for.
        polygraphy: by segment, the command that checks it again.
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
        """A rollout of the executor itself was compared, not of eager in its place."""
        return any(
            comparison.name in ("rollout", "processes")
            and comparison.candidate.startswith(f"{self.subject['executor']}, ")
            for comparison in self.comparisons
        )

    @property
    def passed(self) -> bool:
        """Every check and comparison passed, and a rollout of the executor was among them."""
        return (
            self.executor_ran
            and all(check.passed for check in self.checks)
            and all(comparison.passed for comparison in self.comparisons)
        )

    @property
    def first_wrong(self) -> str | None:
        """What is wrong, the most specific finding first; None if nothing is."""
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
