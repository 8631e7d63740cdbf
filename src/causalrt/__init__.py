"""CausalRT: causal video diffusion transformers, compiled ahead of time and run in real time on 1 to N ranks.

Everything is imported when it is first used, so that `import causalrt` costs nothing, and a production host needs neither the
exporter nor a video library.
"""

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

if TYPE_CHECKING:
    from causalrt.config import Config, override
    from causalrt.export.build import build
    from causalrt.export.finish import finish_build
    from causalrt.media.read import read_frames
    from causalrt.media.video_file import write_video
    from causalrt.recipes import RECIPES, recipe
    from causalrt.runtime.engine import Engine
    from causalrt.runtime.load import load
    from causalrt.runtime.session import Chunk, Session

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
_MODULES = {
    "RECIPES": "recipes",
    "Chunk": "runtime.session",
    "Config": "config",
    "Engine": "runtime.engine",
    "Session": "runtime.session",
    "build": "export.build",
    "finish_build": "export.finish",
    "load": "runtime.load",
    "override": "config",
    "read_frames": "media.read",
    "recipe": "recipes",
    "write_video": "media.video_file",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
