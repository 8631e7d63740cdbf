"""Executors on 1, 2, 3 and 8 CPU ranks against the reference's own recordings, free-running over whole rollouts.

B has 12 heads (8 ranks: one whole and half of another each), A, D and L 4 heads (8 ranks: half a head each), and
the token counts 36, 48, 24, 15 and 18 leave padding on most of these numbers of ranks.
"""

from pathlib import Path

import pytest

from causalrt.export.build import build
from causalrt.runtime.engine import load
from causalrt.tools.compare import TOLERANCE, Outputs, largest_errors, recorded_outputs, replay
from causalrt.tools.recording import open_recording

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = ("A", "B", "C", "D", "L", "N1", "N2", "R")
EXECUTORS = ("eager", "onnxruntime")
"""Those that run on any machine and start at once; inductor, TensorRT and GPUs have tests of their own."""
RANK_TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=CASES)
def rollouts(request, tmp_path_factory):
    """All rollouts of one case: outputs by (executor, world size), and the recording's own."""
    outputs: dict[tuple[str, int], Outputs] = {}
    for world_size in (1, 2, 3, 8):
        folder = tmp_path_factory.mktemp(f"{request.param}-{world_size}")
        recording = open_recording(GOLDEN / f"{request.param}.safetensors", world_size=world_size)
        checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
        bundle = build(recording.config, checkpoint=checkpoint, out=folder / "bundle")
        for executor in EXECUTORS:
            with load(bundle, executor=executor, device="cpu", timeout_s=120) as engine:
                outputs[executor, world_size] = replay(recording, engine)
    return outputs, recorded_outputs(recording)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_rollout_is_the_recorded_one(rollouts, executor, world_size):
    outputs, recorded = rollouts
    errors = largest_errors(outputs[executor, world_size], recorded)
    for name, error in errors.items():
        assert error.largest <= TOLERANCE, f"{name}: {error.largest:.2e} at {error.at}"


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_ranks_agree_with_one_rank(rollouts, executor, world_size):
    outputs, _ = rollouts
    errors = largest_errors(outputs[executor, world_size], outputs[executor, 1])
    for name, error in errors.items():
        assert error.largest <= RANK_TOLERANCE, f"{name}: {error.largest:.2e} at {error.at}"
