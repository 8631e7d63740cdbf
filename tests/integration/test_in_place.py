"""What ONNX Runtime does not copy: a cache (it says so when it does), and weights that two steps share."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from safetensors.torch import save_file

from causalrt.config import override
from causalrt.engines.bundle import WEIGHTS
from causalrt.export.build import build
from causalrt.export.random_weights import random_weights
from causalrt.recipes import recipe

SCRIPT = """
    import sys
    import torch
    from causalrt.engines.bundle import open_bundle
    from causalrt.engines.onnxruntime import OnnxRuntimeExecutor
    from causalrt.runtime.collectives import LocalCollectives
    from causalrt.runtime.kv_slots import KVSlots
    from causalrt.runtime.session_buffers import SessionBuffers

    bundle = open_bundle(sys.argv[1])
    config, model = bundle.config, bundle.config.model
    executor = OnnxRuntimeExecutor(bundle, LocalCollectives(), num_threads=1, device=torch.device("cpu"))
    buffers = SessionBuffers(0, KVSlots(config, bundle.layout, torch.float32))
    buffers.begin(executor.encode_prompt(torch.zeros(model.text_len, model.text_dim)))
    time = executor.embed_time(1000.0)
    kept = []  # bindings hold addresses only
    for first_frame in map(config.video.first_frame_of, range(3)):
        step = config.video.step_at(first_frame)
        view = buffers.view(first_frame, step=step)
        keys = view.slots()["k.0.0"]
        before = keys.clone()
        executor.bind(view)
        if sys.argv[2] == "elsewhere":
            for segment in executor._segments:
                for name in segment.outputs:
                    if name.startswith("k."):
                        kept.append(torch.empty_like(before))
                        segment.bind(name, kept[-1], output=True)
        rows = config.tokens_per_frame * config.video.step_frames[step]
        executor.step(torch.randn(rows, 64), time, first_frame)
        assert sys.argv[2] == "elsewhere" or not torch.equal(keys[:, :rows], before[:, :rows])
"""
TWO_KINDS = {"video.independent_first_frame": "true", "video.horizon_frames": "13"}
ANONYMOUS = """
    import dataclasses
    import sys
    import torch
    from causalrt.engines.bundle import open_bundle
    from causalrt.engines.onnxruntime import OnnxRuntimeExecutor
    from causalrt.runtime.collectives import LocalCollectives

    def anonymous_bytes():
        with open("/proc/self/smaps_rollup") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("Anonymous:"))

    bundle = open_bundle(sys.argv[1])
    if sys.argv[2] == "one step":
        bundle = dataclasses.replace(bundle, steps=bundle.steps[:1])
    before = anonymous_bytes()
    executor = OnnxRuntimeExecutor(bundle, LocalCollectives(), num_threads=1, device=torch.device("cpu"))
    print(anonymous_bytes() - before)
"""


@pytest.fixture(
    scope="module",
    params=[
        ({}, "off"),
        pytest.param(({}, "on"), marks=pytest.mark.slow),
        pytest.param(({"video.time_index": "relative"}, "auto"), marks=pytest.mark.slow),
        pytest.param((TWO_KINDS, "off"), marks=pytest.mark.slow),
        (TWO_KINDS, "on"),
    ],
    ids=str,
)
def bundle(request, tmp_path_factory):
    changes, plugins = request.param
    config = override(recipe("tiny"), {"video.window_frames": "none", **changes})
    folder = tmp_path_factory.mktemp("in-place")
    checkpoint = folder / "checkpoint.safetensors"
    save_file(dict(random_weights(config.model, seed=0)), checkpoint)
    return build(config, checkpoint=checkpoint, out=folder / "bundle", fused_ops=plugins)


@pytest.mark.parametrize(("where", "copies"), [("in place", False), ("elsewhere", True)])
def test_onnxruntime_copies_a_cache_only_when_made_to(bundle, where, copies):
    """Bound in place it is silent; bound elsewhere it logs a copy, which shows that the silence means something."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(bundle), where], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ("TensorScatter" in done.stderr) == copies, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc/self/smaps_rollup")
def test_a_step_of_one_frame_holds_no_weights_of_its_own(tmp_path):
    """They are read where the file is mapped; the step of chunks packs a copy, which shows that one would be seen."""
    sizes = {"model.dim": "768", "model.num_heads": "6", "model.ffn_dim": "4096"}
    config = override(recipe("tiny"), {**sizes, **TWO_KINDS})
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_file(dict(random_weights(config.model, seed=0)), checkpoint)
    path = build(config, checkpoint=checkpoint, out=tmp_path / "bundle")

    def anonymous_bytes(steps):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(ANONYMOUS), str(path), steps],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return int(done.stdout)

    weights = (path / WEIGHTS).stat().st_size
    one, both = (anonymous_bytes(steps) for steps in ("one step", "both"))
    assert one > weights / 2
    assert both - one < weights / 4
