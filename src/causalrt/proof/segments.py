"""Each ONNX segment of a step by itself, fed with what eager had at that place, and where within it the values part.

    eager's forward:   x, time, prompt, slots | exchanges sent, received | what each LayerNorm is given | slots, flow
    a segment:         x, time, prompt, slots,  received, residual stream -> sent, residual stream, slots, flow

The LayerNorms of a graph read the residual stream three times a layer and once in the head, in the order in which eager's
do: their inputs are made outputs of a copy of the graph, so that the first one that differs names layer and part. What a
segment reads and eager cannot tell (the rows of the rotary tables) is the previous segment's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.logger import G_LOGGER

from causalrt.control_groups import available_cpus
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import Bundle
from causalrt.engines.step_record import StepPart
from causalrt.engines.tensor_names import KV_ROWS
from causalrt.proof.errors import Comparison, TensorError, as_tensors
from causalrt.proof.runners import compared, forwards_at, results_of
from causalrt.proof.watch import StepId, StepTrace, Trace, exchange_name, residual_name

EAGER = "eager"
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentGraph:
    """A segment's graph, and what its values are in eager's words.

    Attributes:
        part: of the step.
        model: the graph, without its weights; what LayerNorms are given is among the outputs.
        words: by graph tensor what it is, for those that eager knows, in the order of the graph.
    """

    part: StepPart
    model: onnx.ModelProto
    words: Mapping[str, str]


@dataclass(kw_only=True, slots=True)
class SegmentRun:
    """What was put into a segment and came out of it, for a forward of a rank; the runs of one segment are in order."""

    place: StepId
    rank: int
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor] = field(default_factory=dict)


def read_segments(bundle: Bundle, step: int) -> list[SegmentGraph]:
    """The graphs of a step's segments, with the residual stream among their outputs."""
    residuals: dict[str, str] = {}
    exchanged: dict[str, str] = {}
    graphs = []
    for part in bundle.steps[step].segments:
        model = onnx.load(bundle.path / part.file, load_external_data=False)
        inputs = {value.name for value in model.graph.input}
        outputs = {value.name for value in model.graph.output}
        made = [name for node in model.graph.node for name in node.output]
        for node in model.graph.node:
            if node.op_type == "LayerNormalization" and node.input[0] not in residuals:
                residuals[node.input[0]] = residual_name(len(residuals))
        if part.sent is not None and part.received is not None:
            name = exchange_name(len(exchanged) // 2)
            exchanged[part.sent], exchanged[part.received] = f"{name} sent", f"{name} received"
        kind = ONNX_TYPES[TORCH_DTYPES[bundle.config.build.precision]]
        for name in made:
            if name in residuals and name not in outputs:
                model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        words = {}
        for name in (*inputs, *made):
            if name in exchanged or name in residuals:
                words[name] = exchanged.get(name) or residuals[name]
            elif name in outputs and (name == "flow" or name.endswith(".written")):
                words[name] = _words_of_slots(name)
        graphs.append(SegmentGraph(part=part, model=model, words=words))
    return graphs


def _words_of_slots(name: str) -> str:
    if name == "flow":
        return name
    kind, layer, share, _ = name.split(".")
    return f"layer {layer} KV slots {kind} of share {share}"


def open_session(graph: SegmentGraph, folder: Path) -> ort.InferenceSession:
    """A session of the marked graph, weights from the bundle's file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    options.log_severity_level = 3  # TensorScatter warns of caches that are not bound in place
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_segments(
    bundle: Bundle, tapes: Sequence[Trace], places: Sequence[StepId]
) -> Iterator[tuple[SegmentGraph, list[SegmentRun]]]:
    """Each segment with what went in and came out, in order; one of them is open at a time."""
    for step in range(len(bundle.steps)):
        forwards = [
            (place, rank, forward)
            for place in places
            for rank, forward in enumerate(forwards_at(tapes, place))
            if forward.view.step == step
        ]
        values = [_given(forward, rank) for _, rank, forward in forwards]
        known = [_known(forward) for _, _, forward in forwards]
        for graph in read_segments(bundle, step) if forwards else []:
            fed = []
            with (
                G_LOGGER.verbosity(G_LOGGER.CRITICAL),
                OnnxrtRunner(lambda g=graph: open_session(g, bundle.path)) as runner,
            ):
                wanted = runner.get_input_metadata(use_numpy_dtypes=False)
                for (place, rank, _), own, eager in zip(forwards, values, known, strict=True):
                    inputs = {
                        name: eager[graph.words[name]] if graph.words.get(name) in eager else own[name]
                        for name in wanted
                    }
                    outputs = as_tensors(runner.infer(inputs))
                    own |= {name: tensor.clone() for name, tensor in outputs.items()}
                    expected = {
                        name: eager[word] for name, word in graph.words.items() if word in eager and name in outputs
                    }
                    fed.append(SegmentRun(place=place, rank=rank, inputs=inputs, outputs=outputs, expected=expected))
            yield graph, fed


def _given(forward: StepTrace, rank: int) -> dict[str, torch.Tensor]:
    """A step's own inputs, by name in the graph."""
    given = {"x": forward.x, **forward.time, **forward.view.tensors()}
    for name, number in (("rank", rank), ("first_frame", forward.first_frame), (KV_ROWS, forward.view.kv_rows)):
        given[name] = torch.tensor([number])
    return {name: tensor.cpu() for name, tensor in given.items()}


def _known(forward: StepTrace) -> dict[str, torch.Tensor]:
    """What eager had, in words."""
    known = {residual_name(number): value for number, value in enumerate(forward.residuals)}
    for name, value in forward.outputs.items():
        known[_words_of_slots(f"{name}.written") if name.startswith(("k.", "v.")) else name] = value
    return {word: value.cpu() for word, value in known.items()}


def compare_segment(
    graph: SegmentGraph, fed: Sequence[SegmentRun], *, tolerance: float, candidate: str
) -> list[TensorError]:
    """Errors of what eager knows, forward by forward and rank by rank."""
    expected = [{word: run.expected[name] for name, word in _in_order(graph, run)} for run in fed]
    got = [{word: run.outputs[name] for name, word in _in_order(graph, run)} for run in fed]
    lists = compared(
        results_of({EAGER: expected, candidate: got}), reference=EAGER, candidate=candidate, tolerance=tolerance
    )
    names = {word: name for name, word in graph.words.items()}
    return [
        TensorError(
            name=f"chunk {run.place[0]} {run.place[1]}, {graph.part.file}, {error.name}, rank {run.rank}",
            error=error.error,
            tolerance=tolerance,
            index=error.index,
            got=error.got,
            expected=error.expected,
            where={
                "chunk": run.place[0],
                "forward": run.place[1],
                "rank": run.rank,
                "segment": graph.part.file,
                "value": error.name,
                "graph_tensor": names[error.name],
            },
        )
        for run, errors in zip(fed, lists, strict=True)
        for error in errors
    ]


def _in_order(graph: SegmentGraph, run: SegmentRun) -> list[tuple[str, str]]:
    return [(name, word) for name, word in graph.words.items() if name in run.expected]


def segment_comparison(
    errors: Sequence[TensorError], *, places: Sequence[StepId], tolerance: float, candidate: str, fault: str = ""
) -> Comparison:
    """All segments' errors as one comparison, forward by forward."""
    order = {place: number for number, place in enumerate(places)}
    return Comparison(
        name="segment",
        reference="eager's own tensors",
        candidate=candidate,
        rule=f"every tensor within {tolerance:.0e}",
        errors=tuple(sorted(errors, key=lambda error: order[error.where["chunk"], error.where["forward"]])),
        faults=(fault,) if fault else (),
    )


def explain(graph: SegmentGraph, error: TensorError) -> dict[str, Any]:
    """The operations between the last values that eager shares and the one that differs, the last one first."""
    bad = error.where["graph_tensor"]
    makers = {name: node for node in graph.model.graph.node for name in node.output}
    waiting, seen, operations = [bad], set[str](), list[str]()
    known: list[str] = []
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if name != bad and name in graph.words:
            known.append(graph.words[name])
        elif name in makers:
            operations.append(f"{makers[name].op_type} {makers[name].name}")
            waiting += [source for source in makers[name].input if source]
    return {
        **error.where,
        "part": describe(error.where["value"]),
        "made_by": operations[0] if operations else "the segment's input",
        "operations": operations,
        "agreed_before": known,
    }


def describe(value: str) -> str:
    """The part of the model that makes a value."""
    if value == "flow":
        return "head"
    if "scatter_heads" in value:
        return f"{value.partition(' scatter')[0]} self-attention: q, k, v, their norms and rotation, packing"
    if "gather_heads" in value:
        return f"{value.partition(' gather')[0]} self-attention: attention over the KV slots"
    if "KV slots" in value:
        return f"{value.partition(' KV')[0]} self-attention: keys and values put into the KV slots"
    return value
