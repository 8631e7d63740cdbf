"""Takes plugins through a build with NVIDIA's own bindings, in a process that `real_bindings` has prepared.

Everything is NVIDIA's but what needs the library behind the bindings: the registry, and expressions of dimensions.
"""

import importlib
import sys
import types

import numpy as np

from support.tensorrt_double import Built


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


def imported():
    """The module `tensorrt`, with stand-ins for what the library would do."""
    import tensorrt as trt

    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr, trt.IExprBuilder, trt.DimsExprs = Expr, ExprBuilder, Exprs
    trt.ISymExpr = type("ISymExpr", (), {})  # takes the address of an expression
    return trt


def plugin_api():
    """`tensorrt.plugin`, loaded anew: it keeps what has been registered."""
    for name in [name for name in sys.modules if name.startswith(("tensorrt.plugin", "tensorrt_bindings.plugin"))]:
        del sys.modules[name]
    return importlib.import_module("tensorrt.plugin")


def build_with_library(trt, api, name, inputs, attributes, tactic=None):
    """Take a plugin through a build, in TensorRT's order, from an ONNX node's point of view.

    Args:
        inputs: (DataType, shape) of each.
        attributes: as the node has them, in any order.
        tactic: one of those that the plugin advertises; the first where it is left out.
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
    tactics = sorted(plugin.get_valid_tactics())
    assert tactic is None or tactic in tactics
    plugin.set_tactic(tactic or min(tactics, default=0))
    launch, extra = types.SimpleNamespace(), Extra()
    plugin.get_launch_params(None, descs, count, launch, extra, builder)
    assert set(vars(launch)) <= set(dir(trt.KernelLaunchParams))
    kernel, ptx = plugin.get_kernel([desc.desc for desc in descs[:count]], [desc.desc for desc in descs[count:]])
    return Built(
        dtypes=list(dtypes),
        shapes=shapes,
        aliases=[plugin.get_aliased_input(number) for number in range(plugin.get_num_outputs())],
        combinations=[(desc.type, desc.format) for desc in combinations],
        tactics=tactics,
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
