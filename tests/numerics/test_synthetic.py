"""Sizes, windows and schedules that no golden case has, against an independent float64 replay."""

import json
from pathlib import Path

import float64_replay
import pytest
from safetensors import safe_open

from causalrt.tools.compare import compare_recorded

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "R.safetensors"
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


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["config"]), tensors


def test_the_replay_is_the_reference(golden):
    config, tensors = golden
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    renoise = {(c, s): tensors[f"in.renoise.c{c}.s{s}"] for c in range(config["num_chunks"]) for s in range(3)}
    outputs = float64_replay.Replay(config, state, tensors["in.prompt_embeds"][0]).rollout(
        tensors["in.noise"][0], renoise
    )
    assert {name for name in tensors if name.endswith((".flow", ".x0"))} < set(outputs)
    for name, output in outputs.items():
        assert (output - tensors[name][0]).abs().max() < 5e-6, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("executor", "world_size"),
    [("eager", 1), pytest.param("onnxruntime", 5, marks=pytest.mark.slow), ("onnxruntime", 8)],
)
def test_any_sizes(golden, tmp_path, case, executor, world_size):
    path = tmp_path / "recording.safetensors"
    float64_replay.record(golden[0] | SMALL | CASES[case], path)
    result = compare_recorded(path, executor=executor, world_size=world_size)
    assert result["passed"], result
