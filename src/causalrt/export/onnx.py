"""The bundle's ONNX files: prompt, time, and the segments of the step, all referring to one weight file."""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from causalrt.config import Config
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH, WEIGHTS
from causalrt.export.build import Progress
from causalrt.export.segment import cut_exchanges_pass
from causalrt.export.share_weights import share_weights_pass
from causalrt.export.trace import trace_prompt, trace_step, trace_time, wan_from_file
from causalrt.export.translate import onnx_from_program
from causalrt.layout import layout_from_config


def cross_kv_names(config: Config) -> list[str]:
    """Names of the prompt's keys and values: outputs of the prompt graph, inputs of the step graph."""
    return [f"cross_{kind}.{layer}" for layer in range(config.model.num_layers) for kind in ("k", "v")]


def step_names(config: Config) -> tuple[list[str], list[str]]:
    """Names of the step graph's inputs and outputs, in the order of `ChunkStep.forward`."""
    layers, shares = range(config.model.num_layers), range(len(layout_from_config(config).shares))
    slots = [f"{kind}.{layer}.{share}" for layer in layers for share in shares for kind in ("k", "v")]
    inputs = ["x", "e", "e0", "rank", "first_frame", *slots, *cross_kv_names(config)]
    return inputs, ["flow", *(f"{name}.written" for name in slots)]


def write_onnx_graphs(config: Config, folder: Path, on_progress: Progress) -> dict[str, Any]:
    """Trace, translate, cut and write; `folder` already holds the weights.

    Returns:
        What the manifest says of the graphs: the segments in order, each with its file and the exchange that follows it.
    """
    weights = folder / WEIGHTS
    wan = wan_from_file(config, weights)
    small = (
        (PROMPT_GRAPH, trace_prompt, ["text"], cross_kv_names(config)),
        (TIME_GRAPH, trace_time, ["sinusoid"], ["e", "e0"]),
    )
    for done, (name, trace, inputs, outputs) in enumerate(small):
        on_progress("graphs", done, len(small) + 2)
        translated = onnx_from_program(trace(wan), input_names=inputs, output_names=outputs)
        onnx.save(ir.to_proto(share_weights_pass(translated, weights)), folder / name)
    on_progress("graphs", len(small), len(small) + 2)
    program = trace_step(wan, config)
    on_progress("graphs", len(small) + 1, len(small) + 2)
    inputs, outputs = step_names(config)
    step = share_weights_pass(onnx_from_program(program, input_names=inputs, output_names=outputs), weights)
    on_progress("graphs", len(small) + 2, len(small) + 2)
    segments = []
    cut = cut_exchanges_pass(ir.to_proto(step))
    for index, segment in enumerate(cut):
        name = f"step-{index:03d}.onnx"
        onnx.save(segment.model, folder / name)
        segments.append({"file": name, "sent": segment.sent, "received": segment.received})
        on_progress("segments", index + 1, len(cut))
    return {"segments": segments}
