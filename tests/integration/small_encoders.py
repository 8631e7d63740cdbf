"""A small random text encoder and VAE, in released layouts, that fit the `tiny` recipe."""

from pathlib import Path

import torch
from small_bundles import tiny_config

from causalrt.export.random_weights import random_vae
from causalrt.model.vae_checkpoint import VaeConfig

VAE_CONFIG = VaeConfig(base_dim=8, num_res_blocks=1)
WORDS = ["▁a", "▁fox", "▁cat", "▁runs", "▁sleeps"]


def write_text_encoder(folder: Path) -> Path:
    """In the layout of a diffusers folder; it knows `WORDS`."""
    import tokenizers
    import transformers

    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [(piece, -1.0) for piece in WORDS]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    torch.manual_seed(0)
    sizes = {"d_model": tiny_config().model.text_dim, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.UMT5Config(vocab_size=len(pieces), **sizes)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def write_vae(folder: Path) -> Path:
    """In the layout of a diffusers folder."""
    random_vae(VAE_CONFIG, seed=0).save_pretrained(folder / "vae")
    return folder
