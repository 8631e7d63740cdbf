"""Hostile and broken records of engines: one TypeError that says where, which opening a bundle turns into a BundleError."""

import copy

import pytest

from causalrt.engines.step_record import files_of, parse_engines, parse_parts

PARTS = [
    {"file": "cut-000.onnx", "sent": "view", "received": "all_to_all", "writes": {}},
    {"file": "cut-001.onnx", "sent": None, "received": None, "writes": {"k_new": "k.0.0.written"}},
]
TARGET = {
    "version": "1.7",
    "networks": "networks.json",
    "prompt": "prompt.engine",
    "time": "time.engine",
    "step": ["a.engine", "b.engine"],
}
ENGINES = {"tensorrt_rtx": {"collectives": "runtime", "frontend": "onnx", "targets": {"sm80": TARGET}}}


def test_what_a_build_writes():
    parts = parse_parts(PARTS, "graphs.tensorrt")
    engines = parse_engines(ENGINES, parts)
    assert engines["tensorrt_rtx"].targets["sm80"].engine_files == (
        "prompt.engine",
        "time.engine",
        "a.engine",
        "b.engine",
    )
    assert parts[1].writes == {"k_new": "k.0.0.written"}
    assert set(files_of(engines, parts)) == {
        *("cut-000.onnx", "cut-001.onnx", "prompt.engine", "time.engine", "a.engine", "b.engine", "networks.json")
    }


@pytest.mark.parametrize(
    "parts",
    [
        None,
        {},
        [1],
        [None],
        [{}],
        [{"file": 1}],
        [{"file": "a", "sent": "x"}],
        [{"file": "a", "sent": 1, "received": 2}],
        [{"file": "a", "writes": []}],
        [{"file": "a", "writes": {"x": 1}}],
        [{"file": "a", "writes": {"x": "k", "y": "k"}}],
    ],
)
def test_broken_parts(parts):
    with pytest.raises(TypeError, match=r"graphs\.tensorrt"):
        parse_parts(parts, "graphs.tensorrt")


def change(path, value):
    def apply(engines):
        *way, last = path
        for key in way:
            engines = engines[key]
        if value is ...:
            del engines[last]
        else:
            engines[last] = value

    return apply


RTX = "tensorrt_rtx"
SM80 = (RTX, "targets", "sm80")


@pytest.mark.parametrize(
    "edit",
    [
        change((RTX,), None),
        change(("tensorflow",), ENGINES[RTX]),
        change((RTX, "collectives"), 5),
        change((RTX, "collectives"), ...),
        change((RTX, "collectives"), "engine"),  # but there are two parts
        change((RTX, "frontend"), "torch-tensorrt"),  # but it leaves no parts
        change((RTX, "targets"), {}),
        change((RTX, "targets"), []),
        change((RTX, "targets", "../x"), TARGET),
        change(SM80, None),
        change((*SM80, "version"), ...),
        change((*SM80, "networks"), 1),
        change((*SM80, "step"), []),
        change((*SM80, "step"), "a.engine"),
        change((*SM80, "step"), ["a.engine"]),
        change((*SM80, "step"), ["a.engine", 1]),
        change((*SM80, "names"), []),
        change((*SM80, "names"), {"a.engine": "x"}),
        change((*SM80, "names"), {"a.engine": {"own": 1}}),
        change((*SM80, "names"), {"a.engine": {"own": "x", "other": "x"}}),
    ],
)
def test_broken_engines(edit):
    engines = copy.deepcopy(ENGINES)
    edit(engines)
    with pytest.raises(TypeError, match="engines"):
        parse_engines(engines, parse_parts(PARTS, "graphs.tensorrt"))
