"""Writes the graphs that TensorRT parses and builds a bundle's engines, in one child process per target.

| collectives | form of the step | KV slots |
|---|---|---|
| `engine` | one engine with DistCollective all-to-alls inside | whole, updated in place; every size is static |
| `runtime` | segments, cut at all-to-alls and cache writes | filled prefix; one optimisation profile per length |
| `runtime`, fused ops | segments, cut at all-to-alls | whole, updated in place; every size is static |

Fused ops become plugins. No plugin rotates cached keys when it reads them (`video.time_index=relative`), so those ops are
expanded into the standard ops of their ONNX functions, which every TensorRT can build.
"""

import contextlib
import itertools
import json
import logging
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from causalrt import errors
from causalrt.child_python import python_command, python_environment
from causalrt.config import Config
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH
from causalrt.engines.step_record import StepGraphs, StepPart
from causalrt.engines.tensorrt_flavour import Flavour, device_file_name
from causalrt.errors import BuildError
from causalrt.export.dist_collective import OP as DIST_COLLECTIVE
from causalrt.export.engine_worker import EngineRequest, PluginDevice, request_json
from causalrt.export.onnx import step_graph, step_prefix, write_segments
from causalrt.export.options import CollectivesMode
from causalrt.export.passes import step_context
from causalrt.export.pipelines import STANDARD_OPS, TENSORRT_ENGINE, TENSORRT_SEGMENTS, apply
from causalrt.layout import history_lengths, slots_from_config
from causalrt.model.wan.transformer import Wan
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.user_cache import cache_file

logger = logging.getLogger(__name__)

WHOLE_STEP = "whole-step.onnx"
END_S = 10.0
"""Seconds that the child process may take to exit after it has answered."""
LOG_TAIL_BYTES = 2000


def write_engine_graphs(
    wan: Wan,
    config: Config,
    folder: Path,
    on_progress: Progress,
    *,
    collectives: CollectivesMode,
    segmented: onnx.ModelProto | None,
    fused: bool = False,
    step: int = 0,
) -> tuple[StepPart, ...]:
    """Write the step graph, lowered to the form that TensorRT parses.

    Args:
        wan: the model over the bundle's weights.
        config: the bundle's config.
        folder: the bundle's folder.
        on_progress: called at the start and the end of each stage.
        collectives: whether the engine or the runtime runs the all-to-alls.
        segmented: the step graph over the filled prefix, if the caller already has it.
        fused: whether self-attention uses the fused ops.
        step: index of the kind of step.

    Returns:
        The step's parts in order.
    """
    prefix = step_prefix(config, step)
    if collectives == "runtime" and not fused:
        graph = segmented or step_graph(wan, config, folder, on_progress, whole_slots=False, step=step)
        apply(TENSORRT_SEGMENTS, graph, step_context(config))
        return write_segments(graph, folder, f"{prefix}cut-step", on_progress, at_cache_writes=True)
    plugins = wants_plugins(config, fused=fused)
    graph = step_graph(wan, config, folder, on_progress, whole_slots=True, fused=fused, step=step)
    context = step_context(config, plugins=plugins)
    if not plugins:
        apply(STANDARD_OPS, graph, context)
    if collectives == "runtime":
        apply(TENSORRT_SEGMENTS, graph, context)
        return write_segments(graph, folder, f"{prefix}cut-step", on_progress, at_cache_writes=False)
    apply(TENSORRT_ENGINE, graph, context)
    onnx.save(graph, folder / f"{prefix}{WHOLE_STEP}")
    return (StepPart(file=f"{prefix}{WHOLE_STEP}"),)


def wants_plugins(config: Config, *, fused: bool) -> bool:
    """Whether TensorRT runs the fused ops of a step as plugins."""
    return fused and config.video.time_index == "global"


def kv_lengths(config: Config) -> tuple[int, ...]:
    """Row counts that the filled prefix can have in step 0, in ascending order."""
    plan = slots_from_config(config)
    return tuple(sorted({plan.valid_frames(frames) * config.tokens_per_frame for frames in history_lengths(config)}))


