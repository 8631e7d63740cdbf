"""Declaration of a TensorRT plugin as data: its tensors, attributes and launch, validated on construction."""

import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from causalrt.errors import KernelError, OperandError
from causalrt.plugins.kernel_launch import KernelLaunch, pointer_to

ATTRIBUTE_TYPES = (int, float)
RESERVED_NAMES = frozenset({"aot", "outputs", "stream", "tactic"})
"""Names with a special meaning: `aot` to TensorRT's ONNX parser, the others to its plugin functions."""

Attributes = Mapping[str, Any]
Dims = Mapping[str, Sequence[Any]]
"""Dimensions of each input: numbers, or symbols that support `+ - * //` as the left operand."""

Tensors = Mapping[str, torch.Tensor]
"""Tensors without data (device `meta`), which carry only shapes and types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSpec:
    """An output with its own memory, as opposed to an input that is written in place.

    Attributes:
        name: name of the kernel's parameter.
        dtype: function that computes the output's type from the types of the inputs and the attributes.
        shape: function that computes the output's dimensions from those of the inputs and the attributes.
    """

    name: str
    dtype: Callable[[Mapping[str, torch.dtype], Attributes], torch.dtype]
    shape: Callable[[Dims, Attributes], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginSpec:
    """A plugin with one kernel.

    Attributes:
        name: name without the namespace.
        inputs: names of the kernel's first parameters.
        outputs: the kernel's other parameters.
        in_place: inputs that are also outputs; they follow `outputs`.
        attributes: names and types, in the order in which TensorRT passes them.
        launch: function that plans the launch from inputs, attributes, compute capability and tactic.
        tactics: positive numbers of the kernel's variants, of which TensorRT uses the fastest; empty if there is only one.

    Raises:
        KernelError: TensorRT would reject the plugin.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[OutputSpec, ...]
    in_place: tuple[str, ...]
    attributes: Mapping[str, type]
    launch: Callable[[Tensors, Attributes, int, int], KernelLaunch]
    tactics: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [*self.inputs, *(output.name for output in self.outputs), *self.attributes]
        for name in (self.name, *names):
            if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED_NAMES:
                raise KernelError(f"plugin {self.name!r}: {name!r} cannot be a name; take another identifier")
        if len(set(names)) < len(names):
            raise KernelError(f"plugin {self.name!r}: inputs, outputs and attributes share a name: {names}; rename one")
        if not self.inputs or not self.outputs:
            raise KernelError(f"plugin {self.name!r}: inputs are {self.inputs}, outputs {self.outputs}; it needs both")
        if len(set(self.in_place)) < len(self.in_place) or not set(self.in_place) <= set(self.inputs):
            raise KernelError(
                f"plugin {self.name!r}: in_place is {self.in_place}; take each once, out of the inputs {self.inputs}"
            )
        for name, kind in self.attributes.items():
            if kind not in ATTRIBUTE_TYPES:
                wanted = ", ".join(allowed.__name__ for allowed in ATTRIBUTE_TYPES)
                raise KernelError(f"plugin {self.name!r}: attribute {name!r} is of type {kind}; take one of {wanted}")

        if any(tactic < 1 for tactic in self.tactics):
            raise KernelError(f"plugin {self.name!r}: tactics are {self.tactics}; take positive numbers")

    @property
    def num_outputs(self) -> int:
        """Number of outputs, including those written in place."""
        return len(self.outputs) + len(self.in_place)

    def plan(self, inputs: Tensors, attributes: Attributes, capability: int, tactic: int = 0) -> KernelLaunch:
        """Plan the launch, whose parameters are the inputs and then `outputs`.

        Args:
            inputs: input tensors by name.
            attributes: attribute values by name.
            capability: compute capability, such as 80.
            tactic: one of `tactics`, or 0 for the first or only one.

        Raises:
            OperandError: shapes or types are inconsistent.
            KernelError: the kernel does not support them.
        """
        launch = self.launch(inputs, attributes, capability, tactic)
        assert list(launch.signature) == [*self.inputs, *(output.name for output in self.outputs)], launch.signature
        dtypes = {name: tensor.dtype for name, tensor in inputs.items()}
        dtypes |= {output.name: output.dtype(dtypes, attributes) for output in self.outputs}
        for name, kind in launch.signature.items():
            if pointer_to(dtypes[name]) != kind:
                raise OperandError(f"{self.name}: {name} is {dtypes[name]}, and the kernel takes {kind.lstrip('*')}")
        return launch
