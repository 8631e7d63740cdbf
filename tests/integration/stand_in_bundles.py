"""Bundles with stand-in engines: what `build` writes for TensorRT, in float32 and without TensorRT."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tensorrt_stand_in
import torch

from causalrt.config import Config
from causalrt.engines.bundle import PROMPT_GRAPH, TIME_GRAPH, WEIGHTS, new_bundle, write_manifest
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.export import engine_files
from causalrt.export.checkpoint import open_checkpoint, write_weights
from causalrt.export.onnx import write_small_graphs
from causalrt.export.options import CollectivesMode
from causalrt.export.trace import wan_from_file

TARGET, CAPABILITY = "sm80", (8, 0)
GPU = SimpleNamespace(multi_processor_count=108)
STAND_INS = {name: dataclasses.replace(made, module="tensorrt_stand_in") for name, made in FLAVOURS.items()}


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

    def quiet(stage: str, done: int, total: int) -> None:
        pass

    with new_bundle(out, overwrite=False, needed_bytes=0) as folder:
        weights = folder / WEIGHTS
        write_weights(
            open_checkpoint(checkpoint),
            config.model,
            dtype=torch.float32,
            out=weights,
            on_progress=lambda done, total: None,
        )
        wan = wan_from_file(config, weights)
        if small_graphs is None:
            write_small_graphs(wan, config, folder, quiet)
        else:
            for name in (PROMPT_GRAPH, TIME_GRAPH):
                shutil.copy(small_graphs / name, folder / name)
        parts, lone_parts = (
            engine_files.write_engine_graphs(
                wan, config, folder, quiet, collectives=collectives, segmented=None, fused=fused, lone=lone
            )
            if lone in config.video.kinds_of_chunk
            else []
            for lone in (False, True)
        )
        with (
            mock.patch.object(engine_files, "run_child", _write_engines),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=GPU),
        ):
            record = engine_files.build_engines(
                config,
                folder,
                parts,
                quiet,
                flavour=STAND_INS[flavour],
                target=TARGET,
                timing_cache=None,
                fused=fused,
                lone_parts=lone_parts,
            )
        engines = {flavour: {"collectives": collectives, "frontend": "onnx", "targets": {TARGET: record}}}
        executors, graphs = ("eager", flavour), {"tensorrt": parts, "lone_tensorrt": lone_parts}
        write_manifest(folder, config=config, plugins=fused, executors=executors, graphs=graphs, engines=engines)
    return out


def _write_engines(request: str, target: str, on_progress: object) -> dict[str, Any]:
    """In the place of the child process that runs TensorRT."""
    wanted = json.loads(request)
    folder = Path(wanted["folder"])
    device = {"capability": 10 * CAPABILITY[0] + CAPABILITY[1], "num_multiprocessors": GPU.multi_processor_count}
    assert wanted["plugins"] in (None, device)
    for entry in wanted["engines"]:
        tensorrt_stand_in.write_engine(
            folder / entry["onnx"], folder / entry["engine"], profiles=tuple(entry["profiles"]), target=target
        )
    return {"version": tensorrt_stand_in.__version__, "networks": {}}
