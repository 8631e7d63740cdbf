"""The `torch-tensorrt` front end: converts the traced program to an engine with torch_tensorrt's converters, without ONNX.

    torch.export -> torch_tensorrt's decompositions and passes -> its aten converters + ours (`op_layers`) -> engine

The result is equivalent to that of the `engine` lowering: three engines, with the whole step in one of them and KV slots
updated in place. The weights stay on the CPU, where TensorRT reads them; torch_tensorrt and TensorRT's builder require the GPU
that the engines are built for. torch_tensorrt names an engine's tensors after the graph's placeholders and `output0`,
`output1`...; the record maps these names to ours.
"""

import functools
import gc
import importlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from causalrt.config import Config
from causalrt.engines.bundle import WEIGHTS
from causalrt.engines.tensorrt_flavour import Flavour, device_target
from causalrt.errors import BuildError, ConfigError, ExecutorError
from causalrt.export.engine_network import check_network, describe_network
from causalrt.export.onnx import step_names, step_prefix
from causalrt.export.torch_tensorrt.op_layers import add_all_to_all, add_attention, add_kv_attention_whole, add_rotate
from causalrt.export.trace import trace_prompt, trace_step, trace_time, wan_from_file
from causalrt.install_hint import install_extra
from causalrt.model.wan.conditioning import TIME_NAMES, prompt_names
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.user_cache import keep_in_cache

DEVICE = torch.device("cuda", 0)
TRT_DTYPES = {torch.bfloat16: "BF16", torch.float16: "HALF", torch.float32: "FLOAT", torch.int64: "INT64"}


def load_torch_tensorrt() -> Any:
    """Import torch_tensorrt.

    Raises:
        ExecutorError: it is not installed or cannot be imported; importing it requires CUDA.
    """
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # its libraries, or a torch without CUDA, can raise anything
        raise ExecutorError(
            f"--frontend torch-tensorrt needs the Python module torch_tensorrt, which does not import here "
            f"({type(error).__name__}: {error}); install it with `{install_extra('torch-tensorrt')}` on a machine with a GPU "
            "and a CUDA build of torch, or leave the option out: the ONNX front end makes the same engines"
        ) from error


def driven_flavour(torch_tensorrt: Any) -> str:
    """Name of the TensorRT flavour that the installed torch_tensorrt is built for."""
    return "tensorrt_rtx" if torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx else "tensorrt"


def check_torch_tensorrt(flavours: tuple[str, ...], collectives: str) -> None:
    """Reject options that this front end does not support, before the build starts.

    Args:
        flavours: TensorRT flavours of the engines to build on this machine; engines built elsewhere need no installation here.
        collectives: whether the `engine` or the `runtime` runs the all-to-alls.

    Raises:
        ConfigError: runtime collectives are requested.
        ExecutorError: torch_tensorrt cannot be imported, or is built for another TensorRT flavour than the requested one.
    """
    if collectives != "engine":
        raise ConfigError(
            f"--frontend torch-tensorrt makes one engine of the whole step, and --collectives {collectives} cuts the step, "
            "which is done on ONNX; leave out one of the two options"
        )
    if not flavours:
        return
    driven = driven_flavour(load_torch_tensorrt())
    refused = [name for name in flavours if name != driven]
    if refused:
        raise ExecutorError(
            f"the torch_tensorrt that is installed here drives {driven}, not {refused[0]}; build with `--executor {driven}`, "
            "or with `--frontend onnx`"
        )


