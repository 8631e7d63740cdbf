"""`video.time_index=relative`: what was recorded within the horizon, and rollouts that go on beyond it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import GOLDEN
from torch._dynamo.utils import counters

from causalrt import build, load, override, recipe
from causalrt.cli import main
from causalrt.engines.bundle import open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.inductor import InductorExecutor, cpp_compiler
from causalrt.errors import RequestError
from causalrt.export.random_weights import random_weights
from causalrt.proof.compare import compare_emulated, compare_recorded, largest_errors, replay_here
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.recording import open_recording
from causalrt.proof.replica import replica_on
from causalrt.runtime.collectives import LocalCollectives
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.requests import checked_chunks
from causalrt.runtime.rollout import Rollout
from causalrt.runtime.session_buffers import SessionBufferPool

SLOW_EAGER = (("A", 8), ("B", 8), ("D", 1), ("J", 8), ("J2", 2), ("R", 2))
SLOW_ONNXRUNTIME = (("A", 2), ("B", 8), ("D", 1), ("J", 2), ("J2", 1), ("R", 8))


@pytest.mark.parametrize(
    ("executor", "case", "world_size"),
    [
        ("eager", "C", 2),
        ("onnxruntime", "R", 2),
        *(pytest.param("eager", *rollout, marks=pytest.mark.slow) for rollout in SLOW_EAGER),
        *(pytest.param("onnxruntime", *rollout, marks=pytest.mark.slow) for rollout in SLOW_ONNXRUNTIME),
    ],
)
def test_recorded_rollouts(executor, case, world_size):
    result = compare_recorded(
        GOLDEN / f"{case}.safetensors", executor=executor, world_size=world_size, time_index="relative", num_threads=1
    )
    assert result["time_index"] == "relative"
    assert result["passed"], result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "world_size", "collectives"),
    [("B", 8, "engine"), ("C", 1, "runtime"), ("R", 2, "engine"), ("R", 2, "runtime")],
)
def test_graphs_that_tensorrt_parses(case, world_size, collectives):
    result = compare_emulated(
        GOLDEN / f"{case}.safetensors",
        executor="tensorrt_rtx",
        world_size=world_size,
        collectives=collectives,
        time_index="relative",
    )
    assert result["passed"], result


@pytest.mark.slow
@pytest.mark.parametrize("head_plan", ["padded", "grouped"])
def test_other_head_plans(head_plan):
    result = compare_recorded(
        GOLDEN / "R.safetensors", executor="eager", world_size=8, head_plan=head_plan, time_index="relative"
    )
    assert result["passed"], result


@pytest.mark.slow
@pytest.mark.skipif(cpp_compiler() is None, reason="inductor needs a C++ compiler on a CPU: install g++")
def test_compiled_once_for_all_chunks(tmp_path):
    recording = open_recording(GOLDEN / "R.safetensors", world_size=1)
    config = replace(recording.config, video=replace(recording.config.video, time_index="relative"))
    checkpoint = recording.write_checkpoint(tmp_path / "checkpoint.safetensors")
    bundle = open_bundle(build(config, checkpoint=checkpoint, out=tmp_path / "bundle", executors=["inductor"]))
    torch.compiler.reset()
    counters.clear()
    executor = InductorExecutor(bundle, LocalCollectives(), device=torch.device("cpu"))
    outputs = replay_here(recording, replica_on(executor, config, bundle.layout))
    for name, error in largest_errors(outputs, recording.outputs()).items():
        assert error.error <= TOLERANCE, f"{name}: {error.error:.2e} at {error.name}"
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


# ---- beyond the horizon


def tiny(**video):
    return override(recipe("tiny"), {f"video.{name}": str(value) for name, value in video.items()})


def write_bundle(config, folder, name="bundle", executor="eager"):
    checkpoint = folder / f"{name}.safetensors"
    save_file({f"model.{key}": tensor for key, tensor in random_weights(config.model, seed=0)}, checkpoint)
    return build(config, checkpoint=checkpoint, out=folder / name, executors=[executor])


def prompt():
    return torch.randn(5, recipe("tiny").model.text_dim, generator=torch.Generator().manual_seed(0))


def chunks_of(path, num_chunks, executor="eager"):
    """`[chunks, F, 16, H, W]`."""
    with load(path, executor=executor, device="cpu") as engine:
        return torch.stack([chunk.latents for chunk in engine.session(prompt(), seed=1, num_chunks=num_chunks)])


@pytest.mark.parametrize(
    ("executor", "world_size"), [("eager", 1), pytest.param("onnxruntime", 2, marks=pytest.mark.slow)]
)
def test_beyond_a_short_horizon_as_within_a_long_one(tmp_path, executor, world_size):
    """Without a sink, nothing that is attended to is further away than the window: the horizon plays no part."""
    window = {"window_frames": 7, "sink_frames": 0}
    ranks = {"build.world_size": str(world_size)}
    short = override(tiny(horizon_frames=9, time_index="relative", **window), ranks)
    endless = chunks_of(write_bundle(short, tmp_path, "short", executor), 20, executor)
    expected = chunks_of(write_bundle(tiny(horizon_frames=60, **window), tmp_path, "long"), 20)
    assert endless.shape == (20, 3, 16, 4, 6)
    errors = (endless - expected).abs().flatten(1).max(dim=1).values
    assert errors.max() <= TOLERANCE, errors.tolist()


def test_a_sink_is_exact_within_the_horizon_and_stays_in_sight_after_it(tmp_path):
    window = {"window_frames": 8, "sink_frames": 2}
    endless = chunks_of(write_bundle(tiny(horizon_frames=12, time_index="relative", **window), tmp_path, "short"), 40)
    expected = chunks_of(write_bundle(tiny(horizon_frames=120, **window), tmp_path, "long"), 40)
    errors = (endless - expected).abs().flatten(1).max(dim=1).values
    assert errors[:4].max() <= TOLERANCE, errors.tolist()
    assert errors[4] > 1e-3, "the first chunk past the horizon sees its sink from nearer"
    assert endless.isfinite().all()
    assert endless[4:].abs().max() < 1.5 * endless[:4].abs().max()
    assert endless[-1].std() > 0.5 * endless[0].std()


class LaterNoise:
    """The noise of chunk c at chunk c + `shift`."""

    def __init__(self, shift):
        self.shift = shift

    def draw(self, chunk, draw, shape):
        return SeededNoise(1).draw(chunk - self.shift if chunk >= self.shift else chunk, draw, shape)


@pytest.mark.parametrize("sink", [0, 2])
def test_a_rollout_does_not_age(tmp_path, sink):
    """Chunk 10 million comes out as an early one does, to the last bit: integers alone count the frames."""
    config = tiny(horizon_frames=12, time_index="relative", window_frames=7 + sink, sink_frames=sink)
    bundle = open_bundle(write_bundle(config, tmp_path))
    executor = EagerExecutor(bundle, LocalCollectives(), device=torch.device("cpu"))
    memories = SessionBufferPool(executor, config, bundle.layout)
    text = torch.cat([prompt(), torch.zeros(config.model.text_len - 5, config.model.text_dim)])

    def rollout(shift):
        """Chunks 4 to 7, renumbered; the ring of 4 slots is back where it was after every 4 chunks of 3 frames."""
        chunks = []
        made = Rollout(
            executor,
            LocalCollectives(),
            config,
            bundle.layout,
            text=text,
            noise=LaterNoise(shift),
            buffers=memories.take(),
        )
        for index in (0, 1, 2, 3, *(shift + later for later in range(4, 8))):
            made.chunk(index, context_pass=True, record=False, deliver=lambda rows, times: chunks.append(rows))
        return torch.stack(chunks)

    early, late = rollout(0), rollout(10_000_000)
    assert torch.equal(early, late)


# ---- what is asked for, and what is refused


def test_any_number_of_chunks_where_time_is_relative():
    assert checked_chunks(tiny(time_index="relative"), None) == 4
    assert checked_chunks(tiny(time_index="relative"), 10**9) == 10**9
    for chunks in (0, -1, 1.5):
        with pytest.raises(RequestError, match=f"num_chunks must be a whole number of at least 1, got {chunks}"):
            checked_chunks(tiny(time_index="relative"), chunks)
    with pytest.raises(RequestError, match=r"5 chunks .*horizon is 12 .*`--set video\.time_index=relative`"):
        checked_chunks(tiny(), 5)


def test_compare_from_the_command_line(capsys):
    flags = ["--recorded", str(GOLDEN / "R.safetensors"), "--executor", "eager", "--time-index", "relative", "--json"]
    assert main(["compare", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["time_index"] == "relative"


def test_generate_from_the_command_line(tmp_path, capsys):
    """Build, inspect, and generate three horizons of 12 frames."""
    np.save(tmp_path / "prompt.npy", prompt().numpy())
    config = recipe("tiny")
    checkpoint, bundle, out = tmp_path / "tiny.safetensors", tmp_path / "bundle", tmp_path / "latents.safetensors"
    save_file({f"model.{key}": tensor for key, tensor in random_weights(config.model, seed=0)}, checkpoint)
    flags = ["--recipe", "tiny", "--checkpoint", str(checkpoint), "--out", str(bundle), "--executor", "eager"]
    assert main(["build", *flags, "--set", "video.time_index=relative"]) == 0
    assert main(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["config"]["video"]["time_index"] == "relative"
    flags = ["--prompt-embeds", str(tmp_path / "prompt.npy"), "--chunks", "12", "--out", str(out)]
    assert main(["generate", str(bundle), *flags]) == 0
    latents = load_file(out)["latents"]
    assert latents.shape == (36, 16, 4, 6)
    assert latents.isfinite().all()


@pytest.mark.slow
def test_a_window_of_one_chunk(tmp_path):
    """Nothing but the chunk itself is seen: no graph reads `first_frame`."""
    video = {"window_frames": 3, "sink_frames": 0, "horizon_frames": 9, "time_index": "relative"}
    config = override(tiny(**video), {"build.world_size": "2"})
    path = write_bundle(config, tmp_path, executor="onnxruntime")
    eager, compiled = (chunks_of(path, 5, executor) for executor in ("eager", "onnxruntime"))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=TOLERANCE)
