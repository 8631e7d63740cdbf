"""How far two tensors are apart, and what a comparison of many of them comes to.

    error = largest |got - expected| / max(1, largest |expected|)         NaN, Inf or another shape: infinite

So a tolerance is absolute for values of the order of one, and relative to the tensor's own size above that. In a lower
precision no tolerance is worth the name: what is compared is the root mean square error against eager in float32, and
what it is held against is eager's own in that precision.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorError:
    """What two sides differ by in one tensor; true if that is within the tolerance.

    Attributes:
        name: of the tensor, in words.
        error: see above.
        tolerance: for `error`.
        index: where the largest difference is.
        got: the value there.
        expected: the value there.
        where: what else is known of the place: chunk and forward, segment, graph tensor, rank.
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
        """In a line."""
        if not self.error:
            return f"{self.name}: equal"
        if not self.index:
            return f"{self.name}: error {self.error:.2e}"
        place = ", ".join(map(str, self.index))
        return f"{self.name}: error {self.error:.2e} at [{place}], got {self.got:.6g}, expected {self.expected:.6g}"


def tensor_error(
    name: str,
    expected: torch.Tensor | None,
    got: torch.Tensor | None,
    *,
    tolerance: float,
    where: Mapping[str, Any] | None = None,
) -> TensorError:
    """The largest difference; infinite if a side has no such tensor, or one of another shape, or values that are not finite."""
    if expected is None or got is None or expected.shape != got.shape:
        return TensorError(name=name, error=math.inf, tolerance=tolerance, where=where or {})
    if not expected.numel():
        return TensorError(name=name, error=0.0, tolerance=tolerance, where=where or {})
    wanted = expected.double()
    difference = (got.double() - wanted).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    place = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), difference.shape))
    scale = max(1.0, float(wanted.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).max()))
    return TensorError(
        name=name,
        error=float(difference.view(-1)[place] if difference.dim() else difference) / scale,
        tolerance=tolerance,
        index=index,
        got=float(got.reshape(-1)[place]),
        expected=float(expected.reshape(-1)[place]),
        where=where or {},
    )


class Within:
    """Polygraphy's comparison function: two results of an iteration to an error by the tensor's name."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def __call__(
        self, expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]
    ) -> "OrderedDict[str, TensorError]":
        """Every tensor that either side has; one that a side lacks is infinitely wrong."""
        wanted, made = (
            dict(expected.items()),
            dict(got.items()),
        )  # Polygraphy's own mapping, which loads what it swapped out
        return OrderedDict(
            (name, tensor_error(name, wanted.get(name), made.get(name), tolerance=self._tolerance))
            for name in dict.fromkeys((*wanted, *made))
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two sides compared over many tensors.

    Attributes:
        name: what was compared: `rollout`, `chunk step`, `segment`, `processes`.
        reference: the side that is right.
        candidate: the other one.
        rule: what it must keep to, in words.
        errors: of every tensor, in the order in which they arise.
        faults: what is wrong apart from these.
        figures: by group of tensors, where the rule is about groups.
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
        """Everything is within its tolerance, and there was something to compare."""
        return not self.faults and all(self.errors) and bool(self.errors or self.figures)

    @property
    def worst(self) -> TensorError | None:
        """The largest error; the first of them, if several are infinite."""
        return max(self.errors, key=lambda error: error.error, default=None)

    @property
    def first_wrong(self) -> TensorError | None:
        """The first tensor that is out of tolerance."""
        return next((error for error in self.errors if not error), None)


def rms_by_group(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square of the difference over that of the expected values, by the last word of the tensors' names.

    What a side lacks makes its group infinitely wrong; NaN stays NaN.
    """
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(name.rpartition(" ")[2], []).append(name)
    result = {}
    for group, names in groups.items():
        if any(name not in got or got[name].shape != expected[name].shape for name in names):
            result[group] = math.inf
            continue
        difference = sum(float((got[name].double() - expected[name].double()).square().sum()) for name in names)
        size = sum(float(expected[name].double().square().sum()) for name in names)
        result[group] = math.sqrt(difference / size) if size else math.inf if difference else 0.0
    return result


def precision_comparison(
    *,
    name: str,
    reference: str,
    candidate: str,
    yardstick: str,
    ratio: float,
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
) -> Comparison:
    """Hold the candidate's root mean square errors against those of eager in the same precision."""
    faults = [
        f"{group}: {ours[group]:.3e} is more than {ratio} times {theirs[group]:.3e}, the error of {yardstick}"
        for group in ours
        if not ours[group] <= ratio * theirs[group]
    ]
    return Comparison(
        name=name,
        reference=reference,
        candidate=candidate,
        rule=f"root mean square error of each kind of tensor at most {ratio} times that of {yardstick}",
        errors=(),
        faults=tuple(faults),
        figures={group: {"rms_error": ours[group], "eager_rms_error": theirs[group]} for group in ours},
    )


def as_tensors(values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    """Tensors of arrays or tensors, on the host."""
    items = values.items() if isinstance(values, Mapping) else values
    return {name: torch.as_tensor(value).cpu() for name, value in items}
