"""The UMT5 text encoder that Wan's models are conditioned on: from prompts to embeddings.

    prompt -> clean_prompt -> tokenize -> [tokens] -> UMT5 encoder -> rows of the prompt's own tokens [tokens, text_dim]
                    |                                                     |
                    +------------------- PromptCache ---------------------+

This module processes the text; `umt5_checkpoint.py` loads the weights. The session pads the rows with zeros to `text_len`, as
the reference does. Encoding the prompt's tokens alone gives the same rows as encoding 512 with the padding masked, but is
faster.

`tokenizer.json` is used unchanged: the T5 class of transformers 5 would build another tokenizer from its vocabulary, without
the byte fallback, and with the wrong token for unknown characters.
"""

import html
import logging
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from causalrt.errors import CheckpointError, ConfigError, ExecutorError, PromptError
from causalrt.model.prompt_cache import CacheInfo, PromptCache
from causalrt.model.text.umt5_checkpoint import load_encoder, video_library
from causalrt.model.text.umt5_files import EncoderFiles, EncoderLayout, find_encoder_files

MAX_TOKENS = 512  # as Wan's models were trained
MAX_PROMPT_CHARS = 20_000

_log = logging.getLogger(__name__)

# Control characters that are not white space, and unpaired surrogates. Control characters above U+007F are left to ftfy, since
# wrongly decoded text contains them.
_UNUSABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTokens:
    """Token IDs of a cleaned prompt, including the end token; `truncated` says whether the prompt had more."""

    ids: tuple[int, ...]
    truncated: bool


