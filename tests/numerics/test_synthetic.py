"""Sizes, windows and schedules that no golden case has, against an independent float64 replay."""

import json

import pytest
from safetensors import safe_open
from support import GOLDEN, float64_replay
from support.tolerances import REPLAYED

from causalrt.proof.compare import compare_recorded, largest_errors, replay_here
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.recording import open_recording
from causalrt.proof.replica import eager_replica

SMALL = {"dim": 60, "num_heads": 6, "num_layers": 1, "ffn_dim": 50, "freq_dim": 20}
SMALL |= {"text_dim": 7, "text_len": 5, "text_rows": 2}
CASES = {
    "sink and window that no chunk divides": {
        "latent_h": 2,
        "latent_w": 6,
        "num_frame_per_block": 4,
        "num_chunks": 5,
        "local_attn_size": 11,
        "sink_size": 5,
        "denoising_step_list": [999, 613, 7],
        "timestep_shift": 8.0,
    },
    "one unwarped step, noisy context, batch 3": {
        "latent_h": 6,
        "latent_w": 2,
        "num_frame_per_block": 2,
        "num_chunks": 6,
        "batch_size": 3,
        "local_attn_size": 5,
        "sink_size": 3,
        "denoising_step_list": [1000],
        "warp_denoising_step": False,
        "context_noise": 50,
    },
    "one token a chunk": {
        "dim": 42,
        "num_heads": 7,
        "latent_h": 2,
        "latent_w": 2,
        "num_frame_per_block": 1,
        "num_chunks": 9,
        "local_attn_size": 4,
        "sink_size": 1,
        "denoising_step_list": [900, 500, 333],
        "timestep_shift": 1.0,
        "warp_denoising_step": False,
        "text_rows": 5,
    },
    "window longer than the video, last step 0": {
        "latent_h": 2,
        "latent_w": 2,
        "num_frame_per_block": 5,
        "num_chunks": 2,
        "local_attn_size": 40,
        "sink_size": 2,
        "denoising_step_list": [1000, 500, 0],
    },
    "full attention with a sink, a step twice": {
        "latent_h": 4,
        "latent_w": 4,
        "num_frame_per_block": 2,
        "num_chunks": 3,
        "local_attn_size": -1,
        "sink_size": 2,
        "denoising_step_list": [1000, 500, 500, 250],
    },
    "another patch, window of one chunk": {
        "in_dim": 4,
        "out_dim": 4,
        "patch_size": [1, 1, 3],
        "latent_h": 3,
        "latent_w": 6,
        "num_frame_per_block": 3,
        "num_chunks": 3,
        "local_attn_size": 3,
        "sink_size": 0,
    },
    "independent first frame, window of three chunks with a sink of one": {
        "latent_h": 2,
        "latent_w": 6,
        "num_chunks": 8,
        "independent_first_frame": True,
        "local_attn_size": 9,
        "sink_size": 3,
    },
    "independent first frame, window and sink that no chunk divides, batch 2": {
        "latent_h": 4,
        "latent_w": 2,
        "num_chunks": 7,
        "batch_size": 2,
        "independent_first_frame": True,
        "local_attn_size": 7,
        "sink_size": 1,
    },
    "independent first frame, one token a frame": {
        "latent_h": 2,
        "latent_w": 2,
        "num_frame_per_block": 4,
        "num_chunks": 4,
        "independent_first_frame": True,
        "local_attn_size": -1,
        "sink_size": 0,
    },
    "12 heads, 72 tokens: 9 on each of 8 ranks": {
        "dim": 96,
        "num_heads": 12,
        "latent_h": 8,
        "latent_w": 12,
        "num_frame_per_block": 3,
        "num_chunks": 3,
        "local_attn_size": 7,
        "sink_size": 1,
    },
}


def golden(case):
    with safe_open(GOLDEN / f"{case}.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["config"]), tensors


@pytest.mark.parametrize("case", ["R", "J", "J2", "K"])
def test_the_replay_is_the_reference(case):
    config, tensors = golden(case)
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    renoise = {(c, s): tensors[f"in.renoise.c{c}.s{s}"] for c in range(config["num_chunks"]) for s in range(3)}
    given, second = (tensors.get(name, [None])[0] for name in ("in.initial_latent", "in.prompt_embeds.p1"))
    replay = float64_replay.Replay(config, state, tensors["in.prompt_embeds"][0])
    outputs = replay.rollout(tensors["in.noise"][0], renoise, given=given, second=second)
    outputs["out.latents"] = outputs["out.latents"].float()  # given frames are copied as they are
    assert {name for name in tensors if name.endswith((".flow", ".x0"))} < set(outputs)
    for name, output in outputs.items():
        assert (output - tensors[name][0]).abs().max() < REPLAYED, name


QUICK = ("independent first frame, one token a frame", "sink and window that no chunk divides")
"""The cases for which the default run builds graphs."""


@pytest.mark.parametrize(
    ("case", "executor", "world_size"),
    [
        *((case, "eager", 1) for case in CASES),
        *(
            pytest.param(
                case, "onnxruntime", 8, marks=[] if case in QUICK else pytest.mark.slow, id=f"{case}-onnxruntime"
            )
            for case in CASES
        ),
        *(pytest.param(case, "onnxruntime", 5, marks=pytest.mark.slow) for case in QUICK),
    ],
)
def test_any_sizes(tmp_path, case, executor, world_size):
    path = tmp_path / "recording.safetensors"
    float64_replay.record(golden("R")[0] | SMALL | CASES[case], path)
    result = compare_recorded(path, executor=executor, world_size=world_size)
    assert result["passed"], result


@pytest.mark.parametrize("first_frame", [False, True])
@pytest.mark.parametrize(("window", "sink"), [(-1, 0), (9, 3), (8, 2), (7, 0)])
@pytest.mark.parametrize("policy", ["keep", "recache", "flush"])
def test_prompt_switches(tmp_path, policy, window, sink, first_frame):
    """History dropped or computed again by cache rules that know no slots; the reference itself keeps it."""
    sizes = {
        "latent_h": 2,
        "latent_w": 6,
        "num_chunks": 7,
        "prompt_switch_chunk": 4,
        "independent_first_frame": first_frame,
    }
    path = tmp_path / "recording.safetensors"
    window_and_sink = {"local_attn_size": window, "sink_size": sink}
    float64_replay.record(golden("R")[0] | SMALL | sizes | window_and_sink, path, policy=policy)
    recording = open_recording(path, world_size=1)
    checkpoint = recording.write_checkpoint(tmp_path / "checkpoint.safetensors")
    replica = eager_replica(recording.config, checkpoint=checkpoint, folder=tmp_path / "bundle")
    errors = largest_errors(replay_here(recording, replica, policy=policy), recording.outputs())
    for name, error in errors.items():
        assert error.error <= TOLERANCE, f"{name}: {error.error:.2e} at {error.name}"
