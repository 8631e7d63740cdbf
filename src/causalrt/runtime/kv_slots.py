"""The KV slots of one session on one rank: memory for keys and values, and the copy of clean frames into history.

    | staging: the current chunk | sinks, pinned | ring of clean frames |      rows of one shard: [1, W * T, heads * D]
    0                            F*T            ...                     W*T                   or [1, heads, W * T, D]

With tokens as the slow axis, the filled rows are a contiguous prefix, and executors bind a view of it. With heads as the slow
axis, executors bind the slots whole, as an engine with static shapes needs them.

The class owns the memory and the commit. Executors write staging, and they rotate keys: by absolute position before they are
stored, or whenever they are read.
"""

import torch

from causalrt.config import Config
from causalrt.layout import Layout, slots_from_config
from causalrt.model.wan.step import KVPair


class KVSlots:
    """The keys and values of one session on one rank, by layer and shard."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        dtype: torch.dtype,
        *,
        whole_slots: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.plan = slots_from_config(config)
        self.whole_slots = whole_slots
        self._tokens_per_frame = config.tokens_per_frame
        rows, dim = self.plan.capacity_frames * config.tokens_per_frame, config.model.head_dim
        self._head_dim = dim

        def slots(heads: int) -> torch.Tensor:
            if whole_slots:  # unfilled rows get weight zero, and zero times NaN is NaN
                return torch.zeros(1, heads, rows, dim, dtype=dtype, device=device)
            return torch.empty(1, rows, heads * dim, dtype=dtype, device=device)

        self._pairs: list[list[KVPair]] = [
            [(slots(shard.num_heads), slots(shard.num_heads)) for shard in layout.shards]
            for _ in range(config.model.num_layers)
        ]
        self._frames = self._views_of_frames()
        self.rows_moved = 0

    def _views_of_frames(self) -> list[list[torch.Tensor]]:
        """For each frame the views of its rows in all tensors, split by heads where heads are slow, so as to be contiguous."""
        tensors = [tensor[0] for layer in self._pairs for pair in layer for tensor in pair]
        matrices = [head for tensor in tensors for head in tensor] if self.whole_slots else tensors
        by_matrix = [matrix.split(self._tokens_per_frame) for matrix in matrices]
        return [list(views) for views in zip(*by_matrix, strict=True)]

    def clear(self) -> None:
        """Forget an earlier session; masked rows are zeroed, since they must be finite."""
        self.rows_moved = 0
        if self.whole_slots:
            for layer in self._pairs:
                for pair in layer:
                    for tensor in pair:
                        tensor.zero_()

    def filled_rows(self, history_frames: int, *, step: int = 0) -> int:
        """Rows that are filled, staging included, while a step runs after `history_frames` frames of history."""
        return self.plan.valid_frames(history_frames, step=step) * self._tokens_per_frame

    def filled(self, history_frames: int, *, step: int = 0) -> list[list[KVPair]]:
        """Views of the filled prefix, or of the slots whole, as the executor binds them."""
        if self.whole_slots:
            return self._pairs
        rows = self.filled_rows(history_frames, step=step)
        return [[(k[:, :rows], v[:, :rows]) for k, v in layer] for layer in self._pairs]

    def history(self, history_frames: int) -> dict[str, torch.Tensor]:
        """Views `[rows, heads, D]` of the rows of `history_frames` frames of history, by name, layer by layer."""
        start = self.plan.staging_frames * self._tokens_per_frame
        rows = slice(start, max(start, self.filled_rows(history_frames)))
        found = {}
        for layer, shards in enumerate(self._pairs):
            for shard, pair in enumerate(shards):
                for kind, tensor in zip("kv", pair, strict=True):
                    if self.whole_slots:
                        view = tensor[0, :, rows].transpose(0, 1)
                    else:
                        heads = tensor.shape[2] // self._head_dim
                        view = tensor[0, rows].view(-1, heads, self._head_dim)
                    found[f"{kind}.{layer}.{shard}"] = view
        return found

    def commit(self, history_frames: int, *, step: int = 0) -> None:
        """Copy the clean chunk from staging to history, at most F frames whatever the window.

        History never overlaps staging, so the order of the copies does not matter.
        """
        moves = list(self.plan.commits(history_frames, step=step))
        if not moves:
            return
        sources = [view for staged, _ in moves for view in self._frames[staged]]
        targets = [view for _, slot in moves for view in self._frames[slot]]
        torch._foreach_copy_(targets, sources)  # a few launches for all layers, but only if views are contiguous
        self.rows_moved += len(moves) * self._tokens_per_frame
