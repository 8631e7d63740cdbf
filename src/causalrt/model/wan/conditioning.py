"""The conditioning tensors that a step takes, computed beforehand from a prompt and a timestep.

    prompt      text embeddings -> keys and values of each layer's cross-attention
    timestep    its sinusoid    -> its embedding and the modulation derived from it

Code outside of `model/wan` knows of a `Conditioning` only that its tensors have the names of the step graph's inputs.
"""

from collections.abc import Mapping

import torch

Conditioning = Mapping[str, torch.Tensor]

TIME_NAMES = ("e", "e0")
PROMPT_KINDS = ("cross_k", "cross_v")


def prompt_names(num_layers: int) -> list[str]:
    """Return the names of a prompt's conditioning, in the order of `PromptGraph`'s outputs."""
    return [f"{kind}.{layer}" for layer in range(num_layers) for kind in PROMPT_KINDS]


def is_prompt_name(name: str) -> bool:
    """Return whether an input of the step graph belongs to the prompt."""
    return name.startswith(PROMPT_KINDS)


def time_arguments(time: Conditioning) -> tuple[torch.Tensor, ...]:
    """Return a timestep's conditioning as the arguments `e` and `e0` of `ChunkStep.forward`."""
    return tuple(time[name] for name in TIME_NAMES)


def prompt_argument(prompt: Conditioning) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a prompt's conditioning as the argument `cross_kv` of `ChunkStep.forward`."""
    return [
        (prompt[f"cross_k.{layer}"], prompt[f"cross_v.{layer}"]) for layer in range(len(prompt) // len(PROMPT_KINDS))
    ]
