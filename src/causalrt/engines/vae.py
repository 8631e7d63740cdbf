"""The two exported graphs of a streaming decoder, bound once to memory that a session owns.

    first:  latent           -> frames, caches A
    next:   latent, caches A -> frames, caches B
    next:   latent, caches B -> frames, caches A

A session has two sets of caches and three bindings; nothing is allocated or bound from chunk to chunk. (A graph may write a
cache before it has read the old one, so one set does not do.) The two time convolutions' caches of set A start as zeros, and
the first graph does not write them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from causalrt.engines.bundle import FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS, Bundle
from causalrt.errors import BundleError
from causalrt.model.codecs.decode_state import DecodeState, cache_name

LATENT, FRAMES = "latent", "frames"
MADE = ".made"
"""Ending of the name of a cache that a graph makes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTensor:
    """An input or output of a graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> torch.Tensor:
        """Memory for it."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class GraphVae(ABC):
    """The two graphs, loaded by a runtime.

    Attributes:
        device: where it computes.
        latent: what it takes, one latent.
        caches: what a session keeps, twice.
        outputs: of the first graph, and of the next one.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        inputs: Mapping[str, GraphTensor],
        outputs: Sequence[Mapping[str, GraphTensor]],
    ) -> None:
        self.device = device
        self.latent = inputs[LATENT]
        self.caches = [inputs[cache_name(index)] for index in range(len(inputs) - 1)]
        self.outputs = outputs

    @abstractmethod
    def bind(self, graph: int, memory: Mapping[str, torch.Tensor]) -> Callable[[], None]:
        """What runs the first graph (0) or the next one (1) over this memory, inputs and outputs by name."""

    def warmed_up(self) -> None:
        """See `Decoder.warmed_up`."""
        return

    def open(self) -> DecodeState:
        """The start of a video; memory for both sets of caches is taken here."""
        return GraphDecodeState(self)


class GraphDecodeState(DecodeState):
    """Two sets of caches, and bindings that hold their addresses."""

    def __init__(self, vae: GraphVae) -> None:
        _, channels, height, width = vae.latent.shape
        super().__init__(channels=channels, dtype=vae.outputs[0][FRAMES].dtype, latent_size=(height, width))
        self._vae = vae
        self._current = 0
        self._latent = vae.latent.empty(vae.device)
        self._frames = [outputs[FRAMES].empty(vae.device) for outputs in vae.outputs]
        self._sets = [[cache.empty(vae.device) for cache in vae.caches] for _ in range(2)]
        self._first = self._bind(0, read=None, written=0)
        self._next = [self._bind(1, read=read, written=1 - read) for read in (0, 1)]
        self._clear_caches()

    def _bind(self, graph: int, *, read: int | None, written: int) -> Callable[[], None]:
        outputs = self._vae.outputs[graph]
        memory = {LATENT: self._latent, FRAMES: self._frames[graph]}
        for index, _ in enumerate(self._vae.caches):
            if read is not None:
                memory[cache_name(index)] = self._sets[read][index]
            if cache_name(index) + MADE in outputs:
                memory[cache_name(index) + MADE] = self._sets[written][index]
        return self._vae.bind(graph, memory)

    def _decode_each(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        for latent in latents.unbind(0):
            self._latent[0].copy_(latent)
            graph = 1 if self.latent_frames else 0
            if graph:
                self._next[self._current]()
                self._current = 1 - self._current
            else:
                self._first()
            self.latent_frames += 1
            yield self._frames[graph][0].transpose(0, 1)

    def _cache_shapes(self, latent_size: tuple[int, int]) -> list[tuple[int, ...]]:
        return [cache.shape for cache in self._vae.caches]

    def _caches(self) -> list[torch.Tensor]:
        return [cache.to("cpu", copy=True) for cache in self._sets[self._current]]

    def _set_caches(self, caches: list[torch.Tensor]) -> None:
        self._current = 0
        for own, cache in zip(self._sets[0], caches, strict=True):
            own.copy_(cache)

    def _clear_caches(self) -> None:
        self._current = 0
        for index, cache in enumerate(self._sets[0]):
            if cache_name(index) + MADE not in self._vae.outputs[0]:
                cache.zero_()


def check_has_vae(bundle: Bundle) -> None:
    """Refuse a bundle that cannot make pixels.

    Raises:
        BundleError: it was built without a VAE.
    """
    if bundle.vae is None:
        raise BundleError(f"{bundle.path} was built without a VAE; build it again with `--vae FILE`")


def missing_graphs(folder: Path) -> list[str]:
    """Which of the decoder's files a folder lacks."""
    return [name for name in (FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS) if not (folder / name).is_file()]
