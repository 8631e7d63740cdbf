"""Weights of a bundle, tensor by tensor: against the digests that its build wrote, and against a checkpoint.

The file's own hash, which opening a bundle checks, says that something has changed; here it is said what.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import WEIGHTS, Bundle, tensor_digest
from causalrt.export.checkpoint import DIGESTS, converted_tensors, model_shapes, open_checkpoint


def check_digests(bundle: Bundle) -> tuple[int, list[str]]:
    """Tensors whose digest the build has written, and what is wrong: not what it wrote, missing, or not finite."""
    checked, faults = 0, []
    with safe_open(bundle.path / WEIGHTS, framework="pt") as file:
        digests = json.loads((file.metadata() or {}).get(DIGESTS, "{}"))
        held = set(file.keys())
        for name in model_shapes(bundle.config.model):
            if name not in held:
                faults.append(f"{WEIGHTS}: {name} is missing")
                continue
            tensor = file.get_tensor(name)
            bad = int((~tensor.isfinite()).sum())
            if bad:
                faults.append(f"{WEIGHTS}: {name} holds {bad} values that are not finite")
            if digests and name not in digests:
                faults.append(f"{WEIGHTS}: {name} has no digest, though others have")
            elif digests:
                checked += 1
                if tensor_digest(tensor) != digests[name]:
                    faults.append(f"{WEIGHTS}: {name} is not what the build wrote (its sha256 differs)")
    return checked, faults


def check_against_checkpoint(bundle: Bundle, checkpoint: Path) -> tuple[int, list[str]]:
    """Tensors compared with what the loader makes of the checkpoint, and those that differ.

    Raises:
        CheckpointError: it cannot be read, or is not of this bundle's sizes.
    """
    dtype, faults, checked = TORCH_DTYPES[bundle.config.build.precision], [], 0
    with safe_open(bundle.path / WEIGHTS, framework="pt") as file:
        for name, expected in converted_tensors(open_checkpoint(checkpoint), bundle.config.model, dtype=dtype):
            checked += 1
            got = file.get_tensor(name)
            if torch.equal(got, expected):
                continue
            if got.shape != expected.shape or got.dtype != expected.dtype:
                faults.append(
                    f"{WEIGHTS}: {name} is {got.dtype} {list(got.shape)}, the checkpoint's is {list(expected.shape)}"
                )
                continue
            wrong = (got != expected).nonzero()
            first = tuple(wrong[0].tolist())
            faults.append(
                f"{WEIGHTS}: {name} differs from {checkpoint.name} in {len(wrong)} of {got.numel()} values: at {list(first)} "
                f"got {float(got[first]):.7g}, expected {float(expected[first]):.7g}"
            )
    return checked, faults