def build_with_torch_tensorrt(
    config: Config, folder: Path, on_progress: Progress, *, flavour: Flavour, target: str, timing_cache: Path | None
) -> dict[str, Any]:
    """Build the engines for the local GPU, in this process.

    Args:
        config: the bundle's config.
        folder: the bundle's folder, which contains the weights.
        on_progress: called at the start and the end of each engine.
        flavour: the TensorRT flavour that the installed torch_tensorrt is built for.
        target: architecture of the local GPU.
        timing_cache: file of measured kernel times, read and written; ignored by a flavour that measures nothing.

    Returns:
        The engines' record for the manifest: that of `build_engines` plus `names`, which maps each engine file to our names of
        its tensors.

    Raises:
        BuildError: torch_tensorrt or TensorRT rejected a graph, or the resulting network does not match it.
        ExecutorError: torch_tensorrt is not installed, or the target is not the local GPU.
    """
    torch_tensorrt, trt = load_torch_tensorrt(), flavour.load()
    here = device_target(DEVICE)
    if target != here:
        raise ExecutorError(
            f"torch_tensorrt builds for the GPU at hand, which is {here}, not for {target}; build on such a GPU, or with "
            "`--frontend onnx`"
        )
    wan = wan_from_file(config, folder / WEIGHTS)
    graphs: tuple[tuple[str, Callable[[], ExportedProgram], Sequence[str], Sequence[str]], ...] = (
        ("prompt", lambda: trace_prompt(wan), ["text"], prompt_names(config.model.num_layers)),
        ("time", lambda: trace_time(wan), ["sinusoid"], TIME_NAMES),
        *(
            (
                f"{step_prefix(config, step)}whole-step",
                functools.partial(trace_step, wan, config, whole_slots=True, step=step),
                *step_names(config, whole_slots=True),
            )
            for step in range(len(config.video.step_frames))
        ),
    )
    prefix = f"{flavour.name}-{target}"
    names: dict[str, dict[str, str]] = {}
    networks: dict[str, dict[str, Any]] = {}
    with (
        registered_converters(trt) as contexts,
        _scratch_cache(timing_cache if flavour.timing_cache else None) as cache,
    ):
        for done, (stem, trace, inputs, outputs) in enumerate(graphs):
            on_progress(f"engines for {target}", done, len(graphs))
            file, program = f"{prefix}-{stem}.engine", trace()
            names[file] = tensor_names(program, inputs, outputs)
            expected, known = (
                expected_layers(program),
                describe_program(program),
            )  # before the conversion modifies the program
            (folder / file).write_bytes(_convert(torch_tensorrt, program, stem, cache))
            network = (
                describe_network(trt, contexts[0].net) if contexts else known
            )  # the context keeps the constants alive
            contexts.clear()
            check_network(network, expected=expected, onnx_file=f"the traced {stem}")
            networks[file] = rename_tensors(network, names[file])
            del program
            gc.collect()
    on_progress(f"engines for {target}", len(graphs), len(graphs))
    (folder / f"{prefix}-networks.json").write_text(json.dumps(networks, indent=1))
    prompt, time, *steps = names
    return {
        "version": trt.__version__,
        "networks": f"{prefix}-networks.json",
        "prompt": prompt,
        "time": time,
        "steps": [[engine] for engine in steps],
        "names": names,
    }


