"""What a text encoder provides to the engine and the server."""

from typing import Protocol

import torch

from causalrt.model.text.umt5 import PromptTokens


class PromptEncoder(Protocol):
    """A loaded text encoder."""

    def tokenize(self, prompt: str) -> PromptTokens:
        """The tokens that the encoder reads of a prompt.

        Raises:
            PromptError: it refuses the prompt.
        """

    def encode(self, prompt: str) -> torch.Tensor:
        """Embeddings `[rows, text_dim]` of a prompt.

        Raises:
            PromptError: it refuses the prompt.
        """

    def forget_prompts(self) -> None:
        """Drop prompts and embeddings that are kept for reuse."""
