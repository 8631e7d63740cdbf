"""Hostile and broken records of engines: one TypeError that says where, which opening a bundle turns into a BundleError."""

import copy
import json

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


UNFINISHED = {"tensorrt": {"collectives": "runtime", "frontend": "onnx", "targets": {}, "wanted": ["sm90"]}}


@pytest.mark.parametrize("record", [ENGINES, UNFINISHED])
def test_a_record_is_read_as_it_is_written(record):
    parts = parse_parts(PARTS, "graphs.tensorrt")
    parsed = parse_engines(record, parts)
    written = {name: engines.as_record() for name, engines in parsed.items()}
    assert parse_engines(json.loads(json.dumps(written)), parts) == parsed
    assert ("wanted" in written[next(iter(record))]) == (record is UNFINISHED)


@pytest.mark.parametrize(
    ("changes", "parts", "lone"),
    [
        ({"wanted": "sm90"}, PARTS, False),
        ({"wanted": [90]}, PARTS, False),
        ({"wanted": ["90"]}, PARTS, False),
        ({"targets": {"sm80": TARGET}}, PARTS, False),
        ({}, [], False),
        ({}, PARTS, True),
        ({"collectives": "engine"}, PARTS, False),
    ],
)
def test_broken_records_of_engines_that_are_not_built(changes, parts, lone):
    record = {"tensorrt": UNFINISHED["tensorrt"] | changes}
    with pytest.raises(TypeError, match=r"engines\.tensorrt"):
        parse_engines(record, parse_parts(parts, "graphs.tensorrt"), lone=lone)


LONE_PARTS = [{"file": "lone-cut-000.onnx", "writes": {"k_new": "k.0.0.written"}}]


def lone_record(**changes):
    target = TARGET | {"lone_step": ["c.engine"]} | changes
    return {"tensorrt_rtx": ENGINES["tensorrt_rtx"] | {"targets": {"sm80": target}}}


def test_engines_of_a_lone_first_frame():
    parts, lone_parts = parse_parts(PARTS, "graphs.tensorrt"), parse_parts(LONE_PARTS, "graphs.lone_tensorrt")
    engines = parse_engines(lone_record(), parts, lone_parts, lone=True)
    target = engines["tensorrt_rtx"].targets["sm80"]
    assert (target.step, target.lone_step) == (("a.engine", "b.engine"), ("c.engine",))
    assert target.engine_files[-1] == "c.engine"
    assert "lone-cut-000.onnx" in files_of(engines, (*parts, *lone_parts))


@pytest.mark.parametrize(
    ("engines", "lone_parts", "lone"),
    [
        (ENGINES, LONE_PARTS, True),
        (lone_record(lone_step=[]), [], True),
        (lone_record(lone_step=["c.engine", "d.engine"]), LONE_PARTS, True),
        (lone_record(lone_step="c.engine"), LONE_PARTS, True),
        (lone_record(), [], False),
        (lone_record(), LONE_PARTS, False),
    ],
)
def test_engines_and_parts_of_a_lone_first_frame_that_do_not_fit(engines, lone_parts, lone):
    lone_parts = parse_parts(lone_parts, "graphs.lone_tensorrt")
    with pytest.raises(TypeError, match=r"targets\.sm80\.lone_step"):
        parse_engines(engines, parse_parts(PARTS, "graphs.tensorrt"), lone_parts, lone=lone)


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
