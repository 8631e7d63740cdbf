"""From a prompt as text to latents, on the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_bundles import bundle_factory
from support.small_encoders import write_text_encoder

from causalrt.cli import main
from causalrt.model.text.umt5 import TextEncoder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundle_factory(tmp_path_factory.mktemp("bundle"))(1)


def generate(bundle, out, *flags):
    return main(["generate", str(bundle), "--out", str(out), "--chunks", "3", "--device", "cpu", "--json", *flags])


def test_a_prompt_is_its_embeddings(bundle, encoder_folder, tmp_path, capsys):
    spoken = ("--prompt", "a fox runs", "--switch", "1=a cat sleeps", "--text-encoder", str(encoder_folder))
    assert generate(bundle, tmp_path / "spoken.safetensors", *spoken) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text_s"] > 0
    encoder = TextEncoder.from_folder(encoder_folder)
    for name, text in (("fox", "a fox runs"), ("cat", "a cat sleeps")):
        save_file({"prompt_embeds": encoder.encode(text)}, tmp_path / f"{name}.safetensors")
    given = ("--prompt-embeds", str(tmp_path / "fox.safetensors"), "--switch", f"1={tmp_path / 'cat.safetensors'}")
    assert generate(bundle, tmp_path / "given.safetensors", *given) == 0
    one, other = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("spoken", "given"))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a fox"], "--text-encoder FOLDER"),
        (["--prompt", "a fox", "--text-encoder", "nowhere"], "nowhere"),
        (["--prompt", "a\x00fox", "--text-encoder", "{folder}"], "control"),
    ],
)
def test_what_cannot_be_encoded_is_refused(bundle, encoder_folder, tmp_path, capsys, flags, message):
    flags = [flag.format(folder=encoder_folder) for flag in flags]
    assert generate(bundle, tmp_path / "out.safetensors", *flags) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
