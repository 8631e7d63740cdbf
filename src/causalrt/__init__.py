"""CausalRT: causal video diffusion transformers, compiled ahead of time and run in real time on 1 to N ranks."""

from typing import TYPE_CHECKING

from causalrt.config import RECIPES, Config, override, recipe
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import load
from causalrt.runtime.session import Chunk, Session

if TYPE_CHECKING:
    from causalrt.export.build import build

__all__ = ["RECIPES", "Chunk", "Config", "Engine", "Session", "build", "load", "override", "recipe"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "build":  # a production host needs no exporter: import it when it is asked for
        from causalrt.export.build import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