def tensor_names(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Map torch_tensorrt's name of each engine tensor to ours; `inputs` and `outputs` are in the program's order."""
    signature = program.graph_signature
    made = [f"output{index}" for index in range(len(signature.user_outputs))]
    return dict(zip([*signature.user_inputs, *made], [*inputs, *outputs], strict=True))


@contextmanager
def registered_converters(trt: Any) -> Iterator[list[Any]]:
    """Register the functions of `op_layers` as torch_tensorrt's converters for our ops.

    The registry is global to the process and converters cannot be removed, so the converters of each call take precedence over
    those of earlier calls.

    Yields:
        A list with the context of the current conversion, empty until the conversion reaches one of our ops. The context owns
        the network and the memory of the network's constants.
    """
    conversion = importlib.import_module("torch_tensorrt.dynamo.conversion")
    contexts: list[Any] = []

    def converter(add: Callable[..., Any]) -> Callable[..., Any]:
        def convert(context: Any, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
            if not contexts:
                contexts.append(context)
            assert not kwargs
            return add(trt, context.net, name, *args)

        return convert

    ops = torch.ops.causalrt
    for op, add in (
        (ops.rotate, add_rotate),
        (ops.attention, add_attention),
        (ops.kv_attention_whole, add_kv_attention_whole),
        (ops.all_to_all, add_all_to_all),
    ):
        first = conversion.ConverterPriority.HIGH
        conversion.dynamo_tensorrt_converter(op.default, priority=first)(converter(add))
    try:
        yield contexts
    finally:
        contexts.clear()


@contextmanager
def _scratch_cache(kept: Path | None) -> Iterator[Path]:
    """Copy the kept timing cache to a file that torch_tensorrt may write to; on success the copy replaces the original."""
    with TemporaryFolder("timing") as scratch:
        cache = scratch / "timing.cache"
        if kept is not None and kept.exists():
            shutil.copyfile(kept, cache)
        yield cache
        if kept is not None and cache.exists():
            keep_in_cache(kept, cache.read_bytes())


def _convert(torch_tensorrt: Any, program: ExportedProgram, stem: str, cache: Path) -> bytes:
    """Build one engine; every size is static, so the arguments of the trace fully describe the inputs."""
    arguments, _ = program.example_inputs
    try:
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=arguments,
            device=DEVICE,
            offload_module_to_cpu=True,  # the weights are on the CPU already, not on the GPU
            timing_cache_path=str(cache),
        )
    except Exception as error:  # torch_tensorrt raises RuntimeError, AssertionError or ValueError
        raise BuildError(
            f"torch_tensorrt {torch_tensorrt.__version__} cannot make an engine of the traced {stem}: "
            f"{type(error).__name__}: {error}\nBuild with `--frontend onnx`, and report what it refused"
        ) from error
    return bytes(engine)


def expected_layers(program: ExportedProgram) -> dict[str, int]:
    """Layer counts that the network of a program must have (see `check_network`)."""
    found = Counter(node.target for node in program.graph.nodes)
    ops = torch.ops.causalrt
    over_slots = found[ops.kv_attention_whole.default]
    return {
        "attentions": found[ops.attention.default] + over_slots,
        "lengths": over_slots,
        "collectives": found[ops.all_to_all.default],
        "cache_updates": 2 * over_slots,
    }


def describe_program(program: ExportedProgram) -> dict[str, Any]:
    """Describe, in the form of `describe_network`, the network of a program without our ops from the program alone."""
    nodes = {node.name: node for node in program.graph.nodes}
    signature = program.graph_signature
    weights = [
        program.state_dict[weight] for name, weight in signature.inputs_to_parameters.items() if nodes[name].users
    ]
    outputs = [f"output{index}" for index in range(len(signature.user_outputs))]

    def tensor(name: str, node: str) -> dict[str, Any]:
        value = nodes[node].meta["val"]
        return {"name": name, "shape": list(value.shape), "dtype": TRT_DTYPES[value.dtype]}

    return {
        "layers": {},
        "attentions": [],
        "collectives": [],
        "cache_updates": 0,
        "plugins": {},
        "constants": [],
        "weight_bytes": sum(weight.nbytes for weight in weights),
        "inputs": [tensor(name, name) for name in signature.user_inputs],
        "outputs": [tensor(name, node) for name, node in zip(outputs, signature.user_outputs, strict=True)],
    }


def rename_tensors(network: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Replace torch_tensorrt's tensor names in the description of a network by ours.

    Raises:
        BuildError: the network does not have the expected tensors.
    """
    found = [tensor["name"] for kind in ("inputs", "outputs") for tensor in network[kind]]
    if sorted(found) != sorted(names):
        raise BuildError(
            f"torch_tensorrt made an engine of the tensors {', '.join(found)}, and {', '.join(names)} were expected; take the "
            "version that this version of CausalRT names, or `--frontend onnx`"
        )

    def renamed(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {key: names.get(value, value) if isinstance(value, str) else value for key, value in entry.items()}

    kinds = ("attentions", "inputs", "outputs")
    return {**network, **{kind: [renamed(entry) for entry in network[kind]] for kind in kinds}}
