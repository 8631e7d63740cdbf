"""What `polygraphy run` can check again, without us: a segment's inputs, and what eager made of them, in Polygraphy's JSON."""

import shlex
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from causalrt.errors import RequestError
from causalrt.proof.segments import EAGER, SegmentRun

FOLDER = "polygraphy"
BUDGET_BYTES = 64 * 2**20
"""Of tensors written; JSON takes a third more."""


class SavedSegments:
    """Writes segments' inputs and outputs to a folder until they would take more than the budget.

    Attributes:
        files: by segment, those of inputs and outputs, relative to the folder that holds `FOLDER`.
        left_out: segments that would have been too large.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, tuple[str, str]] = {}
        self.left_out: list[str] = []
        self._folder, self._bytes = folder / FOLDER, 0

    def save(self, segment: Path, fed: SegmentRun) -> None:
        """Write one forward of one rank. Outputs that eager does not know (parts of rotary tables) are the segment's own.

        Raises:
            RequestError: it cannot be written, which is not the segment's fault.
        """
        held = {value.name for value in onnx.load(segment, load_external_data=False).graph.output}
        outputs = {name: fed.expected.get(name, value) for name, value in fed.outputs.items() if name in held}
        size = sum(tensor.nbytes for tensor in (*fed.inputs.values(), *outputs.values()))
        if self._bytes + size > BUDGET_BYTES:
            self.left_out.append(segment.name)
            return
        self._bytes += size
        inputs_file, outputs_file = (f"{segment.stem}.{kind}.json" for kind in ("inputs", "outputs"))
        results = RunResults()
        results.add([_arrays(outputs)], runtime=0.0, runner_name=EAGER)
        try:
            self._folder.mkdir(exist_ok=True)
            with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
                save_json([_arrays(fed.inputs)], str(self._folder / inputs_file))
                results.save(str(self._folder / outputs_file))
        except OSError as error:
            raise RequestError(
                f"writing what Polygraphy reads of {segment.name} failed: {error}; choose another folder with --out"
            ) from error
        self.files[segment.name] = f"{FOLDER}/{inputs_file}", f"{FOLDER}/{outputs_file}"


def _arrays(tensors: Mapping[str, torch.Tensor]) -> "OrderedDict[str, Any]":
    return OrderedDict((name, tensor.numpy()) for name, tensor in tensors.items())


def command_line(bundle: Path, out: Path, segment: str, files: tuple[str, str], *, tolerance: float) -> str:
    """The command that checks a segment again."""
    words = ["polygraphy", "run", str(bundle / segment), "--onnxrt"]
    words += ["--load-inputs", str(out / files[0]), "--load-outputs", str(out / files[1])]
    return shlex.join([*words, "--atol", f"{tolerance:g}", "--rtol", f"{tolerance:g}"])
