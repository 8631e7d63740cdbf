"""Sessions with frames by the cosine transform, through the decoder's process; and prompts by a table of words."""

import json

import pytest
import torch
from support.small_bundles import bundle_factory, prompt, tiny_config

import causalrt
from causalrt.cli import main
from causalrt.engines.bundle import VAE_WEIGHTS, open_bundle
from causalrt.errors import ConfigError, PromptError, RequestError
from causalrt.model.codecs.block_dct import BlockDctConfig, BlockDecoder, write_block_dct
from causalrt.model.codecs.registry import encode, load_vae
from causalrt.model.text.words import WordEncoder
from causalrt.runtime.memory import decoder_memory, device_sessions, predict_memory

WORDS = {"red": (0,), "circle": (1,), "moves": (2,), "the": ()}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    write_block_dct(path, mean=[0.0] * 16, std=[3.0] * 16)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    table = torch.randn(3, tiny_config().model.text_dim, generator=torch.Generator().manual_seed(0))
    WordEncoder(table, WORDS, max_tokens=8).save(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, codec):
    return bundle_factory(tmp_path_factory.mktemp("bundle"), executor="onnxruntime", vae=codec)(2)


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def engine(bundle, words, request):
    name = request.param
    with causalrt.load(bundle, executor=name, vae_executor=name, device="cpu", text_encoder=words) as engine:
        yield engine


def test_frames_are_those_of_the_whole_video(engine, bundle):
    chunks = list(engine.session(prompt(), seed=1))
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12, 12]
    whole = BlockDecoder(load_vae(bundle / VAE_WEIGHTS)).open().decode(torch.cat([chunk.latents for chunk in chunks]))
    found = torch.cat([chunk.frames for chunk in chunks])
    assert (found.int() - whole.int()).abs().max() <= 1
    assert whole.float().std() > 10  # there is something to see


def test_a_snapshot_in_the_middle_goes_on_with_the_same_frames(engine, tmp_path):
    session = engine.session(prompt(), seed=2)
    next(session)
    session.snapshot(tmp_path / "snapshot")
    wanted = [chunk.frames for chunk in session]
    found = [chunk.frames for chunk in engine.resume(tmp_path / "snapshot")]
    assert len(found) == len(wanted) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_clip_becomes_latents_that_a_video_begins_with(engine, bundle):
    clip = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = engine.encode_frames(clip)
    assert torch.equal(latents, encode(load_vae(bundle / VAE_WEIGHTS), clip))
    with engine.session(prompt(), initial_latents=latents) as session:
        assert session.initial_frames.shape == clip.shape
        assert len(next(session).frames) == 12
    with pytest.raises(RequestError, match="T = 1, 5, 9"):
        engine.encode_frames(clip[:8])


def test_prompts_are_words(engine, words):
    embeds = WordEncoder.from_folder(words).encode("red circle")
    by_text, by_rows = (next(iter(engine.session(one, seed=3, num_chunks=1))) for one in ("The RED circle", embeds))
    assert torch.equal(by_text.latents, by_rows.latents)
    with pytest.raises(PromptError, match="does not know fox"):
        engine.session("the fox")
    session = engine.session("red circle", seed=3)
    next(session)
    with pytest.raises(PromptError, match="does not know green"):
        session.switch_prompt("green circle")
    assert len(next(session).frames) == 12  # the video goes on
    session.close()


def test_the_bundle_says_what_it_has(bundle, capsys):
    opened = open_bundle(bundle)
    assert opened.vae == BlockDctConfig(latents_mean=(0.0,) * 16, latents_std=(3.0,) * 16)
    assert main(["inspect", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vae"]["_class_name"] == "BlockDct"
    assert all(parts["cache_bytes"] == 0 for parts in found["decoder_bytes"].values())
    assert main(["inspect", str(bundle)]) == 0
    assert "BlockDct" in capsys.readouterr().out


def test_a_decoder_without_caches_bounds_no_sessions(bundle):
    opened = open_bundle(bundle)
    memory, decoder = predict_memory(opened.config, "eager"), decoder_memory(opened, "eager")
    one = memory.session_bytes + memory.activation_bytes + memory.attention_bytes
    assert device_sessions(memory, [one, one], decoder, 2**30, graph_bytes=0, shared=False) == 1
    assert (
        device_sessions(memory, [one + 2**30, one + memory.session_bytes], decoder, 2**30, graph_bytes=0, shared=False)
        == 2
    )


def test_latents_of_other_channels_are_refused(codec, tmp_path):
    with pytest.raises(ConfigError, match="latents of 16 channels"):
        bundle_factory(tmp_path, vae=codec)(1, {"model.latent_channels": "8"})
    assert not (tmp_path / "bundle-0").exists()


def test_build_takes_it_in_bfloat16_too(codec, tmp_path):
    path = bundle_factory(tmp_path, vae=codec)(1, {"build.precision": "bfloat16"})
    with causalrt.load(path, executor="eager", device="cpu") as engine:
        chunk = next(iter(engine.session(prompt(), num_chunks=1)))
    exact = BlockDecoder(load_vae(codec)).open().decode(chunk.latents)
    assert 0 < (chunk.frames.int() - exact.int()).abs().max() <= 6
