"""The buffers of sessions on one rank: KV slots and what was made of the prompt, at addresses that stay.

On a GPU the buffers of a closed session are kept for the next one, last closed first, so that CUDA graphs that were captured
with them can be replayed. Buffers are numbered in the order in which they are first made. Sessions are opened and closed in the
same order on every rank, so a number means the same session everywhere, whatever the addresses are, and ranks that decide by it
whether to capture or to replay decide alike.
"""

import torch

from causalrt.config import Config
from causalrt.engines.base import TORCH_DTYPES, Executor, SessionView
from causalrt.layout import Layout
from causalrt.model.wan.conditioning import Conditioning
from causalrt.runtime.kv_slots import KVSlots


class SessionBuffers:
    """The buffers of one session at a time.

    Attributes:
        number: the same on every rank.
        is_new: no session has been open in them on all ranks.
        slots: KV slots.
        prompt: what the executor made of the session's prompt.
    """

    def __init__(self, number: int, slots: KVSlots) -> None:
        self.number = number
        self.is_new = True
        self.slots = slots
        self.prompt: Conditioning = {}

    @torch.inference_mode()  # an executor may have made the tensors in it, and they take no writes outside
    def begin(self, prompt: Conditioning) -> None:
        """Start a session with this prompt; nothing of an earlier session is left."""
        self.slots.clear()
        if self.prompt:
            self.change_prompt(prompt)
        else:
            self.prompt = prompt

    @torch.inference_mode()
    def change_prompt(self, prompt: Conditioning) -> None:
        """Replace the prompt, at the same addresses."""
        for name, kept in self.prompt.items():
            kept.copy_(prompt[name])

    def view(self, history_frames: int, *, step: int = 0) -> SessionView:
        """The part that a step reads and writes after `history_frames` frames of history."""
        return SessionView(
            buffers_id=self.number,
            step=step,
            prompt=self.prompt,
            kv=self.slots.filled(history_frames, step=step),
            kv_rows=self.slots.filled_rows(history_frames, step=step),
        )


class SessionBufferPool:
    """Makes session buffers for one executor, and on a GPU keeps free ones."""

    def __init__(self, executor: Executor, config: Config, layout: Layout) -> None:
        self._executor, self._config, self._layout = executor, config, layout
        self._made = 0
        self._free: list[SessionBuffers] = []

    @property
    def num_free(self) -> int:
        """Buffers that are kept for sessions to come."""
        return len(self._free)

    def take(self) -> SessionBuffers:
        """The buffers that were given back last, or new ones."""
        if self._free:
            return self._free.pop()
        executor, dtype = self._executor, TORCH_DTYPES[self._config.build.precision]
        self._made += 1  # also on a rank that runs out of memory below: the next number must be the same on all ranks
        slots = KVSlots(self._config, self._layout, dtype, whole_slots=executor.whole_slots, device=executor.device)
        return SessionBuffers(self._made - 1, slots)

    def give_back(self, buffers: SessionBuffers, *, opened: bool = True) -> None:
        """Take the buffers of a session that has ended, or that was not `opened` because some rank ran out of memory.

        Buffers that were made for a session that was not opened are freed: a rank that could not make them could not give them
        to the next session when the others do.
        """
        buffers.is_new = buffers.is_new and not opened
        if self._executor.device.type == "cuda" and not buffers.is_new:
            self._free.append(buffers)
