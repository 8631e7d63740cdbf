"""The other way to an engine: the traced program through torch_tensorrt's converters, with no ONNX between.

    torch.export -> torch_tensorrt's decompositions and passes -> its aten converters + ours (`op_layers`) -> engine

It makes what the `engine` lowering makes: three engines, the step whole, KV slots updated in place. Weights stay on the CPU,
where TensorRT reads them; torch_tensorrt and TensorRT's builder want the GPU that the engines are for. torch_tensorrt names an
engine's tensors after the graph's placeholders and `output0`, `output1`...; the record says which of our names each one is.
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
        ExecutorError: it is not installed, or does not load; it needs CUDA even to be imported.
    """
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # whatever its libraries, or a torch without CUDA, make of it
        raise ExecutorError(
            f"--frontend torch-tensorrt needs the Python module torch_tensorrt, which does not import here "
            f"({type(error).__name__}: {error}); install it with `{install_extra('torch-tensorrt')}` on a machine with a GPU "
            "and a CUDA build of torch, or leave the option out: the ONNX front end makes the same engines"
        ) from error


def driven_flavour(torch_tensorrt: Any) -> str:
    """The TensorRT that an installed torch_tensorrt drives; it is built for one of them."""
    return "tensorrt_rtx" if torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx else "tensorrt"


def check_torch_tensorrt(flavours: tuple[str, ...], collectives: str) -> None:
    """Refuse what this front end cannot build, before work begins.

    Args:
        flavours: of the engines that are built on this machine; for others nothing needs to be installed here.
        collectives: who exchanges between ranks.

    Raises:
        ConfigError: all-to-alls at runtime are asked for.
        ExecutorError: torch_tensorrt cannot be imported, or drives another TensorRT than the one asked for.
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
    """Build the engines of the GPU at hand, in this process.

    Args:
        config: of the bundle.
        folder: of the bundle, with the weights in it.
        on_progress: called at the start and the end of each engine.
        flavour: the TensorRT that torch_tensorrt drives here.
        target: the architecture of the GPU at hand.
        timing_cache: measured kernel times, read and written; unread by a flavour that measures nothing.

    Returns:
        What the manifest says of them: as from `build_engines`, and `names`, by engine file our name of each of its tensors.

    Raises:
        BuildError: torch_tensorrt or TensorRT refused a graph, or made something else of it.
        ExecutorError: torch_tensorrt is not installed, or the target is another GPU.
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
            expected, known = expected_layers(program), describe_program(program)  # the conversion changes the program
            (folder / file).write_bytes(_convert(torch_tensorrt, program, stem, cache))
            network = describe_network(trt, contexts[0].net) if contexts else known  # the context keeps constants alive
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
    """torch_tensorrt's name of each tensor of the engine that it makes of a program -> ours, given in the program's order."""
    signature = program.graph_signature
    made = [f"output{index}" for index in range(len(signature.user_outputs))]
    return dict(zip([*signature.user_inputs, *made], [*inputs, *outputs], strict=True))


@contextmanager
def registered_converters(trt: Any) -> Iterator[list[Any]]:
    """Have torch_tensorrt convert our ops by `op_layers`.

    Its registry is the process's and takes nothing back, so every call goes before the last one's converters.

    Yields:
        The context of the conversion at hand, once it has met one of our ops: it holds the network, and the memory that the
        network's constants point to.
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
    """A copy of the kept timing cache for torch_tensorrt to write to as it goes; it replaces the kept one if all went well."""
    with TemporaryFolder("timing") as scratch:
        cache = scratch / "timing.cache"
        if kept is not None and kept.exists():
            shutil.copyfile(kept, cache)
        yield cache
        if kept is not None and cache.exists():
            keep_in_cache(kept, cache.read_bytes())


def _convert(torch_tensorrt: Any, program: ExportedProgram, stem: str, cache: Path) -> bytes:
    """One engine; every size is static, so that the arguments of the trace say all that there is to know of the inputs."""
    arguments, _ = program.example_inputs
    try:
        engine = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=arguments,
            device=DEVICE,
            offload_module_to_cpu=True,  # where it is already: no copy of the weights is looked for on the GPU
            timing_cache_path=str(cache),
        )
    except Exception as error:  # torch_tensorrt raises RuntimeError, AssertionError, ValueError, each for a refusal
        raise BuildError(
            f"torch_tensorrt {torch_tensorrt.__version__} cannot make an engine of the traced {stem}: "
            f"{type(error).__name__}: {error}\nBuild with `--frontend onnx`, and report what it refused"
        ) from error
    return bytes(engine)


def expected_layers(program: ExportedProgram) -> dict[str, int]:
    """What a network made of a program must hold (see `check_network`)."""
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
    """What can be said of a network without having seen it, in the form of `describe_network`: none of our ops is in it."""
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
    """A network's description under our names.

    Raises:
        BuildError: the network has other tensors than were thought of.
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
