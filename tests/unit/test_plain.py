"""Typed values from JSON: whatever is of another type is refused with its place."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from causalrt.plain import from_plain


@dataclass(frozen=True)
class Part:
    name: str
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    scale: float | None = None
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "none":
            raise TypeError("none is no name")


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ({"name": "x"}, Part("x")),
        ({"name": "x", "kind": "b", "sizes": [1, 2], "scale": 2}, Part("x", "b", (1, 2), 2.0)),
        ({"name": "x", "scale": None, "words": {"k": ["v"]}, "other": 1}, Part("x", words={"k": ("v",)})),
    ],
)
def test_a_dataclass(plain: dict[str, Any], expected: Part) -> None:
    assert from_plain(Part, plain, "part") == expected


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (None, "part must be an object, got None"),
        ({}, "part lacks name"),
        ({"name": 1}, "part.name must be str, got 1"),
        ({"name": "none"}, "part: none is no name"),
        ({"name": "x", "kind": "c"}, "part.kind must be one of a, b, got 'c'"),
        ({"name": "x", "sizes": 1}, "part.sizes must be a list of integers, got 1"),
        ({"name": "x", "sizes": [1, True]}, "part.sizes[1] must be int, got True"),
        ({"name": "x", "scale": True}, "part.scale must be float, got True"),
        ({"name": "x", "scale": float("nan")}, "part.scale must be float, got nan"),
        ({"name": "x", "words": {"k": [1]}}, "part.words.k[0] must be str, got 1"),
    ],
)
def test_what_does_not_fit_is_named(plain: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        from_plain(Part, plain, "part")
