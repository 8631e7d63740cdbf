"""Bundles as files: made of links, as the cache of the Hugging Face hub has them, and the same bytes from the same build."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from support.small_bundles import bundle_factory, prompt, tiny_config, write_checkpoint

import causalrt
from causalrt.media.video_file import Mp4Writer


@pytest.mark.parametrize("executor", ["eager", "onnxruntime"])
def test_a_bundle_of_links_into_another_folder_gives_the_same_video(tmp_path, executor):
    bundle = bundle_factory(tmp_path, executor=executor)(1)

    def latents():
        with causalrt.load(bundle, executor=executor, device="cpu") as engine, engine.session(prompt()) as session:
            return next(session).latents

    plain = latents()
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(bundle.iterdir()):
        blob = file.rename(blobs / hashlib.sha256(file.read_bytes()).hexdigest())
        file.symlink_to(os.path.relpath(blob, bundle))
    assert torch.equal(latents(), plain)


BUILD = """
import sys
from support.small_bundles import tiny_config
import causalrt
causalrt.build(tiny_config(2), checkpoint=sys.argv[1], out=sys.argv[2], executors=["onnxruntime"])
"""


@pytest.mark.slow
def test_the_same_build_writes_the_same_bytes(tmp_path):
    checkpoint = write_checkpoint(tiny_config(2), tmp_path / "checkpoint.safetensors")
    built = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", BUILD, checkpoint, tmp_path / seed], env=environment, check=True)
        built.append({file.name: file.read_bytes() for file in (tmp_path / seed).iterdir()})
    assert built[0].keys() == built[1].keys()
    assert [name for name, data in built[0].items() if data != built[1][name]] == []


def test_the_same_frames_are_the_same_video_file(tmp_path):
    pytest.importorskip("av")
    frames = torch.randint(0, 256, (12, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("one.mp4", "two.mp4"):
        with Mp4Writer(tmp_path / name, height=64, width=64, fps=16) as writer:
            writer.write(frames.numpy())
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
