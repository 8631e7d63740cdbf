"""Frames on a GPU: the decoder's process beside a rank, snapshots, and the text encoder."""

import pytest
import torch
from support.small_bundles import prompt, tiny_config, write_checkpoint
from support.small_encoders import write_text_encoder, write_vae

import causalrt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")
SAME_PIXELS = 2
"""Of 255: float32 convolutions may run in TF32, and what is rounded to a pixel differs."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    config = tiny_config(1)
    weights = write_checkpoint(config, folder / "checkpoint.safetensors")
    return causalrt.build(
        config, checkpoint=weights, out=folder / "b", executors=["onnxruntime"], vae=write_vae(folder / "vae")
    )


def frames_of(engine, **options):
    return torch.cat([chunk.frames for chunk in engine.session(prompt(), seed=1, **options)])


def difference(one, other):
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_frames_are_those_of_a_cpu(bundle, executor):
    with causalrt.load(bundle, executor="eager", device="cpu") as engine:
        wanted = frames_of(engine)
    with causalrt.load(bundle, executor=executor, device="cuda") as engine:
        assert engine.max_sessions >= 2
        assert engine.makes_ahead == (torch.cuda.device_count() > 1)
        assert difference(frames_of(engine), wanted) <= SAME_PIXELS
        assert difference(frames_of(engine, ahead=True), wanted) <= SAME_PIXELS


def test_onnxruntime_decodes_on_a_gpu(bundle):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    with causalrt.load(bundle, executor="eager", device="cuda") as engine:
        wanted = frames_of(engine)
    with causalrt.load(bundle, executor="eager", vae_executor="onnxruntime", device="cuda") as engine:
        assert difference(frames_of(engine), wanted) <= SAME_PIXELS


def test_a_snapshot_is_taken_up_on_a_cpu_and_back(bundle, tmp_path):
    with causalrt.load(bundle, executor="eager", device="cuda") as engine:
        session = engine.session(prompt(), seed=1)
        next(session)
        session.snapshot(tmp_path / "s")
        rest = list(session)
        again = list(engine.resume(tmp_path / "s"))
    with causalrt.load(bundle, executor="eager", device="cpu") as engine:
        on_cpu = list(engine.resume(tmp_path / "s"))
    for chunk, same, other in zip(rest, again, on_cpu, strict=True):
        assert torch.equal(chunk.latents, same.latents)
        assert difference(chunk.frames, other.frames) <= SAME_PIXELS


def test_the_text_encoder_on_a_gpu(bundle, tmp_path):
    folder = write_text_encoder(tmp_path)
    with (
        causalrt.load(bundle, device="cpu", text_encoder=folder) as cpu,
        causalrt.load(bundle, device="cuda", executor="eager", text_encoder=folder, text_device="cuda:0") as gpu,
    ):
        torch.testing.assert_close(gpu.encode_prompt("a fox")[0], cpu.encode_prompt("a fox")[0], rtol=0.05, atol=0.05)
