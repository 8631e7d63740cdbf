"""CausalRT: causal video diffusion transformers, compiled ahead of time and run in real time on 1 to N ranks."""

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING

# ONNX Runtime reads this once, when it is imported; the processes that we start inherit it.
if "onnxruntime" in sys.modules and "ORT_DISABLE_TELEMETRY" not in os.environ:
    logging.getLogger(__name__).warning(
        "onnxruntime was imported before causalrt, so its telemetry is on in this process; import causalrt first, or set "
        "ORT_DISABLE_TELEMETRY=1 in the environment"
    )
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from causalrt.config import Config, override
from causalrt.recipes import RECIPES, recipe
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.runtime.session import Chunk, Session

if TYPE_CHECKING:
    from causalrt.export.build import build
    from causalrt.export.finish import finish_build
    from causalrt.media.read import read_frames
    from causalrt.media.video_file import write_video

__all__ = [
    "RECIPES",
    "Chunk",
    "Config",
    "Engine",
    "Session",
    "build",
    "finish_build",
    "load",
    "override",
    "read_frames",
    "recipe",
    "write_video",
]
_LAZY = {  # imported on first use: a production host needs no exporter, and may need no video library
    "build": "causalrt.export.build",
    "finish_build": "causalrt.export.finish",
    "read_frames": "causalrt.media.read",
    "write_video": "causalrt.media.video_file",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
