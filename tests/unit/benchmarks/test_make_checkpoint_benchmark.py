"""`benchmarks/make_checkpoint.py` writes a file that a build reads."""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file

from causalrt import recipe
from causalrt.export.checkpoint import open_checkpoint, write_weights
from causalrt.export.random_weights import random_weights

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "make_checkpoint.py"


def test_the_file_is_read_and_holds_the_random_weights(tmp_path):
    spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
    make_checkpoint = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_checkpoint)
    model, file, weights = recipe("tiny").model, tmp_path / "random.pt", tmp_path / "weights.safetensors"
    make_checkpoint.make_checkpoint(model, seed=3, out=file)
    write_weights(open_checkpoint(file), model, dtype=torch.float32, out=weights, on_progress=lambda done, total: None)
    found, made = load_file(weights), dict(random_weights(model, seed=3))
    assert found.keys() == made.keys()
    blocks = [name for name in made if name.startswith("blocks.")]  # a build lays out the other weights in its own way
    assert blocks
    assert all(torch.equal(found[name], made[name]) for name in blocks)
