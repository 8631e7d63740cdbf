"""Executors on 1, 2, 3 and 8 CPU ranks against the reference's own recordings, free-running over whole rollouts.

B has 12 heads (8 ranks: one whole and half of another each), A, D and L 4 heads (8 ranks: half a head each), and
the token counts 36, 48, 24, 15 and 18 leave padding on most of these numbers of ranks. J and J2 begin with a first chunk
of one frame, generated and given: chunks of 10 and 30, of 9 and 27 tokens.
"""

import pytest
from support import GOLDEN
from support.tolerances import WHOLE_MODEL

from causalrt.export.build import build
from causalrt.proof.compare import largest_errors, replay
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.recording import open_recording
from causalrt.proof.rollouts import Outputs
from causalrt.runtime.load import load

CASES = ("A", "B", "C", "D", "I", "J", "J2", "K", "L", "N1", "N2", "R")
EXECUTORS = ("eager", "onnxruntime")
"""Those that run on any machine and start at once; inductor, TensorRT and GPUs have tests of their own."""


ONE_RANK = [(case, 1) for case in CASES]
SEVERAL_RANKS = [
    ("B", 8),  # 12 heads
    ("J", 8),  # an independent first frame
    *(pytest.param(case, 8, marks=pytest.mark.slow) for case in CASES if case not in "BJ"),
    *(pytest.param(case, 3, marks=pytest.mark.slow) for case in "ABC"),
    *(pytest.param(case, 2, marks=pytest.mark.slow) for case in "BR"),
]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """Makes, once, the outputs of both executors on a case and a number of ranks, and the recording's own."""
    made: dict[tuple[str, int], tuple[dict[str, Outputs], Outputs]] = {}

    def get(case: str, world_size: int) -> tuple[dict[str, Outputs], Outputs]:
        if (case, world_size) not in made:
            folder = tmp_path_factory.mktemp(f"{case}-{world_size}")
            recording = open_recording(GOLDEN / f"{case}.safetensors", world_size=world_size)
            checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
            bundle = build(recording.config, checkpoint=checkpoint, out=folder / "bundle")
            outputs = {}
            for executor in EXECUTORS:
                with load(bundle, executor=executor, device="cpu", timeout_s=120) as engine:
                    outputs[executor] = replay(recording, engine)
            made[case, world_size] = outputs, recording.outputs()
        return made[case, world_size]

    return get


@pytest.mark.parametrize(("case", "world_size"), ONE_RANK + SEVERAL_RANKS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_rollout_is_the_recorded_one(rollouts, executor, case, world_size):
    outputs, recorded = rollouts(case, world_size)
    errors = largest_errors(outputs[executor], recorded)
    for name, error in errors.items():
        assert error.error <= TOLERANCE, f"{name}: {error.error:.2e} at {error.name}"


@pytest.mark.parametrize(("case", "world_size"), SEVERAL_RANKS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_ranks_agree_with_one_rank(rollouts, executor, case, world_size):
    outputs, _ = rollouts(case, world_size)
    alone, _ = rollouts(case, 1)
    errors = largest_errors(outputs[executor], alone[executor])
    for name, error in errors.items():
        assert error.error <= WHOLE_MODEL, f"{name}: {error.error:.2e} at {error.name}"
