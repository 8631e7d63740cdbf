"""Bundles with stand-in engines: prepared and finished as for TensorRT, without TensorRT, and in float32."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from causalrt.config import Config
from causalrt.engines import tensorrt_flavour
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.export import build as build_module
from causalrt.export import engine_files, onnx, vae
from causalrt.export.build import EnginePlan, build
from causalrt.export.finish import finish_build
from causalrt.export.options import CollectivesMode
from support import tensorrt_stand_in

TARGET, CAPABILITY = "sm80", (8, 0)
GPU = SimpleNamespace(multi_processor_count=108)
STAND_INS = {name: dataclasses.replace(made, module="support.tensorrt_stand_in") for name, made in FLAVOURS.items()}


def build_stand_in(
    config: Config,
    *,
    checkpoint: Path,
    out: Path,
    collectives: CollectivesMode,
    flavour: str = "tensorrt_rtx",
    small_graphs: Path | None = None,
    fused: bool = False,
) -> Path:
    """A bundle; its prompt and time graph are those of another bundle of the same weights, if there is one."""

    def copy_small_graphs(wan: object, config: Config, folder: Path, on_progress: object) -> None:
        assert small_graphs is not None
        for name in (PROMPT_GRAPH, TIME_GRAPH):
            shutil.copy(small_graphs / name, folder / name)

    with contextlib.ExitStack() as patches:
        if small_graphs is not None:
            patches.enter_context(mock.patch.object(onnx, "write_small_graphs", copy_small_graphs))
        # A real build refuses float32, which the comparisons with recordings need.
        plans = {flavour: EnginePlan((TARGET,), later=True)}
        patches.enter_context(mock.patch.object(build_module, "check_options", return_value=plans))
        build(
            config,
            checkpoint=checkpoint,
            out=out,
            executors=[flavour],
            targets=[TARGET],
            collectives=collectives,
            fused_ops="on" if fused else "auto",
            prepare=True,
        )
    with stand_in_builder():
        return finish_build(out)


@contextlib.contextmanager
def stand_in_builder(capability: tuple[int, int] | None = CAPABILITY) -> Iterator[None]:
    """A machine with both TensorRTs and a GPU of this capability, or none, as far as a build of engines goes."""
    # Only what chooses the target sees the GPU: torch itself would try to use it.
    cuda = SimpleNamespace(
        is_available=lambda: capability is not None,
        get_device_capability=lambda device: capability,
        get_device_name=lambda device: "stand-in",
    )
    with (
        mock.patch.dict(tensorrt_flavour.FLAVOURS, STAND_INS),
        mock.patch.object(engine_files, "run_child", _write_engines),
        mock.patch.object(vae, "run_child", _write_engines),
        mock.patch.object(tensorrt_flavour, "torch", SimpleNamespace(cuda=cuda, device=torch.device)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=GPU),
    ):
        yield


def _write_engines(request: str, target: str, on_progress: object) -> dict[str, Any]:
    """In the place of the child process that runs TensorRT."""
    wanted = json.loads(request)
    folder = Path(wanted["folder"])
    device = {"capability": int(target.removeprefix("sm")), "num_multiprocessors": GPU.multi_processor_count}
    assert wanted["plugins"] in (None, device)
    for entry in wanted["engines"]:
        tensorrt_stand_in.write_engine(
            folder / entry["onnx"], folder / entry["engine"], profiles=tuple(entry["profiles"]), target=target
        )
    return {"version": tensorrt_stand_in.__version__, "networks": {}}
