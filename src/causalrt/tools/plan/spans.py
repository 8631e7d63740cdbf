"""A quantity at the best end, in the middle, and at the worst end of what is assumed of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Case = Literal["best", "nominal", "worst"]
CASES: tuple[Case, ...] = ("best", "nominal", "worst")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Best means what makes the machine fast: a high rate, a low latency, a short time."""

    best: float
    nominal: float
    worst: float

    def at(self, case: Case) -> float:
        """The value in one case."""
        value: float = getattr(self, case)
        return value

    def scaled(self, factor: float) -> "Estimate":
        """Each end times `factor`."""
        return Estimate(best=self.best * factor, nominal=self.nominal * factor, worst=self.worst * factor)


def between(best: float, worst: float) -> Estimate:
    """The rule for published spreads: nominal is the middle, whatever a comparison says later."""
    return Estimate(best=best, nominal=(best + worst) / 2, worst=worst)


def over_cases(compute: Callable[[Case], float]) -> Estimate:
    """A quantity computed with every assumption at one end, in the middle, at the other end."""
    return Estimate(best=compute("best"), nominal=compute("nominal"), worst=compute("worst"))
