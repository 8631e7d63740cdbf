"""The memory of sessions on one rank: KV slots and the prompt's keys and values, at addresses that stay.

On a GPU the memory of a closed session is kept for the next one, last closed first, so that CUDA graphs that were captured with
it can be replayed. Memories are numbered in the order in which they are first made. Sessions are opened and closed in the same
order on every rank, so a number means the same session everywhere, whatever the addresses are: ranks that decide by it whether
to capture or to replay decide alike.
"""

from collections.abc import Sequence

import torch

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES, Executor
from causalrt.layout import Layout
from causalrt.model.wan.step import KVPair
from causalrt.runtime.kv_slots import KVSlots


class SessionBuffers:
    """What one session at a time lives in.

    Attributes:
        number: of this memory, the same on every rank.
        is_new: no session has been open in it on all ranks.
        slots: KV slots.
        cross_kv: the prompt's keys and values, by layer.
    """

    def __init__(self, number: int, slots: KVSlots) -> None:
        self.number = number
        self.is_new = True
        self.slots = slots
        self.cross_kv: Sequence[KVPair] = ()

    @torch.inference_mode()  # an executor may have made the tensors in it, and they take no writes outside
    def begin(self, cross_kv: Sequence[KVPair]) -> None:
        """Start a session with this prompt: nothing of an earlier one is left."""
        self.slots.clear()
        if self.cross_kv:
            self.change_prompt(cross_kv)
        else:
            self.cross_kv = cross_kv

    @torch.inference_mode()
    def change_prompt(self, cross_kv: Sequence[KVPair]) -> None:
        """Go on with another prompt, at the same addresses."""
        for kept, new in zip(self.cross_kv, cross_kv, strict=True):
            for target, source in zip(kept, new, strict=True):
                target.copy_(source)


class SessionBufferPool:
    """Makes memories for one executor, and keeps free ones on a GPU."""

    def __init__(self, executor: Executor, config: Config, layout: Layout) -> None:
        self._executor, self._config, self._layout = executor, config, layout
        self._made = 0
        self._free: list[SessionBuffers] = []

    @property
    def num_free(self) -> int:
        """Memories that are kept for sessions to come."""
        return len(self._free)

    def take(self) -> SessionBuffers:
        """The memory that was given back last, or a new one."""
        if self._free:
            return self._free.pop()
        executor, dtype = self._executor, TORCH_DTYPES[self._config.build.precision]
        self._made += 1  # also on a rank that runs out of memory below: the next number must be the same on all ranks
        slots = KVSlots(self._config, self._layout, dtype, whole_slots=executor.whole_slots, device=executor.device)
        return SessionBuffers(self._made - 1, slots)

    def give_back(self, memory: SessionBuffers, *, opened: bool = True) -> None:
        """The session has ended, or was not `opened` because some rank ran out of memory.

        Memory that was made for a session that was not opened is freed: a rank that has none of it could not give it to the
        next session when the others do.
        """
        memory.is_new = memory.is_new and not opened
        if self._executor.device.type == "cuda" and not memory.is_new:
            self._free.append(memory)
