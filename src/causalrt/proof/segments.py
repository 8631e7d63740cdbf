"""Each ONNX segment of a step by itself, run on eager's tensors; where in it values leave eager; and its files for Polygraphy.

    eager's forward:   x, time, prompt, slots | exchanges sent, received | inputs of LayerNorms | slots, flow
    a segment:         x, time, prompt, slots,  received, residual stream -> sent, residual stream, slots, flow

A graph's LayerNorms read the residual stream three times a layer and once in the head, in the same order as eager's. Their
inputs are made outputs of a copy of the graph, so that the first one that differs gives the layer and the part of it. Inputs
of a segment that eager does not have (rows of rotary tables) are taken from the previous segment.
"""

import shlex
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from causalrt.control_groups import available_cpus
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import Bundle
from causalrt.engines.step_record import StepPart
from causalrt.engines.tensor_names import KV_ROWS
from causalrt.errors import RequestError
from causalrt.proof.differences import TOLERANCE, TensorError, differences
from causalrt.proof.trace import StepId, StepTrace, exchange_name, residual_name
from causalrt.proof.traced_rollout import RolloutTrace

FOLDER = "polygraphy"
BUDGET_BYTES = 64 * 2**20
"""Largest size of all tensors written for Polygraphy; as JSON they take a third more."""

EAGER = "eager"
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentGraph:
    """A segment's graph, and the names that its values have in a trace of eager.

    Attributes:
        part: the segment in the bundle's manifest.
        model: the graph without its weights; the inputs of LayerNorms are among its outputs.
        words: the trace's name of each graph tensor that eager has too, in the order of the graph.
    """

    part: StepPart
    model: onnx.ModelProto
    words: Mapping[str, str]


@dataclass(kw_only=True, slots=True)
class SegmentRun:
    """Inputs and outputs of a segment for one forward of one rank, and what eager computed of the outputs."""

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
            elif name in outputs and name == "flow":
                words[name] = name
            elif name in outputs and name.endswith(".written"):
                words[name] = slots_name(name.removesuffix(".written"))
        graphs.append(SegmentGraph(part=part, model=model, words=words))
    return graphs


def slots_name(name: str) -> str:
    """The KV slots `k.LAYER.SHARD` in words."""
    kind, layer, shard = name.split(".")
    return f"layer {layer} KV slots {kind} of share {shard}"


def open_session(graph: SegmentGraph, folder: Path) -> ort.InferenceSession:
    """A session of the graph, with the weights of the bundle in `folder`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    options.log_severity_level = 3  # TensorScatter warns about every cache that is not bound in place
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_segments(
    bundle: Bundle, trace: RolloutTrace, places: Sequence[StepId]
) -> Iterator[tuple[SegmentGraph, list[SegmentRun]]]:
    """Run the segments in order on the traced forwards; only one of them is loaded at a time."""
    for step in range(len(bundle.steps)):
        forwards = [
            (place, rank, forward)
            for place in places
            for rank, forward in enumerate(trace.forwards(place))
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
                    outputs = {name: torch.as_tensor(value).cpu() for name, value in runner.infer(inputs).items()}
                    own |= {name: tensor.clone() for name, tensor in outputs.items()}
                    expected = {
                        name: eager[word] for name, word in graph.words.items() if word in eager and name in outputs
                    }
                    fed.append(SegmentRun(place=place, rank=rank, inputs=inputs, outputs=outputs, expected=expected))
            yield graph, fed


def _given(forward: StepTrace, rank: int) -> dict[str, torch.Tensor]:
    """Inputs of a step by their names in the graph."""
    given = {"x": forward.x, **forward.time, **forward.view.tensors()}
    for name, number in (("rank", rank), ("first_frame", forward.first_frame), (KV_ROWS, forward.view.kv_rows)):
        given[name] = torch.tensor([number])
    return {name: tensor.cpu() for name, tensor in given.items()}


def _known(forward: StepTrace) -> dict[str, torch.Tensor]:
    """The values of eager's forward by their names in `SegmentGraph.words`."""
    known = {residual_name(number): value for number, value in enumerate(forward.residuals)}
    for name, value in forward.outputs.items():
        known[slots_name(name) if name.startswith(("k.", "v.")) else name] = value
    return {word: value.cpu() for word, value in known.items()}


