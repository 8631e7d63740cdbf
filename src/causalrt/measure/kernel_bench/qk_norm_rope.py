"""Cases of `qk_norm_rope` at the sizes of a recipe: the fused op, the unfused ops, and copies of as many bytes.

All sets of operands of a case hold the same values in other memory, so every output of every call is compared with one
reference, in float64.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES
from causalrt.layout import Layout, layout_from_config
from causalrt.measure.kernel_bench.cases import OTHERS, Random, element_bytes, interpreted, require
from causalrt.measure.kernel_bench.timing import Call, Captured, Output, Work
from causalrt.plugins.qk_norm_rope import qk_norm_rope, write_rows
from causalrt.plugins.rotate import rotate_pairs, rotate_pairs_real

NUM_PARTS = 3  # q, k, v
PAIR_ERRORS = {torch.float32: 8e-7, torch.float16: 2**-11 + 1e-6, torch.bfloat16: 2**-8 + 1e-6}
"""Largest allowed error of a value, relative to the length of its channel pair."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Operands of `qk_norm_rope`, and the index by which the unfused step gathers."""

    tensors: tuple[torch.Tensor, ...]
    scatter_index: torch.Tensor

    def clone(self) -> "Rows":
        """Copy the tensors to other memory; the index is shared."""
        return Rows(tensors=tuple(x.clone() for x in self.tensors), scatter_index=self.scatter_index)


class QkNormRope:
    """The rows of one layer on one rank."""

    def __init__(self, config: Config) -> None:
        self.layout: Layout = layout_from_config(config)
        self.world_size = config.build.world_size
        self.num_heads, self.head_dim, self.eps = config.model.num_heads, config.model.head_dim, config.model.eps
        self.dtype = TORCH_DTYPES[config.build.precision]
        self.out_rows = self.world_size * self.layout.scatter_rows
        self.destinations = torch.from_numpy(self.layout.scatter_destinations())

    @property
    def work(self) -> Work:
        """The work if each input is read once and each output is written once."""
        rows, width = self.layout.local_tokens, self.num_heads * self.head_dim
        values = NUM_PARTS * rows * width + 2 * width + self.out_rows * self.head_dim
        tables = 2 * rows * self.head_dim // 2 * element_bytes(torch.float32)
        return Work(num_bytes=values * element_bytes(self.dtype) + tables + self.destinations.nbytes)

    def operands(self, random: Random) -> Rows:
        """Random q, k, v and norm weights, cos, sin, and destinations."""
        rows, width = self.layout.local_tokens, self.num_heads * self.head_dim
        angle = 100 * random(1, rows, self.head_dim // 2, dtype=torch.float32)
        shapes = [(rows, width)] * NUM_PARTS + [(width,)] * 2
        return Rows(
            tensors=(
                *(random(*shape) for shape in shapes),
                angle.cos(),
                angle.sin(),
                self.destinations.to(random.device),
            ),
            scatter_index=torch.from_numpy(self.layout.scatter_index()).flatten().to(random.device),
        )

    def reference(self, given: Rows) -> torch.Tensor:
        """The result in float64 by the definition, `[P * scatter_rows, D]`."""
        q, k, v, norm_q, norm_k, cos, sin, _ = (x.double() for x in given.tensors)
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)  # [S, 1, D / 2]

        def rotated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            normed = x / (x.square().mean(1, keepdim=True) + self.eps).sqrt() * weight
            even, odd = normed.view(len(x), self.num_heads, -1, 2).unbind(-1)
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(1)

        stacked = torch.stack([rotated(q, norm_q), rotated(k, norm_k), v])
        return stacked.view(-1, self.head_dim)[given.scatter_index]

    def kernel(self, given: Rows) -> Call:
        """A call of the fused op, or of its kernel in Triton's interpreter."""
        if not interpreted():
            return lambda: qk_norm_rope(*given.tensors, self.num_heads, self.eps, self.out_rows)

        write: Callable[..., None] = write_rows

        def call() -> Output:
            out = torch.full((self.out_rows, self.head_dim), math.nan, dtype=self.dtype)
            write(out, *given.tensors, self.eps)
            return out

        return call

    def unfused(self, rotate: Callable[..., torch.Tensor], *, packed: bool) -> Callable[[Rows], Output]:
        """The ops of the step without the fused op. On one rank nothing is packed, and v stays where it is."""

        def norm_rope(given: Rows) -> Output:
            q, k, v, norm_q, norm_k, cos, sin, _ = given.tensors
            q = rotate(F.rms_norm(q, norm_q.shape, norm_q, self.eps)[None], cos, sin, self.num_heads)
            k = rotate(F.rms_norm(k, norm_k.shape, norm_k, self.eps)[None], cos, sin, self.num_heads)
            if not packed:
                return q, k
            stacked = torch.cat([q, k, v[None]]).view(-1, self.head_dim)
            return stacked if self.world_size == 1 else stacked.index_select(0, given.scatter_index)

        return norm_rope

    def sides(self, sets: Sequence[Rows], *, compiled: bool) -> dict[str, list[Call]]:
        """The sides by name, with a call for each set of operands."""
        kinds = {"kernel": [self.kernel(given) for given in sets]}
        for packed in (True, False) if self.world_size == 1 else (True,):
            name = "packed" if packed and self.world_size == 1 else "as the step"
            eager = self.unfused(rotate_pairs, packed=packed)
            kinds[f"eager, {name}"] = [functools.partial(eager, given) for given in sets]
            if compiled:
                torch.compiler.reset()
                fast = torch.compile(self.unfused(rotate_pairs_real, packed=packed), fullgraph=True, dynamic=False)
                kinds[f"compiled, {name}"] = [functools.partial(fast, given) for given in sets]
        return kinds

    def copies(self, num_sets: int, num_bytes: int, device: torch.device) -> list[Call]:
        """Calls of `copy_` that read and write `num_bytes` in all."""

        def copy() -> Call:
            source = torch.randint(-128, 127, (num_bytes // 2,), dtype=torch.int8, device=device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)

        return [copy() for _ in range(num_sets)]

    def check(self, name: str, captured: Captured, reference: torch.Tensor) -> float:
        """The largest error of all outputs."""
        limit = PAIR_ERRORS[self.dtype] * (1.0 if name == "kernel" else OTHERS)
        worst = 0.0
        for output in captured.outputs:
            rows = torch.cat(
                [x.reshape(-1, self.head_dim) for x in (output if isinstance(output, tuple) else (output,))]
            )
            want = reference[: len(rows)]
            length = want.view(len(want), -1, 2).norm(dim=-1).clamp(min=2**-14).repeat_interleave(2, dim=1)
            worst = max(
                worst, require(float(((rows.double() - want).abs() / length).max()), limit, f"qk_norm_rope, {name}")
            )
        return worst
