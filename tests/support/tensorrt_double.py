"""Stands in for TensorRT where plugins are registered and compiled: a module with types, and a plugin API with the little that
registration uses. `over_bindings_tensorrt_plugin.py` holds it against NVIDIA's own.
"""

import enum
import sys
import types
from typing import NamedTuple

from causalrt.plugins.tensorrt_plugin import TYPES


class Built(NamedTuple):
    """What TensorRT knows of a plugin once it has built it."""

    dtypes: list
    shapes: list
    aliases: list  # for each output, the input that it is written over, or -1
    combinations: list  # (type, format) of each input and output
    tactics: list  # ways to compute it that are timed, by number; none where there is one
    kernel: str
    ptx: str
    launch: dict
    extra_arguments: list


def make_trt():
    """A module `tensorrt` without `plugin`."""
    trt = types.ModuleType("tensorrt")
    trt.__version__ = "11.4.0.106"
    trt.DataType = enum.Enum("DataType", [name for name, _ in TYPES.values()])
    trt.TensorFormat = enum.Enum("TensorFormat", ["LINEAR"])
    return trt


class TensorDesc:
    def __init__(self, shape_expr, dtype, shape=None, alias=None):
        self.shape_expr, self.dtype, self.shape, self.alias = shape_expr, dtype, shape, alias

    def aliased(self):
        return TensorDesc(self.shape_expr, self.dtype, self.shape, alias=self)


class KernelLaunchParams:
    def __init__(self, grid_x=1, grid_y=1, grid_z=1, block_x=1, block_y=1, block_z=1, shared_mem=0):
        self.__dict__.update({key: value for key, value in locals().items() if key != "self"})


def small_api():
    """A module `tensorrt.plugin` that keeps what is registered."""
    api = types.ModuleType("tensorrt.plugin")
    api.op, api.registered = types.SimpleNamespace(), {}

    def decorator(kind):
        def of(plugin_id):
            namespace, name = plugin_id.split("::")
            if not hasattr(api.op, namespace):
                setattr(api.op, namespace, types.SimpleNamespace())
            setattr(getattr(api.op, namespace), name, plugin_id)
            return lambda function: api.registered.setdefault(plugin_id, {}).setdefault(kind, function)

        return of

    api.register, api.autotune, api.aot_impl = decorator("register"), decorator("autotune"), decorator("aot_impl")
    api.TensorDesc, api.KernelLaunchParams, api.SymIntExprs = TensorDesc, KernelLaunchParams, lambda n: [None] * n
    api.AutoTuneCombination = type("AutoTuneCombination", (tuple,), {"__new__": lambda cls, *a: tuple.__new__(cls, a)})
    api.from_shape_expr = TensorDesc
    sys.modules["tensorrt.plugin"] = api
    return api


def build_with_small(trt, api, name, inputs, attributes, tactic=None):
    """What `library_double.build_with_library` does, with the small API."""
    functions = api.registered[f"causalrt::{name}"]
    given = [TensorDesc(shape, dtype, shape) for dtype, shape in inputs]
    outputs = functions["register"](*given, **attributes)
    for output in outputs:
        output.shape = output.shape_expr
    ((combination, layout, tactics),) = functions["autotune"](*given, outputs)
    assert layout == "LINEAR"
    assert tactic is None or tactic in tactics
    names = {"FP32": "FLOAT", "FP16": "HALF"}
    order = list(functions["aot_impl"].__signature__.parameters)
    values = [attributes[key] for key in order[len(inputs) : -2]]
    kernel, ptx, launch, extra = functions["aot_impl"](*given, *values, outputs, tactic or min(tactics, default=0))
    return Built(
        dtypes=[output.dtype for output in outputs],
        shapes=[tuple(output.shape) for output in outputs],
        aliases=[-1 if output.alias is None else given.index(output.alias) for output in outputs],
        combinations=[
            (getattr(trt.DataType, names.get(kind, kind)), trt.TensorFormat.LINEAR) for kind in combination.split(", ")
        ],
        tactics=tactics,
        kernel=kernel,
        ptx=ptx,
        launch=vars(launch),
        extra_arguments=extra,
    )
