"""`python -m causalrt.export.engine_worker REQUEST`: parses saved ONNX files and builds their engines in a separate process.

This way the parent's traced model and the engine build are never in memory at the same time. The worker reads a request (JSON,
see `EngineRequest`) and answers with JSON lines on stdout: progress, then the contents of the networks, or the error.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from causalrt.engines.network_record import MEMORY_LINES
from causalrt.engines.tensorrt_flavour import FLAVOURS, Flavour
from causalrt.errors import BuildError, CausalRTError
from causalrt.export.engine_network import check_network, describe_network, finish_attentions
from causalrt.export.passes import PassContext
from causalrt.export.pipelines import TENSORRT_PLUGINS, apply
from causalrt.export.plugin_nodes import count_plugins
from causalrt.plugins.ptx import default_cache
from causalrt.plugins.tensorrt_plugin import enable_in_place, register_plugins
from causalrt.user_cache import keep_in_cache, read_cache

KEPT_MESSAGES = 20
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One engine to build.

    Attributes:
        onnx: file name of the graph.
        engine: file name of the engine to write.
        profiles: the values of the network's dynamic size, if it has one; each gets its own optimisation profile.
        expected: layer counts that the network must have (see `check_network`).
    """

    onnx: str
    engine: str
    profiles: tuple[int, ...]
    expected: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginDevice:
    """The GPU that plugins are compiled for.

    Attributes:
        capability: compute capability, such as 80.
        num_multiprocessors: number of multiprocessors of the GPU.
    """

    capability: int
    num_multiprocessors: int


def _say(kind: str, **content: Any) -> None:
    sys.stdout.write(json.dumps({"kind": kind, **content}) + "\n")
    sys.stdout.flush()


def _keep_answers_apart() -> None:
    """Redirect the output of libraries to stderr, so that stdout carries only answers."""
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildLog:
    """The part of TensorRT's messages that is kept during one build.

    Attributes:
        logger: the `ILogger` to pass to the builder.
        errors: the most recent error messages.
        memory: memory figures from the builder's INFO lines, in bytes; the largest over all optimisation profiles.
    """

    logger: Any
    errors: deque[str]
    memory: dict[str, int]


def _make_log(trt: Any) -> BuildLog:
    errors: deque[str] = deque(maxlen=KEPT_MESSAGES)
    memory: dict[str, int] = {}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)
            elif found := re.fullmatch(r"(.+): (\d+) bytes", message):
                field = MEMORY_LINES.get(found[1])
                if field is not None:
                    memory[field] = max(memory.get(field, 0), int(found[2]))

    return BuildLog(logger=Logger(), errors=errors, memory=memory)


