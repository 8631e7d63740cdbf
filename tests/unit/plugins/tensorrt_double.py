"""Stands in for TensorRT where plugins are registered and compiled: no part of it runs without libnvinfer.

Two of them. `small_api` is a plugin API of our own, with the little that registration uses. `library_api` is TensorRT's own
plugin API, its Python taken from the wheel `tensorrt_cu13_bindings` and run over stand-ins for what it wants of C++; it checks
signatures, describes outputs and launches kernels just as in a build. The wheel need not be importable, only installed.
Names, enums and descriptors of both come from `tensorrt_rtx`, which has them all, but for plugins compiled ahead of time.
"""

import enum
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

LIBRARY = "tensorrt_bindings"


class Built(NamedTuple):
    """What TensorRT knows of a plugin once it has built it."""

    dtypes: list
    shapes: list
    aliases: list  # for each output, the input that it is written over, or -1
    combinations: list  # (type, format) of each input and output
    kernel: str
    ptx: str
    launch: dict
    extra_arguments: list


class Expr:
    """A dimension: a number, known at build time."""

    def __init__(self, value):
        self.value = value

    def is_constant(self):
        return True

    def get_constant_value(self):
        return self.value


class ExprBuilder:
    def constant(self, value):
        return Expr(value)

    def operation(self, op, first, second):
        a, b = first.value, second.value
        name = op.name
        return Expr({"SUM": a + b, "SUB": a - b, "PROD": a * b, "FLOOR_DIV": a // b if b else None}[name])


class Exprs(list):
    def __init__(self, length):
        super().__init__([None] * length)


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name, version, namespace):
        assert version == "1"
        return self.creators[namespace, name]


def make_trt():
    """A module `tensorrt` without `plugin`."""
    import tensorrt_rtx

    trt = types.ModuleType("tensorrt")
    trt.__dict__.update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")})
    trt.__version__, trt.__path__ = "11.4.0.106", []
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr, trt.IExprBuilder, trt.DimsExprs = Expr, ExprBuilder, Exprs
    trt.QuickPluginCreationRequest = enum.Enum(
        "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT"
    )
    for name in ("ISymExpr", "ITensor", "IPluginV3QuickAOTBuild"):
        setattr(trt, name, type(name, (), {}))
    return trt


# ---- the library's own API


def has_library():
    return importlib.util.find_spec(LIBRARY) is not None


def library_api():
    """Load TensorRT's `plugin` package, over the `tensorrt` in `sys.modules`."""
    folder = Path(importlib.util.find_spec(LIBRARY).origin).parent / "plugin"
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    api = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = api
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # escapes in its docstrings
        spec.loader.exec_module(api)
    return api


def build_with_library(trt, api, name, inputs, attributes):
    """Take a plugin through a build, in TensorRT's order, from an ONNX node's point of view.

    Args:
        inputs: (DataType, shape) of each.
        attributes: as the node has them, in any order.
    """
    creator = trt.get_plugin_registry().get_creator(name, "1", "causalrt")
    # TensorRT's parser goes by the creator's names and the node's types: INT is int32, FLOAT is float32.
    narrow = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    fields = []
    for field in creator.field_names:
        dtype, kind = narrow[type(attributes[field.name])]
        fields.append(trt.PluginField(field.name, np.array([attributes[field.name]], dtype), kind))
    plugin = creator.create_plugin(
        name,
        "causalrt",
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    builder, count = trt.IExprBuilder(), len(inputs)
    dtypes = plugin.get_output_data_types([dtype for dtype, _ in inputs], [len(shape) for _, shape in inputs])
    shapes = plugin.get_output_shapes([[Expr(size) for size in shape] for _, shape in inputs], [], builder)
    shapes = [tuple(expr.value for expr in shape) for shape in shapes]
    descs = [_desc(trt, dtype, shape) for dtype, shape in [*inputs, *zip(dtypes, shapes, strict=True)]]
    combinations = plugin.get_supported_format_combinations(descs, count)
    plugin.configure_plugin(descs[:count], descs[count:])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    launch, extra = types.SimpleNamespace(), Extra()
    plugin.get_launch_params(None, descs, count, launch, extra, builder)
    kernel, ptx = plugin.get_kernel([desc.desc for desc in descs[:count]], [desc.desc for desc in descs[count:]])
    return Built(
        dtypes=list(dtypes),
        shapes=shapes,
        aliases=[plugin.get_aliased_input(number) for number in range(plugin.get_num_outputs())],
        combinations=[(desc.type, desc.format) for desc in combinations],
        kernel=kernel,
        ptx=ptx.decode(),
        launch={key: expr.expr.get_constant_value() for key, expr in vars(launch).items()},
        extra_arguments=list(extra.values()),
    )


class Extra(dict):
    nbSymExprs = None  # noqa: N815 (TensorRT's name)


def _desc(trt, dtype, shape):
    desc = trt.DynamicPluginTensorDesc()
    static = trt.PluginTensorDesc()
    static.dims, static.type, static.format, static.scale = shape, dtype, trt.TensorFormat.LINEAR, 1.0
    desc.desc, desc.min, desc.max, desc.opt = static, shape, shape, shape
    return desc


# ---- a small API of our own


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


def build_with_small(trt, api, name, inputs, attributes):
    """What `build_with_library` does, with the small API."""
    functions = api.registered[f"causalrt::{name}"]
    given = [TensorDesc(shape, dtype, shape) for dtype, shape in inputs]
    outputs = functions["register"](*given, **attributes)
    for output in outputs:
        output.shape = output.shape_expr
    ((combination, layout),) = functions["autotune"](*given, outputs)
    assert layout == "LINEAR"
    names = {"FP32": "FLOAT", "FP16": "HALF"}
    order = list(functions["aot_impl"].__signature__.parameters)
    values = [attributes[key] for key in order[len(inputs) : -2]]
    kernel, ptx, launch, extra = functions["aot_impl"](*given, *values, outputs, 0)
    return Built(
        dtypes=[output.dtype for output in outputs],
        shapes=[tuple(output.shape) for output in outputs],
        aliases=[-1 if output.alias is None else given.index(output.alias) for output in outputs],
        combinations=[
            (getattr(trt.DataType, names.get(kind, kind)), trt.TensorFormat.LINEAR) for kind in combination.split(", ")
        ],
        kernel=kernel,
        ptx=ptx,
        launch=vars(launch),
        extra_arguments=extra,
    )
