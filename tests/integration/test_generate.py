"""`causalrt generate` with a VAE: an MP4 from a prompt, continued from a file, with the first frame's latency by stage."""

import json

import av
import pytest
import torch
from safetensors.torch import load_file
from support.small_bundles import bundle_factory, tiny_config
from support.small_encoders import write_text_encoder, write_vae

from causalrt import write_video
from causalrt.cli import main

pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")
STAGES = ["text", "queue", "denoise", "gather", "decode", "hand_over", "other"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    bundle = bundle_factory(folder, vae=write_vae(folder / "vae"))
    text_encoder = write_text_encoder(folder / "text")
    return [str(bundle(2)), "--device", "cpu", "--prompt", "a fox runs", "--text-encoder", str(text_encoder), "--json"]


def run(capsys, *flags):
    code = main(["generate", *map(str, flags)])
    printed = capsys.readouterr()
    return json.loads(printed.out) if code == 0 else printed.err + printed.out


def pictures(path):
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)])


def write_image(path):
    image = av.VideoFrame.from_ndarray(torch.zeros(20, 30, 3, dtype=torch.uint8).numpy(), format="rgb24")
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 30, 20, "rgb24"
        container.mux([*stream.encode(image), *stream.encode(None)])


def test_a_prompt_becomes_a_video(flags, tmp_path, capsys):
    report = run(capsys, *flags, "--chunks", 2, "--out", tmp_path / "fox.mp4", "--warm")
    video = tiny_config().video
    assert report["shape"] == [21, video.pixel_height, video.pixel_width, 3]
    frames = pictures(tmp_path / "fox.mp4")
    assert list(frames.shape) == report["shape"]
    assert frames.float().std() > 10
    cold, warm = (report["first_frame"][name] for name in ("cold", "warm"))
    assert list(cold["stages_ms"]) == ["load", "text", "given", *STAGES[1:]]
    assert list(warm["stages_ms"]) == STAGES
    for first in (cold, warm):
        assert sum(first["stages_ms"].values()) == pytest.approx(first["total_ms"])
        assert all(first["stages_ms"][stage] > 0 for stage in ("text", "denoise", "decode"))
    assert [path.name for path in tmp_path.iterdir()] == ["fox.mp4"]

    more = run(capsys, *flags, "--chunks", 1, "--given", tmp_path / "fox.mp4", "--out", tmp_path / "more.mp4")
    assert more["shape"] == [21 + 12, video.pixel_height, video.pixel_width, 3]
    assert more["first_frame"]["cold"]["stages_ms"]["given"] > 0
    latents = run(capsys, *flags, "--chunks", 1, "--given", tmp_path / "fox.mp4", "--out", tmp_path / "l.safetensors")
    assert latents["shape"] == [6 + 3, 16, video.latent_height, video.latent_width]
    assert list(load_file(tmp_path / "l.safetensors")["latents"].shape) == latents["shape"]


def test_what_cannot_be_given(flags, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    write_image(tmp_path / "image.png")
    message = run(capsys, *flags, "--given", tmp_path / "image.png", "--out", out)
    assert (
        "has 1 frame(s), and the bundle's chunks have 3 latents, 9 frames for the first; give a longer clip" in message
    )
    (tmp_path / "no.mp4").write_bytes(b"nothing")
    assert "cannot be read as an image or a video" in run(capsys, *flags, "--given", tmp_path / "no.mp4", "--out", out)
    assert not out.exists()


def test_a_clip_that_leaves_nothing_to_generate_is_refused(flags, tmp_path, capsys):
    video = tiny_config().video
    size = (video.pixel_height, video.pixel_width, 3)
    horizon = 4 * video.horizon_frames - 3
    write_video(tmp_path / "long.mp4", torch.zeros(horizon + 11, *size, dtype=torch.uint8))
    message = run(capsys, *flags, "--given", tmp_path / "long.mp4", "--out", tmp_path / "out.mp4")
    assert f"long.mp4 is a clip that fills the bundle's horizon of {horizon} frames" in message
    assert "--given-part last" in message
    assert not (tmp_path / "out.mp4").exists()


def test_a_transparent_image_is_given_over_a_background(flags, tmp_path, capsys):
    write_image(tmp_path / "image.png")
    message = run(
        capsys, *flags, "--given", tmp_path / "image.png", "--background", "nocolour", "--out", tmp_path / "o.mp4"
    )
    assert "background must be a colour such as white or #102030, got 'nocolour'" in message


def test_an_interrupted_video_leaves_nothing(flags, tmp_path, monkeypatch):
    from causalrt.runtime.session import Session

    real = Session.__next__

    def second_fails(self):
        if self._next:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Session, "__next__", second_fails)
    assert main(["generate", *flags, "--out", str(tmp_path / "out.mp4")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_a_first_chunk(tmp_path, capsys):
    """Given frames are counted before anything is started: a chunk that is not there has no prompt, and is not asked for."""
    bundles = bundle_factory(tmp_path, vae=write_vae(tmp_path / "vae"))
    bundle = bundles(1, {"video.independent_first_frame": "true", "video.horizon_frames": "13"})
    torch.save(torch.zeros(2, tiny_config().model.text_dim), tmp_path / "prompt.pt")
    write_image(tmp_path / "image.png")
    flags = [
        bundle,
        "--device",
        "cpu",
        "--prompt-embeds",
        tmp_path / "prompt.pt",
        "--given",
        tmp_path / "image.png",
        "--json",
    ]
    out = tmp_path / "out.mp4"
    assert "--switch 4=...: chunks are 0 to 3" in run(
        capsys, *flags, "--switch", f"4={tmp_path / 'prompt.pt'}", "--out", out
    )
    assert "5 chunks of 3 latent frames asked for after 1 of initial latents" in run(
        capsys, *flags, "--chunks", 5, "--out", out
    )
    report = run(capsys, *flags, "--out", out)
    assert (len(report["chunks"]), report["shape"][0]) == (4, 1 + 4 * 12)