class TextEncoder:
    """A loaded text encoder. `encode` may be called from several threads; one prompt is encoded at a time.

    Attributes:
        layout: layout of the folder: `wan`, `diffusers` or `transformers`.
        text_dim: width of the embeddings.
        max_tokens: largest number of rows of a prompt.
        dtype: type in which the encoder computes.
        device: device on which it computes.
    """

    def __init__(self, model: Any, tokenizer: Any, *, layout: EncoderLayout, max_tokens: int, cache_bytes: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._encoding = threading.Lock()
        self._cache = PromptCache(cache_bytes)
        self.layout: EncoderLayout = layout
        self.text_dim: int = model.config.d_model
        self.max_tokens = max_tokens
        self.dtype: torch.dtype = model.shared.weight.dtype
        self.device: torch.device = model.shared.weight.device

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        text_dim: int | None = None,
        max_tokens: int = MAX_TOKENS,
        cache_bytes: int = 64 * 2**20,
    ) -> Self:
        """Load the text encoder of a released folder. Nothing is downloaded.

        On the CPU, weights of type `dtype` stay in the mapped file, which must not be modified as long as the encoder exists.

        Args:
            folder: Wan's release (its `.pth` and `google/umt5-xxl/`), a diffusers folder (`text_encoder/`, `tokenizer/`), or
                one folder with `config.json`, `model.safetensors` and `tokenizer.json`.
            device: device to compute on.
            dtype: type to compute in: bfloat16 as the reference does, or float32.
            text_dim: required width of the embeddings; None accepts that of the folder.
            max_tokens: number of tokens to which longer prompts are truncated, the `text_len` of the model.
            cache_bytes: size of the prompt cache in bytes; 0 disables it.

        Raises:
            CheckpointError: files are missing, damaged or contain code, or are not a UMT5 encoder of the required width.
            ConfigError: a setting is impossible.
            ExecutorError: a library of the extra `video` is not installed, or the device is not available.
        """
        if dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(f"the text encoder computes in torch.bfloat16 or torch.float32, got {dtype}")
        if not 1 <= max_tokens <= MAX_TOKENS:
            raise ConfigError(f"max_tokens must be 1 to {MAX_TOKENS}, got {max_tokens}")
        if cache_bytes < 0:
            raise ConfigError(f"cache_bytes must not be negative, got {cache_bytes}")
        started = time.perf_counter()
        target = _usable_device(device)
        files = find_encoder_files(folder)
        tokenizer = _load_tokenizer(files, max_tokens)
        video_library("ftfy")  # fail now rather than at the first prompt
        model = load_encoder(files, dtype=dtype, device=target, text_dim=text_dim)
        if tokenizer.get_vocab_size() > model.config.vocab_size:
            raise CheckpointError(
                f"{files.tokenizer} has {tokenizer.get_vocab_size()} tokens, but {files.weights} has embeddings for "
                f"{model.config.vocab_size}; take both from the same release"
            )
        seconds = time.perf_counter() - started
        _log.info("text encoder %s: layout %s, %s on %s, %.1f s", files.weights, files.layout, dtype, target, seconds)
        return cls(model, tokenizer, layout=files.layout, max_tokens=max_tokens, cache_bytes=cache_bytes)

    def tokenize(self, prompt: str) -> PromptTokens:
        """Return the tokens that `encode` gives to the encoder. A prompt that is too long is truncated, as in the reference.

        Raises:
            PromptError: the prompt is not a usable text.
        """
        return self._tokens(clean_prompt(prompt))

    def encode(self, prompt: str) -> torch.Tensor:
        """Return the embeddings `[tokens, text_dim]` of a prompt, 1 to `max_tokens` rows of float32 on the CPU.

        The caller may keep the tensor. A truncated prompt is logged as a warning; `tokenize` reports it beforehand.

        Raises:
            PromptError: the prompt is not a usable text.
        """
        text = clean_prompt(prompt)
        embeds = self._cache.get(text)
        if embeds is None:
            with self._encoding:
                embeds = self._cache.get(text)  # another thread may have encoded it meanwhile
                if embeds is None:
                    embeds = self._encode(text)
                    self._cache.put(text, embeds)
        return embeds.to(torch.float32, copy=True)

    def forget_prompts(self) -> None:
        """Empty the prompt cache."""
        self._cache.clear()

    def cache_info(self) -> CacheInfo:
        """Return the hit and miss counts of the prompt cache, and what it holds."""
        return self._cache.info()

    def _tokens(self, text: str) -> PromptTokens:
        encoding = self._tokenizer.encode(text)
        return PromptTokens(ids=tuple(encoding.ids), truncated=bool(encoding.overflowing))

    @torch.no_grad()
    def _encode(self, text: str) -> torch.Tensor:
        tokens = self._tokens(text)
        if tokens.truncated:
            _log.warning("a prompt of %d characters was cut to %d tokens", len(text), self.max_tokens)
        ids = torch.tensor([tokens.ids], device=self.device)
        rows: torch.Tensor = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        return rows.cpu()


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as the reference does.

    Text is repaired by ftfy, HTML entities are resolved (twice), and runs of white space become one space.

    Raises:
        PromptError: the prompt is empty, too long, or contains characters that no text has.
        ExecutorError: ftfy is not installed.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"a prompt must be a str, got {type(prompt).__name__}")
    if len(prompt) > MAX_PROMPT_CHARS:
        raise PromptError(
            f"a prompt may have {MAX_PROMPT_CHARS} characters, got {len(prompt)}; shorten it: "
            f"the model sees {MAX_TOKENS} tokens at most"
        )
    if unusable := _UNUSABLE.search(prompt):
        raise PromptError(
            f"the prompt has the character U+{ord(unusable[0]):04X} at position {unusable.start()}, which no text has "
            "(a control character or half of a surrogate pair); remove it"
        )
    try:
        text = html.unescape(html.unescape(video_library("ftfy").fix_text(prompt)))
    except ValueError as error:  # &#999...9; has more digits than Python converts
        raise PromptError(f"the prompt has an entity that is no character ({error}); remove it") from None
    return re.sub(r"\s+", " ", text).strip()


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"no device {device!r}: choose cpu or cuda ({str(error).splitlines()[0]})") from None
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"the text encoder runs on cpu or cuda, got {device!r}")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ExecutorError(f"there is no device {target} here, torch sees {torch.cuda.device_count()}; choose cpu")
    return target


def _load_tokenizer(files: EncoderFiles, max_tokens: int) -> Any:
    """Load `tokenizer.json`, with truncation at `max_tokens` and without padding."""
    tokenizers = video_library("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(files.tokenizer))
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"{files.tokenizer} is damaged or no tokenizer: {error}") from None
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    if len(tokenizer.encode("").ids) != 1:
        raise CheckpointError(f"{files.tokenizer} must end each text with one token (</s>), as that of UMT5 does")
    return tokenizer
