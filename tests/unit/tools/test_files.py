import torch
from safetensors import safe_open

from causalrt.tools.files import read_latents, write_latents


def test_the_same_latents_are_the_same_bytes(tmp_path):
    latents = torch.arange(2 * 16 * 3 * 4, dtype=torch.float32).view(2, 16, 3, 4)
    metadata = {key: f'"{key}", and \u00fc' for key in ["seed", "causalrt", "one", "two", "three", "four", "five"]}
    written = set()
    for number in range(20):
        write_latents(tmp_path / str(number), latents, metadata)
        written.add((tmp_path / str(number)).read_bytes())
    assert len(written) == 1
    assert torch.equal(read_latents(tmp_path / "0"), latents)
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata
