"""The `tiny` recipe's step graph with fused ops: as functions, and as plugins."""

import functools

import onnx
import onnx_ir as ir
import torch

from causalrt.config import override
from causalrt.export.onnx import step_names
from causalrt.export.passes import PassContext
from causalrt.export.pipelines import STANDARD_OPS, TENSORRT_PLUGINS, apply
from causalrt.export.plugin_nodes import count_plugins
from causalrt.export.trace import trace_step
from causalrt.export.translate import onnx_from_program
from causalrt.model.wan.transformer import Wan
from causalrt.plugins.plugin_specs import SPECS
from causalrt.recipes import recipe

SPEC_BY_NAME = {spec.name: spec for spec in SPECS}


def fused_step(world_size, *, whole_slots=True, precision="float32", frames=None):
    """(config, the step's graph with fused ops, the caller's own copy); `frames` makes the KV slots as long."""
    config, graph = _fused_step(world_size, whole_slots, precision, frames)
    return config, onnx.ModelProto.FromString(graph)


@functools.cache
def _fused_step(world_size, whole_slots, precision, frames):
    changes = {"build.world_size": str(world_size), "build.precision": precision}
    if frames is not None:
        changes |= {"video.window_frames": "none", "video.sink_frames": "0", "video.horizon_frames": str(frames)}
    config = override(recipe("tiny"), changes)
    wan = Wan(config.model).to(getattr(torch, precision)).eval()
    program = trace_step(wan, config, whole_slots=whole_slots, fused=True)
    inputs, outputs = step_names(config, whole_slots=whole_slots, fused=True)
    graph = ir.to_proto(onnx_from_program(program, input_names=inputs, output_names=outputs))
    return config, graph.SerializeToString()


def with_plugins(world_size, *, num_multiprocessors=1, frames=None):
    config, model = fused_step(world_size, precision="bfloat16", frames=frames)
    before = {name for node in model.graph.node for name in node.output}
    apply_plugins(model, num_multiprocessors=num_multiprocessors)
    return config, model, before, count_plugins(model)


def apply_plugins(model, *, num_multiprocessors=1):
    apply(TENSORRT_PLUGINS, model, PassContext(capability=80, num_multiprocessors=num_multiprocessors))


def expanded(model):
    apply(STANDARD_OPS, model, PassContext())
    return model