def build_engines(
    config: Config,
    folder: Path,
    steps: Sequence[StepGraphs],
    on_progress: Progress,
    *,
    flavour: Flavour,
    target: str,
    timing_cache: Path | None,
    fused: bool = False,
) -> dict[str, Any]:
    """Build the engines of one target in a child process, and return their record in the manifest.

    Raises:
        BuildError: TensorRT rejected a graph, or the child process died.
        ExecutorError: TensorRT is not installed.
    """
    prefix = f"{flavour.name}-{target}"
    names = [PROMPT_GRAPH, TIME_GRAPH, *(part.file for step in steps for part in step.tensorrt)]
    requests = [_request(config, folder, name, f"{prefix}-{Path(name).stem}.engine") for name in names]
    plugins = plugin_device(target) if wants_plugins(config, fused=fused) else None
    answer = run_child(request_json(flavour, target, folder, timing_cache, requests, plugins), target, on_progress)
    networks = f"{prefix}-networks.json"
    (folder / networks).write_text(json.dumps(answer["networks"], indent=1))
    engines = iter([request.engine for request in requests])
    return {
        "version": answer["version"],
        "networks": networks,
        "prompt": next(engines),
        "time": next(engines),
        "steps": [list(itertools.islice(engines, len(step.tensorrt))) for step in steps],
    }


def plugin_device(target: str) -> PluginDevice:
    """The local GPU, for which plugins are compiled."""
    found = torch.cuda.get_device_properties(0)
    return PluginDevice(capability=int(target.removeprefix("sm")), num_multiprocessors=found.multi_processor_count)


def _request(config: Config, folder: Path, name: str, engine: str) -> EngineRequest:
    model = onnx.load(folder / name, load_external_data=False)
    ops = Counter(node.op_type for node in model.graph.node)
    dynamic = any(d.dim_param for value in model.graph.input for d in value.type.tensor_type.shape.dim)
    lengths = sum(node.op_type == "Attention" and len(node.input) > 6 for node in model.graph.node)
    return EngineRequest(
        onnx=name,
        engine=engine,
        profiles=kv_lengths(config) if dynamic else (),
        expected={
            "attentions": ops["Attention"],
            "lengths": lengths,
            "collectives": ops[DIST_COLLECTIVE],
            "cache_updates": ops["TensorScatter"],
        },
    )


def run_child(request: str, target: str, on_progress: Progress) -> dict[str, Any]:
    """Build engines in a child process (`engine_worker`) and return its answer.

    Raises:
        BuildError: TensorRT rejected a graph, or the child process died.
        ExecutorError: TensorRT is not installed.
    """
    with TemporaryFolder("engines") as scratch:
        file, log = scratch / "request.json", scratch / "stderr"
        file.write_text(request)
        command = [*python_command("causalrt.export.engine_worker"), str(file)]
        with (
            log.open("wb") as stderr,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, env=python_environment()
            ) as child,
        ):
            try:
                answer = _follow(child, target, on_progress)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(END_S)
            finally:
                child.kill()
        if answer is None:
            raise BuildError(
                f"the process that builds engines for {target} ended without an answer (exit code {child.returncode}; "
                f"-9 is a lack of memory, most often); its last words:\n{_tail(log)}"
            )
    if answer["kind"] == "error":
        kind = getattr(errors, answer["error"], OSError)  # for example a full disk, which `new_bundle` reports
        raise kind(answer["message"])
    return answer


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _message(line: bytes) -> dict[str, Any] | None:
    """Parse a message of the child process; None for a line that was printed by something else."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) and "kind" in message else None


def _follow(child: "subprocess.Popen[bytes]", target: str, on_progress: Progress) -> dict[str, Any] | None:
    """Forward progress until the child process sends its result or its error; None if it sends neither."""
    assert child.stdout is not None
    engines, stem = 0, target
    warnings = set[str]()
    for line in child.stdout:
        message = _message(line)
        if message is None:
            logger.info("engine build: %s", line.decode(errors="replace").rstrip())
        elif message["kind"] == "engine":
            engines = message["total"]
            on_progress(f"engines for {target}", message["done"], engines)
            stem = Path(message["name"]).stem.removeprefix("tensorrt_rtx-").removeprefix("tensorrt-")
        elif message["kind"] == "phase" and engines <= 4:
            on_progress(f"{stem}: {message['phase']}", message["done"], message["total"])
        elif message["kind"] == "warning" and message["text"] not in warnings:  # engines repeat the same warnings
            warnings.add(message["text"])
            logger.warning("%s", message["text"])
        elif message["kind"] in ("done", "error"):
            return message
    return None


def default_timing_cache(flavour: Flavour, target: str) -> Path | None:
    """File that keeps kernel times measured on the local GPU between builds; None for a flavour that measures nothing."""
    if not flavour.timing_cache:
        return None
    gpu = device_file_name(torch.device("cuda", 0))  # TensorRT rejects times from another GPU model
    return cache_file("timing", f"{flavour.name}-{flavour.load().__version__}-{gpu}-{target}.cache")
