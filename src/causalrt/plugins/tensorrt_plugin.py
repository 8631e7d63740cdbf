"""TensorRT's quick-deployable plugins out of `plugin_specs`, with kernels compiled ahead of time: no Python runs in an engine.

    PluginSpec --> descriptor   shapes and types of the outputs, which of them are inputs written in place
               --> combination  the network's own types, linear; the tactics
               --> kernel       PTX for one GPU architecture, a constant grid, no arguments but pointers
               --> register, autotune, aot_impl under `causalrt::NAME`

TensorRT hands a kernel its inputs, then its extra arguments (there are none), then all its outputs. An output that is an
input written in place is counted among them: its pointer, a second time, comes last, so the kernel's entry is given a
parameter for it that nothing reads. All shapes must be static. Attributes are compiled into the kernel.

No engine with a plugin has been run: only TensorRT's own Python has been, over its bindings. That it counts outputs in place as
above is taken on trust. Whether it raises a kernel's limit of shared memory past 48 KiB is not documented: attention, whose
tiles want 64 to 128 KiB, has a second tactic that needs no more than that. The builder times both and takes the faster one.

For whoever builds: `enable_in_place(trt, config)`. An output in place must be an output of the network, bound to the address
of its input: TensorRT may put a copy before the plugin, and only such an output brings it back.
"""

import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from causalrt.errors import ExecutorError, KernelError, OperandError
from causalrt.plugins.kernel_launch import require_triton
from causalrt.plugins.plugin_spec import PluginSpec
from causalrt.plugins.plugin_specs import SPECS
from causalrt.plugins.ptx import CompiledKernel, compile_kernel

NAMESPACE = "causalrt"
THREADS_PER_WARP = 32

# By torch type, the member of TensorRT's DataType and what its plugin API calls the type in a combination.
TYPES = {
    torch.float32: ("FLOAT", "FP32"),
    torch.float16: ("HALF", "FP16"),
    torch.bfloat16: ("BF16", "BF16"),
    torch.int32: ("INT32", "INT32"),
    torch.int64: ("INT64", "INT64"),
}


@functools.cache
def register_plugins(trt: Any, *, target: int, cache: Path) -> None:
    """Register all plugins in this process; a second time, for the same GPU architecture, nothing happens.

    Args:
        trt: the TensorRT module.
        target: compute capability of the GPU to build for, such as 80.
        cache: folder of compiled kernels (`ptx.default_cache()`).

    Raises:
        ExecutorError: this TensorRT has no plugins that are compiled ahead of time.
        KernelError: no Triton here, or plugins of that name are there already.
    """
    api = plugin_api(trt)
    require_triton()
    there = [spec.name for spec in SPECS if hasattr(getattr(api.op, NAMESPACE, None), spec.name)]
    if there:
        raise KernelError(
            f"{NAMESPACE}::{there[0]} is registered in this process already, for another target than sm_{target} or with "
            "another cache; build for one target in a process"
        )
    for spec in SPECS:
        _register(trt, api, spec, target, cache)


def numpy_breaks_plugins(version: str) -> bool:
    """Whether the plugin API of this version of TensorRT fails under the NumPy that is installed."""
    return TorchVersion(version) < "11.2" and TorchVersion(np.__version__) >= "2.4"


def plugin_api(trt: Any) -> Any:
    """The module with the plugin API of a TensorRT.

    Raises:
        ExecutorError: it has none, or one that fails under the NumPy that is installed.
    """
    advice = "take executor tensorrt, or build with --plugins off"
    try:
        api = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise ExecutorError(f"{trt.__name__} has no plugin API ({error}); {advice}") from error
    if not hasattr(api, "aot_impl") or not hasattr(api, "KernelLaunchParams"):
        raise ExecutorError(f"{trt.__name__} {trt.__version__} cannot compile plugins ahead of time; {advice}")
    if numpy_breaks_plugins(trt.__version__):
        raise ExecutorError(
            f"the plugin API of TensorRT {trt.__version__} fails under NumPy {np.__version__}: before 11.2 it converts "
            "attributes in a way that NumPy refuses since 2.4; `pip install 'tensorrt-cu13>=11.2,<12'`, or build with "
            "--plugins off"
        )
    return api


def enable_in_place(trt: Any, config: Any) -> None:
    """Set what a builder config needs for outputs that are written in place."""
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)


def _register(trt: Any, api: Any, spec: PluginSpec, target: int, cache: Path) -> None:
    name = f"{NAMESPACE}::{spec.name}"
    api.register(name)(_descriptor(trt, api, spec))
    api.autotune(name)(_combination(trt, api, spec))
    api.aot_impl(name)(_kernel(trt, api, spec, target, cache))


