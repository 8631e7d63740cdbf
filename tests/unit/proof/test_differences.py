"""How far two tensors are apart, and what a comparison comes to."""

import math

import pytest
import torch

from causalrt.proof.differences import (
    Comparison,
    Rule,
    TensorError,
    differences,
    kind_of,
    largest_by_kind,
    precision_comparison,
    rms_by_kind,
    tensor_error,
)

RULE = Rule(tolerance=1e-3)


def error(expected: torch.Tensor | None, got: torch.Tensor | None) -> TensorError:
    return tensor_error("x", expected, got, RULE)


def test_small_values_have_an_absolute_error_and_large_ones_a_relative_one():
    small, large = torch.tensor([[0.5, 0.25]]), torch.tensor([[500.0, 250.0]])
    found = error(small, small + torch.tensor([[0.0, 0.01]]))
    assert found.error == pytest.approx(0.01, rel=1e-5)
    assert (found.index, found.expected) == ((0, 1), 0.25)
    assert not found
    assert error(large, large + 0.01).error == pytest.approx(0.01 / 500, rel=1e-3)
    assert error(large, large + 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_is_infinitely_wrong_even_if_both_sides_agree(bad, both):
    spoilt = torch.tensor([1.0, bad])
    expected = spoilt if both else torch.tensor([1.0, 2.0])
    assert error(expected, spoilt).error == math.inf


def test_another_shape_or_a_missing_tensor_is_infinitely_wrong():
    assert error(torch.zeros(2), torch.zeros(2, 1)).error == math.inf
    assert error(torch.zeros(2), None).error == error(None, torch.zeros(2)).error == math.inf


def test_a_scalar_and_an_empty_tensor():
    assert error(torch.tensor(2.0), torch.tensor(2.0)).error == 0
    assert error(torch.tensor(2.0), torch.tensor(3.0)).error == 0.5
    assert error(torch.zeros(0, 3), torch.zeros(0, 3))


def test_both_sides_names_are_compared():
    one = torch.ones(1)
    found = differences({"a": one, "b": one}, {"a": one, "c": one}, RULE)
    assert [(made.name, bool(made)) for made in found] == [("a", True), ("b", False), ("c", False)]


def test_an_unscaled_rule_takes_the_absolute_difference_of_large_values_too():
    (found,) = differences(
        {"x": torch.tensor([500.0])}, {"x": torch.tensor([500.5])}, Rule(tolerance=1e-3, scaled=False)
    )
    assert (found.error, bool(found)) == (0.5, False)


def test_the_largest_error_of_each_kind_is_the_first_of_equals():
    names = ("element 0 out.c0.s0.flow", "chunk 1 step 0 flow", "element 1 out.c12", "chunk 0 latents", "layer 0 k")
    assert [kind_of(name) for name in names] == ["flow", "flow", "latents", "latents", "k"]
    errors = [
        TensorError(name=name, error=size, tolerance=1.0)
        for name, size in zip(names, (0.2, 0.2, 0.0, 0.1, 0.0), strict=True)
    ]
    largest = largest_by_kind(errors)
    assert {kind: error.name for kind, error in largest.items()} == {
        "flow": names[0],
        "latents": names[3],
        "k": names[4],
    }


def comparison(*errors: float, faults: tuple[str, ...] = ()) -> Comparison:
    made = tuple(TensorError(name=f"t{n}", error=size, tolerance=1e-3) for n, size in enumerate(errors))
    return Comparison(name="rollout", reference="a", candidate="b", rule="", errors=made, faults=faults)


def test_a_comparison_names_the_first_that_is_wrong_and_the_worst():
    found = comparison(0.0, 0.1, 0.2)
    assert not found.passed
    assert found.first_wrong.name == "t1"
    assert found.worst.name == "t2"
    assert comparison(0.0, 1e-3).passed
    assert not comparison(0.0, faults=("it did not run",)).passed
    assert not comparison().passed, "nothing was compared"


def test_groups_of_a_lower_precision_are_held_against_eagers_own_error():
    expected = {"chunk 0 flow": torch.ones(4), "chunk 1 flow": torch.ones(4), "chunk 0 k": torch.ones(2)}
    eager = {name: value * 1.01 for name, value in expected.items()}
    good = {name: value * 1.012 for name, value in expected.items()}
    bad = good | {"chunk 0 k": torch.tensor([1.0, 1.1])}
    lost = {name: value for name, value in good.items() if name != "chunk 1 flow"}

    def held(got: dict[str, torch.Tensor]) -> Comparison:
        return precision_comparison(
            name="rollout",
            reference="eager, float32",
            candidate="x",
            yardstick="eager",
            ours=rms_by_kind(expected, got),
            theirs=rms_by_kind(expected, eager),
        )

    assert rms_by_kind(expected, eager) == pytest.approx({"flow": 0.01, "k": 0.01}, rel=1e-4)
    assert held(good).passed
    assert [fault.split(":")[0] for fault in held(bad).faults] == ["k"]
    assert [fault.split(":")[0] for fault in held(lost).faults] == ["flow"]
    assert not held(good | {"chunk 0 k": torch.tensor([1.0, math.nan])}).passed
