"""The cosine transform in a VAE's place: against float64 arithmetic, streamed, as graphs, from files good and bad."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tolerances import MODULE, ROUNDED

from causalrt.engines.bundle import FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.engines.vae_onnx import OnnxVae
from causalrt.errors import CheckpointError, RequestError
from causalrt.export.engine_worker import build_engine
from causalrt.export.vae import vae_engine_requests, write_vae
from causalrt.model.codecs.block_dct import CHANNELS, BlockDecoder, block_basis, cosines, write_block_dct
from causalrt.model.codecs.decode_state import CONFIG_KEY
from causalrt.model.codecs.registry import encode, load_vae

HEIGHT, WIDTH = 3, 5
MEAN = [0.1 * channel - 0.5 for channel in range(16)]
STD = [2.0 + 0.2 * channel for channel in range(16)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    write_block_dct(path, mean=MEAN, std=STD)
    return path


@pytest.fixture(scope="module")
def codec(file):
    return load_vae(file)


@pytest.fixture(scope="module")
def graphs(file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    write_vae(load_vae(file), folder, lambda *told: None, latent_height=HEIGHT, latent_width=WIDTH)
    return folder


def latents(num=4, seed=0):
    return torch.randn(num, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def separable_transform(block_CTYX):
    """All 768 numbers of a block in float64, axis after axis, by the definition."""
    made = block_CTYX.double()
    for axis, size in enumerate(made.shape):
        made = torch.tensordot(made.movedim(axis, -1), cosines(size).T, dims=1).movedim(-1, axis)
    return made


def test_the_basis_is_orthonormal():
    rows = block_basis().flatten(1).double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=ROUNDED)
    assert len(set(CHANNELS)) == 16


def test_encoding_is_the_transform_by_its_definition(codec):
    clip = 2 * torch.rand(9, 3, 8 * HEIGHT, 8 * WIDTH, generator=torch.Generator().manual_seed(1)) - 1
    found = encode(codec, clip)
    assert found.shape == (3, 16, HEIGHT, WIDTH)
    frames = {0: clip[:1].expand(4, -1, -1, -1), 1: clip[1:5], 2: clip[5:9]}
    for latent, row, column in ((0, 0, 0), (1, 2, 1), (2, 1, 4)):
        block = frames[latent][:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].transpose(0, 1)
        whole = separable_transform(block)
        wanted = (torch.stack([whole[at] for at in CHANNELS]) - torch.tensor(MEAN)) / torch.tensor(STD)
        torch.testing.assert_close(found[latent, :, row, column].double(), wanted, rtol=0, atol=MODULE)


def test_pixels_are_encoded_like_what_they_stand_for(codec):
    pixels = torch.randint(0, 256, (5, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    wanted = encode(codec, pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(encode(codec, pixels), wanted, rtol=0, atol=MODULE)


def test_decoding_is_the_sum_of_the_basis(codec):
    found = BlockDecoder(codec).open().decode_float(latents())
    raw = latents().double() * torch.tensor(STD).double().view(-1, 1, 1) + torch.tensor(MEAN).double().view(-1, 1, 1)
    blocks = torch.einsum("nzhw,zctyx->ntchywx", raw, block_basis().double()).flatten(5, 6).flatten(3, 4)
    wanted = torch.cat([blocks[0].mean(0, keepdim=True), *blocks[1:]])
    assert wanted.abs().max() > 1  # some of it has to be clamped
    assert found.shape == (13, 3, 8 * HEIGHT, 8 * WIDTH)
    torch.testing.assert_close(found.double(), wanted.clamp(-1, 1), rtol=0, atol=MODULE)


def test_what_the_basis_can_say_comes_back(codec):
    smooth = 0.1 * latents()
    smooth[0, [channel for channel, (_, t, _, _) in enumerate(CHANNELS) if t]] = 0  # the first latent is one frame
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    normal = (smooth - mean) / std
    torch.testing.assert_close(
        encode(codec, BlockDecoder(codec).open().decode_float(normal)), normal, atol=MODULE, rtol=0
    )


def test_chunks_are_the_whole_video(codec):
    decoder = BlockDecoder(codec)
    whole = decoder.open().decode(latents(7))
    state = decoder.open()
    chunks = [state.decode(latents(7)[at]) for at in (slice(0, 3), slice(3, 6), slice(6, 7))]
    assert [len(chunk) for chunk in chunks] == [9, 12, 4]
    assert torch.equal(torch.cat(chunks), whole)


def test_graphs_compute_what_eager_does(codec, graphs):
    opened = OnnxVae(graphs)
    assert opened.caches == []
    wanted = BlockDecoder(codec).open().decode_float(latents())
    torch.testing.assert_close(opened.open().decode_float(latents()), wanted, rtol=0, atol=MODULE)


@pytest.mark.parametrize("kind", ["eager", "onnxruntime"])
def test_a_snapshot_goes_on_where_it_was_taken(codec, graphs, kind):
    decoder = BlockDecoder(codec) if kind == "eager" else OnnxVae(graphs)
    whole = decoder.open().decode(latents())
    state = decoder.open()
    assert state.latent_frames == 0
    state.decode(latents()[:2])
    snapshot = state.snapshot()
    other = decoder.open()
    other.restore(snapshot)
    assert other.latent_frames == 2
    assert torch.equal(other.decode(latents()[2:]), whole[5:])
    other.restore(decoder.open().snapshot())
    assert torch.equal(other.decode(latents()), whole)
    with pytest.raises(RequestError, match="not of this VAE"):
        other.restore({**snapshot, "cache.00": torch.zeros(1, 16, 2, HEIGHT, WIDTH)})


def test_weights_are_stored_once(graphs):
    assert set(load_file(graphs / VAE_WEIGHTS)) == {"basis"}
    assert all((graphs / name).stat().st_size < 8192 for name in (FIRST_GRAPH, NEXT_GRAPH))  # the basis has 49152 bytes


def test_it_computes_in_the_type_that_is_asked_for(file):
    half = load_vae(file, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    found = BlockDecoder(half).open().decode(latents()).int()
    wanted = BlockDecoder(load_vae(file)).open().decode(latents()).int()
    assert 0 < (found - wanted).abs().max() <= 4  # of 255; the type has 8 bits


def test_diffusers_is_not_needed(file):
    code = (
        "import sys, pathlib, torch; from causalrt.model.codecs.registry import load_vae;"
        "from causalrt.model.codecs.registry import encode;"
        f"vae = load_vae(pathlib.Path({str(file)!r})); encode(vae, torch.zeros(1, 3, 8, 8));"
        "sys.exit(any(name in sys.modules for name in ('diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (torch.zeros(4, 3, 16, 16), "1 \\+ 4k"),
        (torch.zeros(1, 3, 12, 16), "multiples of 8"),
        (torch.full((1, 3, 16, 16), 1.5), r"\[-1, 1\]"),
        (torch.zeros(1, 16, 16, 3), "got torch.float32"),
    ],
)
def test_frames_that_cannot_be_encoded(codec, frames, words):
    with pytest.raises(RequestError, match=words):
        encode(codec, frames)


GOOD = {"_class_name": "BlockDct", "latents_mean": MEAN, "latents_std": STD}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents_mean": MEAN[:15]}, "16 finite"),
        ({"latents_mean": None}, "16 numbers"),
        ({"latents_mean": ["0"] * 16}, "16 numbers"),
        ({"latents_std": [*STD[:15], 0]}, "positive"),
        ({"latents_std": [*STD[:15], float("nan")]}, "finite"),
        ({"base_dim": 96}, "base_dim"),
        ({"_class_name": "AutoencoderKLWan"}, "is not the VAE that its sizes say"),
        ({"_class_name": "BlockDCT"}, "AutoencoderKLWan"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, change, words):
    save_file({"basis": block_basis()}, tmp_path / "c.safetensors", {CONFIG_KEY: json.dumps(GOOD | change)})
    with pytest.raises(CheckpointError, match=words):
        load_vae(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "missing"),
        ({"basis": torch.zeros(16, 3, 4, 8, 9)}, "misshapen"),
        ({"basis": torch.zeros(16, 3, 4, 8, 8, dtype=torch.int32)}, "misshapen"),
        ({"basis": torch.full((16, 3, 4, 8, 8), torch.inf)}, "finite"),
        ({"basis": block_basis(), "more": torch.zeros(1)}, "extra"),
    ],
)
def test_bad_tensors_are_refused(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "c.safetensors", {CONFIG_KEY: json.dumps(GOOD)})
    with pytest.raises(CheckpointError, match=words):
        load_vae(tmp_path / "c.safetensors")


def test_a_cut_file_is_refused(tmp_path, file):
    (tmp_path / "c.safetensors").write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError):
        load_vae(tmp_path / "c.safetensors")


def test_nothing_half_written(tmp_path):
    with pytest.raises(CheckpointError, match="positive"):
        write_block_dct(tmp_path / "c.safetensors", mean=MEAN, std=[-1.0] * 16)
    with pytest.raises(CheckpointError, match="cannot write"):
        write_block_dct(tmp_path / "nowhere" / "c.safetensors", mean=MEAN, std=STD)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        write_block_dct(tmp_path / "file" / "c.safetensors", mean=MEAN, std=STD)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install '.[tensorrt-rtx]'")
def test_tensorrt_rtx_builds_the_graphs(file, tmp_path):
    write_vae(
        load_vae(file, dtype=torch.bfloat16), tmp_path, lambda *told: None, latent_height=HEIGHT, latent_width=WIDTH
    )
    for request in vae_engine_requests("tensorrt_rtx-sm80"):
        build_engine(FLAVOURS["tensorrt_rtx"], "sm80", request, tmp_path, None)
        assert (tmp_path / request.engine).stat().st_size > 0
