"""Differences between two sets of tensors, and the limits that the package's proofs hold them to.

    error of a tensor = largest |got - expected| / max(1, largest |expected|)      NaN, infinity or a wrong shape: infinite

A tolerance is therefore absolute for values of the order of one, and relative to the tensor's largest value above that. No
tolerance is meaningful in a lower precision: there the root mean square error against float32 is compared with the error of
eager in the same precision.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A limit for every tensor.

    Attributes:
        tolerance: largest error that passes.
        scaled: errors are divided by the tensor's largest expected value where that is above 1; otherwise they are absolute.
    """

    tolerance: float
    scaled: bool = True

    @property
    def text(self) -> str:
        """The rule in words."""
        return f"every tensor within {self.tolerance:.0e}"


TOLERANCE = 5e-5
"""Recordings agree with a float64 replay within 5e-6; the smallest mistake to be caught (exact GELU for tanh) moves the
latents by 3e-4."""
EAGER_RATIO = 1.25
"""In a lower precision, the largest ratio of an executor's root mean square error to eager's. For the recordings A to D, L, N1,
N2 and R in bfloat16 and float16, the ratio of the emulated graphs lies between 0.89 and 1.08."""
RECORDED = Rule(tolerance=TOLERANCE, scaled=False)
"""For a replay against its recording."""
CERTIFIED = Rule(tolerance=TOLERANCE)
"""For a certificate's comparisons with eager."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorError:
    """The largest difference between two versions of one tensor; true if it is within the tolerance.

    Attributes:
        name: of the tensor.
        error: the largest difference, scaled as the rule says.
        tolerance: the limit for `error`.
        index: position of the largest difference.
        got: the value there.
        expected: the value that was expected there.
        where: further coordinates of the tensor: chunk and step, segment, graph tensor, rank.
    """

    name: str
    error: float
    tolerance: float
    index: tuple[int, ...] = ()
    got: float = math.nan
    expected: float = math.nan
    where: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.error <= self.tolerance

    def text(self) -> str:
        """The error in one line."""
        if not self.error:
            return f"{self.name}: equal"
        if not self.index:
            return f"{self.name}: error {self.error:.2e}"
        place = ", ".join(map(str, self.index))
        return f"{self.name}: error {self.error:.2e} at [{place}], got {self.got:.6g}, expected {self.expected:.6g}"


def tensor_error(
    name: str, expected: torch.Tensor | None, got: torch.Tensor | None, rule: Rule = CERTIFIED
) -> TensorError:
    """The largest difference; infinite if a tensor is missing, of another shape, or not finite."""
    if expected is None or got is None or expected.shape != got.shape:
        return TensorError(name=name, error=math.inf, tolerance=rule.tolerance)
    if not expected.numel():
        return TensorError(name=name, error=0.0, tolerance=rule.tolerance)
    wanted = expected.double()
    difference = (got.double() - wanted).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    place = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), difference.shape))
    largest = float(wanted.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max())
    return TensorError(
        name=name,
        error=float(difference.reshape(-1)[place]) / (max(1.0, largest) if rule.scaled else 1.0),
        tolerance=rule.tolerance,
        index=index,
        got=float(got.reshape(-1)[place]),
        expected=float(expected.reshape(-1)[place]),
    )


def differences(expected: Tensors, got: Tensors, rule: Rule = CERTIFIED) -> list[TensorError]:
    """The error of every tensor that either side has; a tensor that one side lacks has an infinite error."""
    return [tensor_error(name, expected.get(name), got.get(name), rule) for name in dict.fromkeys((*expected, *got))]


def kind_of(name: str) -> str:
    """The kind of a tensor: the last word of its name (`flow`, `x0`, `k` ...); `latents` for a recording's `out.c2`."""
    last = re.split(r"[ .]", name)[-1]
    return "latents" if re.fullmatch(r"c\d+", last) else last


def largest_by_kind(errors: Iterable[TensorError]) -> dict[str, TensorError]:
    """The largest error of each kind of tensor; the first one of several that are equal."""
    largest: dict[str, TensorError] = {}
    for error in errors:
        kind = kind_of(error.name)
        if kind not in largest or error.error > largest[kind].error:
            largest[kind] = error
    return largest


def rms_by_kind(expected: Tensors, got: Tensors) -> dict[str, float]:
    """Root mean square of the difference over that of the expected values, for each kind of tensor.

    It is infinite for a kind of which `got` lacks a tensor or has one of another shape, and NaN where values are NaN.
    """
    kinds: dict[str, list[str]] = {}
    for name in expected:
        kinds.setdefault(kind_of(name), []).append(name)
    return {kind: relative_rms((expected[name], got.get(name)) for name in names) for kind, names in kinds.items()}


def relative_rms(pairs: Iterable[tuple[torch.Tensor, torch.Tensor | None]]) -> float:
    """Root mean square of the differences of pairs (expected, got) over that of the expected values."""
    difference = size = 0.0
    for expected, got in pairs:
        if got is None or got.shape != expected.shape:
            return math.inf
        difference += float((got.double() - expected.double()).square().sum())
        size += float(expected.double().square().sum())
    return math.sqrt(difference / size) if size else math.inf if difference else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A candidate compared with a reference over many tensors.

    Attributes:
        name: kind of comparison: `rollout`, `chunk step`, `segment`, `processes`.
        reference: what the candidate is compared with.
        candidate: what is compared.
        rule: what the candidate must satisfy, in words.
        errors: of every tensor, in the order in which the tensors are computed.
        faults: failures other than errors of tensors.
        figures: root mean square errors by kind of tensor, in a lower precision.
    """

    name: str
    reference: str
    candidate: str
    rule: str
    errors: tuple[TensorError, ...]
    faults: tuple[str, ...] = ()
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Every error is within its tolerance, and something was compared."""
        return not self.faults and all(self.errors) and bool(self.errors or self.figures)

    @property
    def worst(self) -> TensorError | None:
        """The largest error; the first one of several that are equal."""
        return max(self.errors, key=lambda error: error.error, default=None)

    @property
    def first_wrong(self) -> TensorError | None:
        """The first error that is out of tolerance."""
        return next((error for error in self.errors if not error), None)


def precision_comparison(
    *, name: str, reference: str, candidate: str, yardstick: str, ours: Mapping[str, float], theirs: Mapping[str, float]
) -> Comparison:
    """Compare the candidate's root mean square errors, `ours`, with those of eager in the same precision, `theirs`."""
    faults = [
        f"{kind}: {ours[kind]:.3e} is more than {EAGER_RATIO} times {theirs[kind]:.3e}, the error of {yardstick}"
        for kind in ours
        if not ours[kind] <= EAGER_RATIO * theirs[kind]
    ]
    return Comparison(
        name=name,
        reference=reference,
        candidate=candidate,
        rule=f"root mean square error of each kind of tensor at most {EAGER_RATIO} times that of {yardstick}",
        errors=(),
        faults=tuple(faults),
        figures={kind: {"rms_error": ours[kind], "eager_rms_error": theirs[kind]} for kind in ours},
    )
