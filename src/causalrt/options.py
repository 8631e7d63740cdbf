"""Types of options that several commands share: what the command line accepts, and how the help presents it.

A request is a frozen dataclass whose fields are the options of one command, annotated with these types. The help of an option
is its entry in the docstring of the request. Nothing here imports torch, so that `causalrt COMMAND --help` answers at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter, Token

from causalrt.config import Config, HeadPlanName, Precision, override
from causalrt.errors import ConfigError, Faults
from causalrt.recipes import RECIPES, recipe

INPUT = Group("Input", sort_key=1)
OUTPUT = Group("Output", sort_key=9)
EXECUTION = Group("Execution", sort_key=3)

ExecutorName = Literal["eager", "inductor", "onnxruntime", "tensorrt_rtx", "tensorrt"]
"""The keys of `engines.kinds.EXECUTORS`."""
OnOff = Literal["on", "off"]
DTYPES: Mapping[str, Precision] = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def _precision(_type: Any, tokens: Sequence[Token]) -> Precision:
    return DTYPES[tokens[0].value]


def _names(_type: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in tokens[0].value.split(",") if name.strip())
    if not names:
        raise ValueError("The list is empty; leave it out for all.")
    return names


def _numbers(_type: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    names = _names(_type, tokens)
    try:
        return tuple(map(int, names))
    except ValueError:
        raise ValueError(f"Give whole numbers, separated by commas, not {tokens[0].value!r}.") from None


Names = Annotated[Sequence[str], Parameter(converter=_names, n_tokens=1)]
"""Names in one argument, separated by commas."""
Numbers = Annotated[Sequence[int], Parameter(converter=_numbers, n_tokens=1)]
"""Whole numbers in one argument, separated by commas."""

RecipeName = Annotated[str, Parameter(group=INPUT, help=f"Name of the recipe: {', '.join(RECIPES)}.")]
Overrides = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        group=INPUT,
        metavar="FIELD=VALUE",
        help="Override a field of the recipe, for example `video.window_frames=9`; may be repeated.",
    ),
]
Dtype = Annotated[Precision, Parameter(converter=_precision, choices=tuple(DTYPES))]
HeadPlan = Annotated[
    HeadPlanName, Parameter(help="How attention is divided among ranks whose number does not divide that of the heads.")
]
Executor = Annotated[ExecutorName, Parameter(group=EXECUTION)]
Device = Annotated[
    Literal["cuda", "cpu"],
    Parameter(group=EXECUTION, help="Device of the ranks; GPUs by default, if there is one for each rank."),
]
CudaGraphs = Annotated[
    OnOff,
    Parameter(
        group=EXECUTION,
        help="Capture the steps of inductor and TensorRT as CUDA graphs on a GPU, which makes them faster.",
    ),
]
Threads = Annotated[int, Parameter(group=EXECUTION, help="CPU threads of each rank.")]
Timeout = Annotated[
    float,
    Parameter(
        group=EXECUTION,
        metavar="SECONDS",
        help="Time without a sign of life after which a rank counts as failed; 60 on GPUs and 600 on a CPU by default.",
    ),
]
TextEncoder = Annotated[
    Path,
    Parameter(
        group=INPUT,
        help="Folder of the text encoder: umT5 in Wan's or the diffusers layout, or a table of words.",
    ),
]
TextDevice = Annotated[str, Parameter(group=EXECUTION, help="Device of the text encoder: `cpu` or `cuda:N`.")]
Json = Annotated[bool, Parameter(group=OUTPUT, help="Print one JSON object on stdout.")]
FUSED_OPS = Parameter(name=("--fused-ops", "--plugins"))
"""The older name `--plugins` remains an alias."""


def configured(name: str, overrides: Sequence[str] = (), **build: object) -> Config:
    """The recipe `name` with its overrides, and with those of the fields of `build` that are not None.

    Raises:
        ConfigError: no such recipe, an override that is not FIELD=VALUE, or a value that cannot work; CombinedConfigError if
            several things are wrong.
    """
    changes, faults = {}, Faults()
    for text in overrides:
        field, separator, value = text.partition("=")
        with faults:
            if not separator:
                raise ConfigError(f"--set wants FIELD=VALUE, for example --set video.window_frames=9, got {text!r}")
            changes[field] = value
    changes |= {f"build.{field}": str(value) for field, value in build.items() if value is not None}
    with faults:
        config = override(recipe(name), changes)
    faults.report()
    return config


def default_dtype(overrides: Sequence[str], executors: Sequence[str]) -> Precision | None:
    """The precision where no option names one: bfloat16 for TensorRT, which has no fused attention for float32."""
    is_named = any(text.startswith("build.precision=") for text in overrides)
    return "bfloat16" if not is_named and any(name.startswith("tensorrt") for name in executors) else None


def flags(names: Sequence[str]) -> str:
    """Names of fields as the options that they are, for messages."""
    return ", ".join("--set" if name == "overrides" else f"--{name.replace('_', '-')}" for name in names)
