"""Writes the bundle's ONNX files: the prompt, time and step graphs, which all refer to one weight file."""

from pathlib import Path

import onnx
import onnx_ir as ir

from causalrt.config import Config
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH, WEIGHTS
from causalrt.engines.step_record import StepPart
from causalrt.engines.tensor_names import KV_ROWS
from causalrt.export.passes import PassContext, step_context
from causalrt.export.pipelines import ONNXRUNTIME_FLOAT32, SHARE_WEIGHTS, apply
from causalrt.export.plugin_functions import check_fused_nodes
from causalrt.export.segment import cut_at_exchanges
from causalrt.export.trace import trace_prompt, trace_step, trace_time
from causalrt.export.translate import onnx_from_program
from causalrt.layout import layout_from_config
from causalrt.model.wan.conditioning import TIME_NAMES, prompt_names
from causalrt.model.wan.transformer import Wan
from causalrt.progress import Progress


def step_names(config: Config, *, whole_slots: bool = False, fused: bool = False) -> tuple[list[str], list[str]]:
    """Names of the step graph's inputs and outputs, in the order of `ChunkStep.forward`."""
    layers, shards = range(config.model.num_layers), range(len(layout_from_config(config).shards))
    slots = [f"{kind}.{layer}.{shard}" for layer in layers for shard in shards for kind in ("k", "v")]
    inputs = ["x", *TIME_NAMES, "rank", "first_frame", *slots, *prompt_names(config.model.num_layers)]
    return [*inputs, *([KV_ROWS] if whole_slots or fused else [])], ["flow", *(f"{name}.written" for name in slots)]


def write_small_graphs(wan: Wan, config: Config, folder: Path, on_progress: Progress) -> None:
    """Trace, translate and write the prompt graph and the time graph; `folder` must already contain the weights."""
    small = (
        (PROMPT_GRAPH, trace_prompt, ["text"], prompt_names(config.model.num_layers)),
        (TIME_GRAPH, trace_time, ["sinusoid"], TIME_NAMES),
    )
    for done, (name, trace, inputs, outputs) in enumerate(small):
        on_progress("prompt and time graph", done, len(small))
        translated = onnx_from_program(trace(wan), input_names=inputs, output_names=outputs)
        onnx.save(with_shared_weights(translated, folder / WEIGHTS), folder / name)
    on_progress("prompt and time graph", len(small), len(small))


def with_shared_weights(translated: ir.Model, weights: Path) -> onnx.ModelProto:
    """Convert a translated graph to the form that is saved, which refers to the file `weights` in the same folder."""
    apply(SHARE_WEIGHTS, translated, PassContext(weights=weights))
    return ir.to_proto(translated)


def step_prefix(config: Config, step: int) -> str:
    """Prefix of the names of a step's files: empty for step 0, `1-frame-` for a step of one frame."""
    return f"{config.video.step_frames[step]}-frame-" if step else ""


def step_graph(
    wan: Wan,
    config: Config,
    folder: Path,
    on_progress: Progress,
    *,
    whole_slots: bool,
    fused: bool = False,
    step: int = 0,
) -> onnx.ModelProto:
    """Trace and translate one kind of step, over the filled prefix of the KV slots or over the whole slots.

    Raises:
        RuntimeError: fused ops were requested, but not every layer has them.
    """
    stage = f"{step_prefix(config, step)}step graph ({'whole slots' if whole_slots else 'segments'})"
    on_progress(stage, 0, 2)
    program = trace_step(wan, config, whole_slots=whole_slots, fused=fused, step=step)
    on_progress(stage, 1, 2)
    inputs, outputs = step_names(config, whole_slots=whole_slots, fused=fused)
    translated = onnx_from_program(program, input_names=inputs, output_names=outputs)
    graph = with_shared_weights(translated, folder / WEIGHTS)
    if fused:
        check_fused_nodes(graph, num_layers=config.model.num_layers)
    on_progress(stage, 2, 2)
    return graph


def runtime_graph(step: onnx.ModelProto, config: Config) -> onnx.ModelProto:
    """Create the graph that ONNX Runtime runs for a step over the filled prefix; `step` itself is not modified.

    Raises:
        RuntimeError: some layers do not have their attentions in the form that `fuse_attention_pass` expects.
    """
    if config.build.precision != "float32":  # on a CPU, MultiHeadAttention has float32 kernels only
        return step
    fused = onnx.ModelProto()
    fused.CopyFrom(step)
    apply(ONNXRUNTIME_FLOAT32, fused, step_context(config))
    return fused


def write_segments(
    step: onnx.ModelProto, folder: Path, name: str, on_progress: Progress, *, at_cache_writes: bool
) -> tuple[StepPart, ...]:
    """Cut a step graph into segments, write them, and return their records in execution order."""
    parts = []
    cut = cut_at_exchanges(step, at_cache_writes=at_cache_writes)
    for index, segment in enumerate(cut):
        file = f"{name}-{index:03d}.onnx"
        onnx.save(segment.model, folder / file)
        parts.append(StepPart(file=file, sent=segment.sent, received=segment.received, writes=dict(segment.writes)))
        on_progress("segments", index + 1, len(cut))
    return tuple(parts)