def _make_monitor(trt: Any) -> Any:
    """Create a TensorRT progress monitor that reports only outermost phases, and cancels the build if the parent has exited."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, num_steps: int) -> None:
            if parent is None:
                self.steps[phase] = num_steps
                self._tell(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            return phase not in self.steps or self._tell(phase, min(step + 1, self.steps[phase]))

        def phase_finish(self, phase: str) -> None:
            if phase in self.steps:
                self._tell(phase, self.steps.pop(phase))

        def _tell(self, phase: str, done: int) -> bool:
            try:
                _say("phase", phase=phase, done=done, total=self.steps.get(phase, done))
            except BrokenPipeError:
                return False
            return True

    return Monitor()


def parse(trt: Any, logger: Any, file: Path, graph: bytes | None = None) -> Any:
    """Parse an ONNX file, or `graph` with the file's weights, into a strongly typed network.

    Returns:
        The builder (which must outlive the network), the network and the parser.

    Raises:
        BuildError: the parser rejects a node; the error names the node and a remedy.
    """
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(file)) if graph is None else parser.parse(graph, str(file))
    if not parsed:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = [
            f"node {error.node_name() or error.node()!r}, op {error.node_operator()}: {error.desc()} ({error.code()})"
            for error in errors
        ]
        raise BuildError(
            f"{trt.__name__} {trt.__version__} cannot parse {file.name}:\n  "
            + "\n  ".join(lines or ["no node was named; is the file whole?"])
            + "\nTake the TensorRT version that this version of CausalRT names; if it is that one, run this model with "
            "`--executor onnxruntime` and report the node"
        )
    return builder, network, parser


def graph_with_plugins(trt: Any, file: Path, device: PluginDevice) -> tuple[bytes | None, dict[str, int]]:
    """Register the plugins and replace the fused nodes of a graph by plugin nodes.

    Returns:
        The serialised graph, or None if it has no fused nodes; and the number of nodes of each plugin.

    Raises:
        ExecutorError: this TensorRT does not support plugins.
        KernelError: Triton is missing, or plugins of these names are already registered.
        BuildError: a fused node has no plugin.
    """
    model = onnx.load(file, load_external_data=False)
    if not model.functions:
        return None, {}
    register_plugins(trt, target=device.capability, cache=default_cache())
    context = PassContext(capability=device.capability, num_multiprocessors=device.num_multiprocessors)
    apply(TENSORRT_PLUGINS, model, context)
    return model.SerializeToString(), count_plugins(model)


def build_engine(
    flavour: Flavour,
    target: str,
    request: EngineRequest,
    folder: Path,
    cache: Path | None,
    plugins: PluginDevice | None = None,
) -> dict[str, Any]:
    """Build one engine and return the description of its network."""
    trt = flavour.load()
    log = _make_log(trt)
    graph, counts = None, dict[str, int]()
    if plugins is not None:
        graph, counts = graph_with_plugins(trt, folder / request.onnx, plugins)
    builder, network, parser = parse(trt, log.logger, folder / request.onnx, graph)
    finish_attentions(trt, network)
    description = describe_network(trt, network)
    expected = request.expected | ({"plugins": sum(counts.values())} if counts else {})
    check_network(description, expected=expected, onnx_file=request.onnx)
    description["plugins"] = counts
    config = builder.create_builder_config()
    flavour.configure_build(trt, config, target)
    if plugins is not None:
        enable_in_place(trt, config)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    monitor = _make_monitor(trt)
    config.progress_monitor = monitor
    for rows in request.profiles:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            if -1 in tuple(tensor.shape):
                shape = tuple(rows if size == -1 else size for size in tensor.shape)
                profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    has_timings = cache is not None and _attach_timing_cache(config, cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(
            f"{trt.__name__} {trt.__version__} cannot build {request.onnx} for {target}:\n  "
            + "\n  ".join(log.errors or ["it gave no reason"])
            + "\nA fused attention kernel may be missing for this target, head size or precision: take bfloat16 or float16, "
            "another --target, or `--executor onnxruntime`"
        )
    description["memory"] = log.memory if len(log.memory) == len(MEMORY_LINES) else None
    (folder / request.engine).write_bytes(memoryview(engine))
    if cache is not None and has_timings:
        _keep_timing_cache(config, cache)
    del parser
    return description


def _attach_timing_cache(config: Any, cache: Path) -> bool:
    timings = config.create_timing_cache(read_cache(cache))
    if timings is not None and config.set_timing_cache(timings, False):
        return True
    _say(
        "warning",
        text=f"TensorRT refuses the timing cache {cache}, which may be of another GPU or driver: this build measures all "
        "kernels anew and leaves the file as it is; remove it, or name another one with --timing-cache",
    )
    return False


def _keep_timing_cache(config: Any, cache: Path) -> None:
    attached = config.get_timing_cache()
    timings = None if attached is None else attached.serialize()
    if timings is not None and not keep_in_cache(cache, memoryview(timings)):
        _say("warning", text=f"the timing cache {cache} could not be written; the next build measures again")


def main() -> int:
    """Build the requested engines."""
    _keep_answers_apart()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # end with the parent, which alone reads the answer
    plain = json.loads(Path(sys.argv[1]).read_text())
    flavour, folder = FLAVOURS[plain["flavour"]], Path(plain["folder"])
    cache = Path(plain["timing_cache"]) if plain["timing_cache"] else None
    plugins = None if plain["plugins"] is None else PluginDevice(**plain["plugins"])
    requests = [EngineRequest(**{**entry, "profiles": tuple(entry["profiles"])}) for entry in plain["engines"]]
    networks = {}
    try:
        for done, request in enumerate(requests):
            _say("engine", name=request.engine, done=done, total=len(requests))
            networks[request.engine] = build_engine(flavour, plain["target"], request, folder, cache, plugins)
        _say("engine", name="", done=len(requests), total=len(requests))
    except (CausalRTError, OSError) as error:
        with contextlib.suppress(BrokenPipeError):  # the parent has exited
            _say("error", error=type(error).__name__, message=str(error))
        return 1
    version = flavour.load().__version__
    _say("done", version=version, networks=networks)
    return 0


def request_json(
    flavour: Flavour,
    target: str,
    folder: Path,
    timing_cache: Path | None,
    engines: list[EngineRequest],
    plugins: PluginDevice | None = None,
) -> str:
    """Serialise a request to the JSON that `main` reads."""
    return json.dumps(
        {
            "flavour": flavour.name,
            "target": target,
            "folder": str(folder),
            "timing_cache": None if timing_cache is None else str(timing_cache),
            "engines": [asdict(engine) for engine in engines],
            "plugins": None if plugins is None else asdict(plugins),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