def compare_segment(graph: SegmentGraph, runs: Sequence[SegmentRun]) -> list[TensorError]:
    """Errors of every value that eager has too, forward by forward and rank by rank."""
    names = {word: name for name, word in graph.words.items()}
    errors = []
    for run in runs:
        words = [(name, word) for name, word in graph.words.items() if name in run.expected]
        expected, got = ({word: values[name] for name, word in words} for values in (run.expected, run.outputs))
        at = {"chunk": run.place[0], "forward": run.place[1], "rank": run.rank, "segment": graph.part.file}
        errors += [
            replace(
                error,
                name=f"chunk {run.place[0]} {run.place[1]}, {graph.part.file}, {error.name}, rank {run.rank}",
                where=at | {"value": error.name, "graph_tensor": names[error.name]},
            )
            for error in differences(expected, got)
        ]
    return errors


def explain(graph: SegmentGraph, error: TensorError) -> dict[str, Any]:
    """The operations between the last values that eager has too and the one that differs, the last operation first."""
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
    """The part of the model that computes a value."""
    if value == "flow":
        return "head"
    if "scatter_heads" in value:
        return f"{value.partition(' scatter')[0]} self-attention: q, k, v, their norms and rotation, packing"
    if "gather_heads" in value:
        return f"{value.partition(' gather')[0]} self-attention: attention over the KV slots"
    if "KV slots" in value:
        return f"{value.partition(' KV')[0]} self-attention: keys and values put into the KV slots"
    return value


class SavedSegments:
    """Inputs of segments and eager's outputs, written as Polygraphy's JSON until they would exceed the budget.

    Attributes:
        files: by segment, the files of inputs and outputs, relative to the certificate's folder.
        left_out: segments that would have exceeded the budget.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, tuple[str, str]] = {}
        self.left_out: list[str] = []
        self._folder, self._bytes = folder / FOLDER, 0

    def save(self, segment: Path, fed: SegmentRun) -> None:
        """Write one forward of one rank. Outputs that eager does not have (rows of rotary tables) are the segment's own.

        Raises:
            RequestError: the files cannot be written.
        """
        held = {value.name for value in onnx.load(segment, load_external_data=False).graph.output}
        outputs = {name: fed.expected.get(name, value) for name, value in fed.outputs.items() if name in held}
        size = sum(tensor.nbytes for tensor in (*fed.inputs.values(), *outputs.values()))
        if self._bytes + size > BUDGET_BYTES:
            self.left_out.append(segment.name)
            return
        self._bytes += size
        inputs_file, outputs_file = (f"{segment.stem}.{kind}.json" for kind in ("inputs", "outputs"))
        results = RunResults()
        results.add([_arrays(outputs)], runtime=0.0, runner_name=EAGER)
        try:
            self._folder.mkdir(exist_ok=True)
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
                save_json([_arrays(fed.inputs)], str(self._folder / inputs_file))
                results.save(str(self._folder / outputs_file))
        except OSError as error:
            raise RequestError(
                f"writing what Polygraphy reads of {segment.name} failed: {error}; choose another folder with --out"
            ) from error
        self.files[segment.name] = f"{FOLDER}/{inputs_file}", f"{FOLDER}/{outputs_file}"


def _arrays(tensors: Mapping[str, torch.Tensor]) -> "OrderedDict[str, Any]":
    return OrderedDict((name, tensor.numpy()) for name, tensor in tensors.items())


def command_line(bundle: Path, out: Path, segment: str, files: tuple[str, str]) -> str:
    """The command by which Polygraphy repeats the comparison of a segment."""
    words = ["polygraphy", "run", str(bundle / segment), "--onnxrt"]
    words += ["--load-inputs", str(out / files[0]), "--load-outputs", str(out / files[1])]
    return shlex.join([*words, "--atol", f"{TOLERANCE:g}", "--rtol", f"{TOLERANCE:g}"])
