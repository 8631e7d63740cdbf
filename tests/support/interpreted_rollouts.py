"""Run by test_plugins.py in a process that interprets Triton: whole recorded rollouts on one rank, by the kernels themselves.

TRITON_INTERPRET=1 python tests/numerics/interpreted_rollouts.py RECORDING FOLDER TIME_INDEX     prints {"flow": error, ...}
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from causalrt.engines.bundle import open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.export.build import build
from causalrt.model.wan.step import FusedOps, StepOps
from causalrt.plugins.attention import attend, kv_attention_in_place
from causalrt.plugins.qk_norm_rope import write_rows
from causalrt.plugins.rope_attention import run_kernel
from causalrt.plugins.rotate import rotate_pairs
from causalrt.proof.compare import largest_errors, replay_here
from causalrt.proof.recording import open_recording
from causalrt.proof.replica import replica_on
from causalrt.runtime.collectives import LocalCollectives


def packed_rows(q: Any, *operands: Any) -> Any:
    *others, num_heads, eps, out_rows = operands
    out = torch.full((out_rows, q.shape[1] // num_heads), torch.nan)
    write_rows(out, q, *others, eps)
    return out


def attend_by_kernel(received: Any, slots: Any, *rest: Any) -> Any:
    return run_kernel(received, slots, *rest), slots


def no_exchange(sent: torch.Tensor) -> torch.Tensor:
    raise AssertionError("one rank exchanges nothing")


KERNELS = StepOps(
    all_to_all=no_exchange,
    rotate=rotate_pairs,
    attention=attend,
    kv_attention=kv_attention_in_place,
    fused=FusedOps(qk_norm_rope=packed_rows, rope_attention=attend_by_kernel),
)


def main() -> None:
    recording, folder, time_index = open_recording(Path(sys.argv[1]), world_size=1), Path(sys.argv[2]), sys.argv[3]
    config = replace(recording.config, video=replace(recording.config.video, time_index=time_index))
    checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
    bundle = open_bundle(build(config, checkpoint=checkpoint, out=folder / "bundle", executors=["eager"]))
    executor = EagerExecutor(bundle, LocalCollectives(), device=torch.device("cpu"), ops=KERNELS)
    outputs = replay_here(recording, replica_on(executor, bundle.config, bundle.layout))
    errors = largest_errors(outputs, recording.outputs())
    sys.stdout.write(json.dumps({name: error.error for name, error in errors.items()}) + "\n")


if __name__ == "__main__":
    main()