def _with_signature(
    function: Callable[..., Any], names: Sequence[str], kinds: Sequence[Any], result: Any
) -> Callable[..., Any]:
    """`function` with the parameters that TensorRT reads a plugin's inputs and attributes from."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in zip(names, kinds, strict=True)
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return function


def _descriptor(trt: Any, api: Any, spec: PluginSpec) -> Callable[..., Any]:
    """Of the outputs, from descriptors of the inputs, whose dimensions may be symbols without a value."""

    def describe(*given: Any, **attributes: Any) -> tuple[Any, ...]:
        inputs = dict(zip(spec.inputs, given, strict=True))
        dims = {name: desc.shape_expr for name, desc in inputs.items()}
        dtypes = {name: _torch_type(trt, spec, name, desc) for name, desc in inputs.items()}
        written = [
            api.from_shape_expr(output.shape(dims, attributes), _trt_type(trt, output.dtype(dtypes, attributes)))
            for output in spec.outputs
        ]
        return (*written, *(inputs[name].aliased() for name in spec.in_place))

    kinds = [api.TensorDesc] * len(spec.inputs) + list(spec.attributes.values())
    result = types.GenericAlias(tuple, (api.TensorDesc,) * spec.num_outputs)
    return _with_signature(describe, [*spec.inputs, *spec.attributes], kinds, result)


def _combination(trt: Any, api: Any, spec: PluginSpec) -> Callable[..., Any]:
    """What the plugin takes: the types that the network has, and nothing but linear tensors; and its tactics."""

    def combine(*given: Any) -> list[Any]:
        *inputs, outputs = given
        names = [*spec.inputs, *(output.name for output in spec.outputs), *spec.in_place]
        found = [_torch_type(trt, spec, name, desc) for name, desc in zip(names, [*inputs, *outputs], strict=True)]
        io_types = ", ".join(TYPES[dtype][1] for dtype in found)
        return [api.AutoTuneCombination(io_types, "LINEAR", list(spec.tactics))]

    names = [*spec.inputs, "outputs"]
    return _with_signature(combine, names, [inspect.Parameter.empty] * len(names), list[api.AutoTuneCombination])


def _kernel(trt: Any, api: Any, spec: PluginSpec, target: int, cache: Path) -> Callable[..., Any]:
    """Name, PTX, launch parameters and extra arguments, from descriptors with shapes."""

    def compile_plugin(*given: Any) -> tuple[str, str, Any, Any]:
        *rest, _outputs, tactic = given
        inputs, values = rest[: len(spec.inputs)], rest[len(spec.inputs) :]
        tensors = {name: _without_data(trt, spec, name, desc) for name, desc in zip(spec.inputs, inputs, strict=True)}
        launch = spec.plan(tensors, dict(zip(spec.attributes, values, strict=True)), target, tactic)
        compiled = compile_kernel(launch, target=target, cache=cache)
        grid_x, grid_y, grid_z = launch.grid
        params = api.KernelLaunchParams(
            grid_x=grid_x,
            grid_y=grid_y,
            grid_z=grid_z,
            block_x=THREADS_PER_WARP * compiled.num_warps,
            shared_mem=compiled.shared_bytes,
        )
        return compiled.name, with_unread_pointers(compiled, len(spec.in_place)), params, api.SymIntExprs(0)

    names = [*spec.inputs, *spec.attributes, "outputs", "tactic"]
    result = tuple[str, str, api.KernelLaunchParams, api.SymIntExprs]
    return _with_signature(compile_plugin, names, [inspect.Parameter.empty] * len(names), result)


def with_unread_pointers(compiled: CompiledKernel, count: int) -> str:
    """The PTX of a kernel whose entry takes `count` more pointers, last, which it does not read."""
    entry = re.search(rf"\.entry {compiled.name}\(([^)]*?)\s*\)", compiled.ptx)
    assert entry is not None
    first = entry[1].count(".param")
    more = "".join(f",\n\t.param .u64 {compiled.name}_param_{first + number}" for number in range(count))
    return compiled.ptx[: entry.end(1)] + more + compiled.ptx[entry.end(1) :]


def _trt_type(trt: Any, dtype: torch.dtype) -> Any:
    return getattr(trt.DataType, TYPES[dtype][0])


def _torch_type(trt: Any, spec: PluginSpec, name: str, desc: Any) -> torch.dtype:
    for dtype in TYPES:
        if desc.dtype == _trt_type(trt, dtype):
            return dtype
    raise OperandError(f"{spec.name}: {name} is {desc.dtype}; take one of {', '.join(map(str, TYPES))}")


def _without_data(trt: Any, spec: PluginSpec, name: str, desc: Any) -> torch.Tensor:
    shape = tuple(desc.shape)
    if min(shape, default=0) < 0:
        raise OperandError(f"{spec.name}: {name} is {shape}; plugins take static shapes, as whole KV slots have them")
    return torch.empty(shape, dtype=_torch_type(trt, spec, name, desc), device="meta")
