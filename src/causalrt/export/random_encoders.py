"""A VAE and a text encoder with random weights in the released layouts, for tests, experiments and benchmarks."""

from pathlib import Path
from typing import Any

import torch

from causalrt.model.codecs.vae_checkpoint import VaeConfig, empty_vae
from causalrt.model.text.umt5_checkpoint import video_library

SMALL_VAE = VaeConfig(base_dim=8, num_res_blocks=1)
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'-"


def random_vae(config: VaeConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Create a `diffusers.AutoencoderKLWan` with random weights, whose activations neither vanish nor explode.

    Raises:
        ExecutorError: diffusers is not installed.
    """
    generator = torch.Generator().manual_seed(seed)
    vae = empty_vae(config)
    state = {}
    for name, shape in {name: value.shape for name, value in vae.state_dict().items()}.items():
        noise = torch.randn(shape, generator=generator)
        if "gamma" in name:
            values = 1 + 0.2 * noise
        elif len(shape) > 3:
            values = noise * noise[0].numel() ** -0.5
        else:
            values = 0.02 * noise
        state[name] = values.to(dtype)
    vae.load_state_dict(state, assign=True)
    return vae.requires_grad_(False).eval()


def write_text_encoder(folder: Path, *, text_dim: int, words: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Write a small umT5 in the layout of a diffusers folder; its vocabulary consists of letters and `words`.

    Raises:
        ExecutorError: transformers or tokenizers is not installed.
    """
    transformers, tokenizers = video_library("transformers"), video_library("tokenizers")
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", -1.0) for word in words] + [(letter, -5.0) for letter in f"▁{_LETTERS}"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    sizes = {"d_model": text_dim, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(pieces), **sizes))
    encoder.save_pretrained(folder / "text_encoder")
    return folder
