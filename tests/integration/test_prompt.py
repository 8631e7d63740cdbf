"""From a prompt as text to latents, on the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bundles import bundle_factory, tiny_config

from causalrt.cli import main
from causalrt.model.text import TextEncoder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A small random encoder in the layout of a diffusers folder."""
    folder = tmp_path_factory.mktemp("text")
    words = ["▁a", "▁fox", "▁cat", "▁runs", "▁sleeps"]
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [(piece, -1.0) for piece in words]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = {"d_model": tiny_config().model.text_dim, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.UMT5Config(vocab_size=len(pieces), **sizes)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


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
