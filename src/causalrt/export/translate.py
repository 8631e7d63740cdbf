"""Translates an ExportedProgram to ONNX, opset 24, with torch's exporter and the ONNX forms of our custom ops."""

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.values import Opset
from torch.export import ExportedProgram

from causalrt.export.plugin_functions import add_functions, fused_translations
from causalrt.plugins.all_to_all import ONNX_DOMAIN, ONNX_OP, onnx_all_to_all
from causalrt.plugins.attention import onnx_attention, onnx_kv_attention, onnx_kv_attention_whole
from causalrt.plugins.rotate import onnx_rotate

OPSET = 24


def _translations(*, fused_as_nodes: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX forms of our ops in the form that the exporter expects: plain functions of the op's arguments."""
    if not onnx.defs.has(ONNX_OP, domain=ONNX_DOMAIN):
        parameter = onnx.defs.OpSchema.FormalParameter
        kinds = ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Any float")
        onnx.defs.register_schema(
            onnx.defs.OpSchema(
                ONNX_OP,
                ONNX_DOMAIN,
                1,
                inputs=[parameter("blocks", "T")],
                outputs=[parameter("received", "T")],
                type_constraints=[kinds],
            )
        )
    op, own = Opset("", OPSET), Opset(ONNX_DOMAIN, 1)
    ops = torch.ops.causalrt

    def rotate(x: Any, cos: Any, sin: Any, num_heads: int) -> Any:
        return onnx_rotate(op, x, cos, sin, num_heads)

    def attention(q: Any, k: Any, v: Any, num_heads: int) -> Any:
        return onnx_attention(op, q, k, v, num_heads)

    def kv_attention(q: Any, k_new: Any, v_new: Any, k_slots: Any, v_slots: Any, num_heads: int) -> Any:
        return onnx_kv_attention(op, q, k_new, v_new, k_slots, v_slots, num_heads)

    def kv_attention_whole(
        q: Any, k_new: Any, v_new: Any, k_slots: Any, v_slots: Any, kv_rows: Any, num_heads: int
    ) -> Any:
        return onnx_kv_attention_whole(op, q, k_new, v_new, k_slots, v_slots, kv_rows, num_heads)

    def all_to_all(blocks: Any) -> Any:
        return onnx_all_to_all(own, blocks)

    return {
        ops.rotate.default: rotate,
        ops.attention.default: attention,
        ops.kv_attention.default: kv_attention,
        ops.kv_attention_whole.default: kv_attention_whole,
        ops.all_to_all.default: all_to_all,
        **fused_translations(OPSET, as_nodes=fused_as_nodes),
    }


def onnx_from_program(program: ExportedProgram, *, input_names: Sequence[str], output_names: Sequence[str]) -> ir.Model:
    """Translate a traced program without copying tensors. Each fused op becomes a node with an ONNX function."""
    model = _translate(program, input_names, output_names, fused_as_nodes=True)
    add_functions(model, program, functools.partial(_translate, fused_as_nodes=False))
    return model


def _translate(
    program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str], *, fused_as_nodes: bool
) -> ir.Model:
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # silence: no torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        translated = torch.onnx.export(
            program,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table=_translations(fused_as_nodes=fused_as_nodes),
            optimize=fused_as_nodes,  # functions are small and written once, so they are not optimized
            verbose=False,
        )
    assert translated is not None
    for node in translated.model.graph:
        node.metadata_props.pop(
            "pkg.torch.onnx.stack_trace", None
        )  # contains install paths, which would make builds differ
    return translated.model
