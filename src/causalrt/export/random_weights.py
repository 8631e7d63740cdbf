"""Random weights in the layout of a released checkpoint, for tests, the demo and benchmarks.

The distributions are chosen such that activations keep their order of magnitude through the blocks, attention is neither
uniform nor one-hot, and every parameter affects the result, so that a wrong transpose or a missing bias is detected.
"""

import hashlib
import math
from collections.abc import Iterator

import torch

from causalrt.config import ModelConfig
from causalrt.export.checkpoint import model_shapes


def random_weights(
    model: ModelConfig, *, seed: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (reference name, float32 tensor) for every tensor of the model.

    Each tensor has its own generator, seeded from `seed` and the tensor's name, so that its values depend on neither the order
    of the tensors nor the number of layers. They do depend on the kind of `device` on which they are generated.
    """
    for name, shape in model_shapes(model).items():
        mean, std = _mean_and_std(name, shape)
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
        yield name, torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean)


def _mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith(("norm_q.weight", "norm_k.weight")):
        return 1.35, 0.35
    if name.endswith("norm3.weight"):
        return 1.0, 0.1
    if name.endswith("modulation"):
        return 0.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.02
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))
