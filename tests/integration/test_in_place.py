"""Keys and values are not copied for nothing: ONNX Runtime says so when it copies a cache, and it is not to say so."""

import subprocess
import sys
import textwrap

import pytest
from safetensors.torch import save_file

from causalrt.config import override, recipe
from causalrt.export.build import build
from causalrt.export.random_weights import random_weights

SCRIPT = """
    import sys
    import torch
    from causalrt.engines.bundle import open_bundle
    from causalrt.engines.onnxruntime import OnnxRuntimeExecutor
    from causalrt.runtime.collectives import LocalCollectives
    from causalrt.runtime.kv_slots import KVSlots

    bundle = open_bundle(sys.argv[1])
    config, model = bundle.config, bundle.config.model
    executor = OnnxRuntimeExecutor(bundle, LocalCollectives(), num_threads=1, device=torch.device("cpu"))
    slots = KVSlots(config, bundle.layout, torch.float32)
    e, e0 = executor.embed_time(1000.0)
    kept = []  # bindings hold addresses only
    cross = executor.encode_prompt(torch.zeros(model.text_len, model.text_dim))
    for first_frame in (0, 3, 6):
        kv = slots.filled(first_frame)
        before = kv[0][0][0].clone()
        executor.bind(kv, cross, kv_rows=slots.filled_rows(first_frame), memory=0)
        if sys.argv[2] == "elsewhere":
            for segment in executor._segments:
                for name in segment.outputs:
                    if name.startswith("k."):
                        kept.append(torch.empty_like(before))
                        segment.bind(name, kept[-1], output=True)
        executor.step(torch.randn(bundle.layout.local_tokens, 64), e, e0, first_frame)
        written = kv[0][0][0][:, : config.tokens_per_chunk]
        assert sys.argv[2] == "elsewhere" or not torch.equal(written, before[:, : config.tokens_per_chunk])
"""


@pytest.fixture(scope="module", params=[({}, "off"), ({}, "on"), ({"video.time_index": "relative"}, "auto")], ids=str)
def bundle(request, tmp_path_factory):
    changes, plugins = request.param
    config = override(recipe("tiny"), {"video.window_frames": "none", **changes})
    folder = tmp_path_factory.mktemp("in-place")
    checkpoint = folder / "checkpoint.safetensors"
    save_file(dict(random_weights(config.model, seed=0)), checkpoint)
    return build(config, checkpoint=checkpoint, out=folder / "bundle", plugins=plugins)


@pytest.mark.parametrize(("where", "copies"), [("in place", False), ("elsewhere", True)])
def test_onnxruntime_copies_a_cache_only_when_made_to(bundle, where, copies):
    """Bound in place it is silent; bound elsewhere it logs a copy, which shows that the silence means something."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(bundle), where], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ("TensorScatter" in done.stderr) == copies, done.stderr
