"""The interface that a text encoder provides to the engine and the server."""

from typing import Protocol

import torch

from causalrt.model.text.umt5 import PromptTokens


class PromptEncoder(Protocol):
    """A loaded text encoder."""

    def tokenize(self, prompt: str) -> PromptTokens:
        """Return the tokens that the encoder reads for a prompt.

        Raises:
            PromptError: the encoder refuses the prompt.
        """

    def encode(self, prompt: str) -> torch.Tensor:
        """Return the embeddings `[rows, text_dim]` of a prompt.

        Raises:
            PromptError: the encoder refuses the prompt.
        """

    def forget_prompts(self) -> None:
        """Drop all prompts and embeddings kept for reuse."""
