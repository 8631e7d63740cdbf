"""The decoder's TensorRT engines up to TensorRT itself: a stand-in with TensorRT's rules runs the graphs."""

from types import SimpleNamespace

import pytest
import torch
from support import tensorrt_stand_in
from support.small_encoders import VAE_CONFIG
from support.stand_in_bundles import CAPABILITY, STAND_INS, TARGET

from causalrt.engines.bundle import FIRST_GRAPH, NEXT_GRAPH
from causalrt.engines.vae_onnx import OnnxVae
from causalrt.engines.vae_tensorrt import TensorRTVae
from causalrt.errors import ExecutorError
from causalrt.export.random_encoders import random_vae
from causalrt.export.vae import write_vae

pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")
HEIGHT, WIDTH = 4, 6
FLAVOUR = STAND_INS["tensorrt_rtx"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    write_vae(random_vae(VAE_CONFIG, seed=0), folder, lambda *told: None, latent_height=HEIGHT, latent_width=WIDTH)
    engines = []
    for name in (FIRST_GRAPH, NEXT_GRAPH):
        engines.append(f"{name}.engine")
        tensorrt_stand_in.write_engine(folder / name, folder / engines[-1], profiles=(), target=TARGET)
    record = SimpleNamespace(targets={TARGET: SimpleNamespace(vae=tuple(engines))})
    return SimpleNamespace(path=folder, engines={FLAVOUR.name: record})


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU of the target is here, as far as anyone asks; tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY)


def latents(num, seed=0):
    return torch.randn(num, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_engines_decode_what_onnxruntime_does(bundle):
    vae, other = TensorRTVae(FLAVOUR, bundle, device=torch.device("cpu")), OnnxVae(bundle.path)
    pairs = [(vae.open(), other.open(), seed) for seed in range(2)]
    for chunk in range(3):
        for state, wanted, seed in pairs:  # sessions take turns with the engines' addresses
            given = latents(3, seed=10 * seed + chunk)
            assert torch.equal(state.decode(given), wanted.decode(given))
    kept = pairs[0][0].snapshot()
    again = vae.open()
    again.restore(kept)
    given = latents(3, seed=7)
    assert torch.equal(again.decode(given), pairs[0][1].decode(given))


def test_another_gpu_is_told(bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(ExecutorError, match="engines for sm80, and this GPU is sm90"):
        TensorRTVae(FLAVOUR, bundle, device=torch.device("cpu"))
