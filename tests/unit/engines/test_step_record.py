"""Hostile and broken records of engines: one TypeError that says where, which opening a bundle turns into a BundleError."""

import copy
import json

import pytest

from causalrt.engines.step_record import StepGraphs, files_of, parse_engines, parse_steps
from causalrt.plain import from_plain
from causalrt.recipes import recipe

PARTS = [
    {"file": "cut-000.onnx", "sent": "view", "received": "all_to_all", "writes": {}},
    {"file": "cut-001.onnx", "sent": None, "received": None, "writes": {"k_new": "k.0.0.written"}},
]
TARGET = {
    "version": "1.7",
    "networks": "networks.json",
    "prompt": "prompt.engine",
    "time": "time.engine",
    "steps": [["a.engine", "b.engine"]],
}
ENGINES = {"tensorrt_rtx": {"collectives": "runtime", "frontend": "onnx", "targets": {"sm80": TARGET}}}


def steps(*parts):
    """Steps whose engines are built from these parts."""
    plain = [{"segments": [], "tensorrt": list(of_step)} for of_step in parts]
    return from_plain(tuple[StepGraphs, ...], plain, "steps")


def test_what_a_build_writes():
    (step,) = steps(PARTS)
    engines = parse_engines(ENGINES, (step,))
    assert engines["tensorrt_rtx"].targets["sm80"].engine_files == (
        "prompt.engine",
        "time.engine",
        "a.engine",
        "b.engine",
    )
    assert [part.file for part in step.tensorrt] == ["cut-000.onnx", "cut-001.onnx"]
    assert step.tensorrt[1].writes == {"k_new": "k.0.0.written"}
    assert set(files_of(engines)) == {"prompt.engine", "time.engine", "a.engine", "b.engine", "networks.json"}


UNFINISHED = {"tensorrt": {"collectives": "runtime", "frontend": "onnx", "targets": {}, "wanted": ["sm90"]}}


@pytest.mark.parametrize("record", [ENGINES, UNFINISHED])
def test_a_record_is_read_as_it_is_written(record):
    graphs = steps(PARTS)
    parsed = parse_engines(record, graphs)
    written = {name: engines.as_record() for name, engines in parsed.items()}
    assert parse_engines(json.loads(json.dumps(written)), graphs) == parsed
    assert ("wanted" in written[next(iter(record))]) == (record is UNFINISHED)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"wanted": "sm90"}, [PARTS]),
        ({"wanted": [90]}, [PARTS]),
        ({"wanted": ["90"]}, [PARTS]),
        ({"targets": {"sm80": TARGET}}, [PARTS]),
        ({}, [[]]),
        ({}, [PARTS, []]),
        ({"collectives": "engine"}, [PARTS]),
    ],
)
def test_broken_records_of_engines_that_are_not_built(changes, parts):
    record = {"tensorrt": UNFINISHED["tensorrt"] | changes}
    with pytest.raises(TypeError, match=r"engines\.tensorrt"):
        parse_engines(record, steps(*parts))


FIRST_PARTS = [{"file": "1-frame-cut-000.onnx", "writes": {"k_new": "k.0.0.written"}}]


def two_steps(*files):
    target = TARGET | {"steps": [["a.engine", "b.engine"], *files]}
    return {"tensorrt_rtx": ENGINES["tensorrt_rtx"] | {"targets": {"sm80": target}}}


def test_engines_of_two_kinds_of_step():
    target = parse_engines(two_steps(["c.engine"]), steps(PARTS, FIRST_PARTS))["tensorrt_rtx"].targets["sm80"]
    assert target.steps == (("a.engine", "b.engine"), ("c.engine",))
    assert target.engine_files[-1] == "c.engine"


@pytest.mark.parametrize(
    ("engines", "parts"),
    [
        (ENGINES, [PARTS, FIRST_PARTS]),
        (two_steps([]), [PARTS, FIRST_PARTS]),
        (two_steps(["c.engine", "d.engine"]), [PARTS, FIRST_PARTS]),
        (two_steps("c.engine"), [PARTS, FIRST_PARTS]),
        (two_steps(["c.engine"]), [PARTS]),
        (two_steps(["c.engine"], ["d.engine"]), [PARTS, FIRST_PARTS]),
    ],
)
def test_engines_and_parts_of_the_kinds_of_step_that_do_not_fit(engines, parts):
    with pytest.raises(TypeError, match=r"targets\.sm80\.steps"):
        parse_engines(engines, steps(*parts))


def test_a_kind_of_step_without_graphs():
    with pytest.raises(TypeError, match=r"engines\.tensorrt_rtx: steps have no graphs"):
        parse_engines(two_steps([]), steps(PARTS, []))


@pytest.mark.parametrize("plain", [None, {}, [], [{}], [1], [{"segments": [], "tensorrt": []}], [{}, {}]])
def test_broken_steps(plain):
    with pytest.raises(TypeError, match="steps"):
        parse_steps(plain, recipe("tiny"))


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
    with pytest.raises(TypeError, match=r"steps\[0\]\.tensorrt"):
        parse_steps([{"segments": [], "tensorrt": parts}], recipe("tiny"))


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
        change((*SM80, "steps"), []),
        change((*SM80, "steps"), ["a.engine", "b.engine"]),
        change((*SM80, "steps"), [["a.engine"]]),
        change((*SM80, "steps"), [["a.engine", 1]]),
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
        parse_engines(engines, steps(PARTS))
