"""The demo model's text encoder, which knows a few dozen words and has the interface of `TextEncoder`.

    "A red ball, moving right!"  ->  red circle moves right  ->  rows of a table [words, text_dim]

`words.safetensors` in a folder holds the table, and in its header, as JSON, the rows of each word. A word may stand for others
(`ball` for `circle`), or for none (`the`); an unknown one is an error, which lists the known words. The order of the words has
no effect.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from causalrt.atomic_files import atomic_file
from causalrt.errors import CheckpointError, PromptError
from causalrt.model.text.umt5 import PromptTokens
from causalrt.regular_files import regular_file

WORDS_FILE = "words.safetensors"
_TABLE, _WORDS = "embedding.weight", "words"
MAX_PROMPT_CHARS = 2_000
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class WordEncoder:
    """A loaded table. `encode` may be called from several threads.

    Attributes:
        text_dim: width of the embeddings.
        max_tokens: largest number of rows of a prompt.
        words: rows of each known word; empty for a filler word.
    """

    layout = "words"

    def __init__(self, table: torch.Tensor, words: Mapping[str, tuple[int, ...]], *, max_tokens: int) -> None:
        self._table, self.words, self.max_tokens = table, dict(words), max_tokens
        self.text_dim = table.shape[1]

    @classmethod
    def from_folder(cls, folder: Path, *, text_dim: int | None = None, max_tokens: int = 512) -> Self:
        """Read `words.safetensors`.

        Args:
            folder: folder that holds the file.
            text_dim: required width of the embeddings; None accepts that of the file.
            max_tokens: largest number of rows of a prompt, the `text_len` of the model; longer prompts are refused.

        Raises:
            CheckpointError: the file is missing, damaged, or of another width.
        """
        path = folder / WORDS_FILE
        try:
            with safe_open(regular_file(path), framework="pt") as file:
                table = file.get_tensor(_TABLE)
                words = json.loads((file.metadata() or {})[_WORDS])
            rows = {str(word): _whole_numbers(each) for word, each in words.items()}
        except _UNREADABLE as error:
            raise CheckpointError(f"{path} is no table of words: {error!r}") from None
        if table.dim() != 2 or table.dtype not in _DTYPES or not table.isfinite().all():
            raise CheckpointError(
                f"{path}: {_TABLE} must be finite [words, text_dim], got {table.dtype} {list(table.shape)}"
            )
        wild = [word for word, each in rows.items() if not all(0 <= row < len(table) for row in each)]
        if wild:
            raise CheckpointError(
                f"{path} has words whose rows are not in its table of {len(table)}: {', '.join(wild)}"
            )
        if text_dim not in (None, table.shape[1]):
            raise CheckpointError(
                f"{path} makes embeddings of width {table.shape[1]}, but the model wants text_dim {text_dim}; take the words "
                "that the model was trained with"
            )
        return cls(table.float(), rows, max_tokens=max_tokens)

    def save(self, folder: Path) -> None:
        """Write the file that `from_folder` reads.

        Raises:
            CheckpointError: the file cannot be written; an existing file is left unchanged.
        """
        path = folder / WORDS_FILE
        try:
            with atomic_file(path) as partial:
                partial.write_bytes(save({_TABLE: self._table}, {_WORDS: json.dumps(self.words)}))
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error}; choose a writable folder") from error

    def encode(self, prompt: str) -> torch.Tensor:
        """Return the embeddings `[rows, text_dim]` of a prompt, float32 on the CPU.

        Raises:
            PromptError: see `tokenize`.
        """
        return self._table[list(self.tokenize(prompt).ids)].clone()

    def tokenize(self, prompt: str) -> PromptTokens:
        """Return the rows of the table that a prompt stands for, never truncated.

        Raises:
            PromptError: the prompt is empty or too long, has unknown words (the known ones are listed), or only filler words.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"a prompt must be a str, got {type(prompt).__name__}")
        if len(prompt) > MAX_PROMPT_CHARS:
            raise PromptError(f"a prompt may have {MAX_PROMPT_CHARS} characters here, got {len(prompt)}; shorten it")
        found = list[str]()
        for token in re.findall(r"\w+(?:-\w+)*", prompt.lower()):
            joined = token.replace("-", "")  # as in counter-clockwise
            found += [joined] if joined in self.words else token.split("-")
        unknown = list(dict.fromkeys(word for word in found if word not in self.words))
        if unknown:
            raise PromptError(f"this model does not know {', '.join(unknown[:10])}; its words are: {self._known()}")
        rows = list(dict.fromkeys(row for word in found for row in self.words[word]))
        if not 1 <= len(rows) <= self.max_tokens:
            raise PromptError(f"a prompt must have 1 to {self.max_tokens} words that say something: {self._known()}")
        return PromptTokens(ids=tuple(rows), truncated=False)

    def forget_prompts(self) -> None:
        """See `PromptEncoder.forget_prompts`; nothing is kept."""

    def _known(self) -> str:
        """Return one word for each meaning, the first in the file."""
        first: dict[tuple[int, ...], str] = {}
        for word, rows in self.words.items():
            first.setdefault(rows, word)
        return ", ".join(sorted(word for rows, word in first.items() if rows))


def _whole_numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError(f"rows of a word must be a list of whole numbers, got {values!r}")
    return tuple(values)
