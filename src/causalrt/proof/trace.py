"""Traces: what each rank computes and exchanges, recorded while it runs.

    Rollout -> TracedExecutor -> Executor -> TracedCollectives -> ThreadCollectives
                    |                               |
                    +----------> Trace <------------+          one trace a rank, one StepTrace for each traced forward

A forward's inputs are recorded as well, so that another replica can run the forward from the same inputs.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from causalrt.engines.base import Executor
from causalrt.model.wan.step import KVPair, KVTensors
from causalrt.proof.ranks import ThreadCollectives, ThreadGroup

StepId = tuple[int, str]
"""Chunk and forward: `(1, "step 0")`, or `(1, "refresh")` for the context pass."""


@dataclass(kw_only=True, slots=True)
class StepTrace:
    """One forward on one rank.

    Attributes:
        place: chunk and forward.
        x: `[S, 64]`.
        e: `[C]`.
        e0: `[6, C]`.
        first_frame: time index that the step was called with.
        kv: the KV tensors that were bound, as they were before the step, by layer and head shard.
        cross_kv: the prompt's keys and values, by layer.
        kv_rows: number of filled rows.
        step: number of the kind of step.
        outputs: by name, in the order in which they are computed: blocks sent and received, KV slots after the step, flow.
        residuals: the input of each LayerNorm, `[S, C]`, in order; recorded for eager only.
    """

    place: StepId
    x: torch.Tensor
    e: torch.Tensor
    e0: torch.Tensor
    first_frame: int
    kv: list[list[KVPair]]
    cross_kv: list[KVPair]
    kv_rows: int
    step: int
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    residuals: list[torch.Tensor] = field(default_factory=list)


class Trace:
    """The traced forwards of one rank; every chunk has `num_steps` denoising steps and a context pass."""

    def __init__(self, places: Collection[StepId], *, num_steps: int) -> None:
        self.forwards: dict[StepId, StepTrace] = {}
        self.running: StepTrace | None = None
        self._places, self._num_steps, self._count = places, num_steps, 0

    def next_place(self) -> StepId | None:
        """The place of the next forward, or None if it is not traced."""
        chunk, step = divmod(self._count, self._num_steps + 1)
        self._count += 1
        place = chunk, f"step {step}" if step < self._num_steps else "refresh"
        return place if place in self._places else None


class TracedCollectives(ThreadCollectives):
    """Collectives whose blocks are recorded while a traced forward runs."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        super().__init__(group, rank)
        self.trace: Trace | None = None
        self.exchanges = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """See `Collectives.all_to_all`."""
        super().all_to_all(received, sent)
        name = exchange_name(self.exchanges)
        self.exchanges += 1
        if self.trace is not None and self.trace.running is not None:
            self.trace.running.outputs[f"{name} sent"] = sent.detach().clone()
            self.trace.running.outputs[f"{name} received"] = received.detach().clone()


def exchange_name(number: int) -> str:
    """Name of a forward's exchange `number`; a layer has two."""
    layer, second = divmod(number, 2)
    return f"layer {layer} {'gather_heads' if second else 'scatter_heads'}"


class LayerNormInputs(TorchFunctionMode):
    """Records the input of every LayerNorm, which is the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`; record its input if it is a LayerNorm."""
        if func is F.layer_norm:
            self.seen.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def residual_name(number: int) -> str:
    """The part of the model that computed the input of a forward's LayerNorm `number`; a layer has three, the head one."""
    layer, part = divmod(number, 3)
    if part:
        return f"layer {layer} {'self-attention' if part == 1 else 'cross-attention'}"
    return f"layer {layer - 1} feed-forward" if layer else "patch embedding"


class TracedExecutor:
    """An executor whose forwards are recorded while it has a trace."""

    def __init__(self, executor: Executor, collectives: TracedCollectives, *, with_residuals: bool = False) -> None:
        self.device, self.whole_slots = executor.device, executor.whole_slots
        self.encode_prompt, self.embed_time = executor.encode_prompt, executor.embed_time
        self.warmed_up, self.graph_bytes = executor.warmed_up, executor.graph_bytes
        self._executor, self._collectives, self._with_residuals = executor, collectives, with_residuals
        self._bound: tuple[KVTensors, Sequence[KVPair], int, int] = ((), (), 0, 0)

    @property
    def trace(self) -> Trace | None:
        """The trace that forwards are recorded in; None records nothing."""
        return self._collectives.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._collectives.trace = trace

    def bind(self, kv: KVTensors, cross_kv: Sequence[KVPair], *, kv_rows: int, memory: int, step: int = 0) -> None:
        """See `Executor.bind`."""
        self._bound = kv, cross_kv, kv_rows, step
        self._executor.bind(kv, cross_kv, kv_rows=kv_rows, memory=memory, step=step)

    def step(self, x: torch.Tensor, e: torch.Tensor, e0: torch.Tensor, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        self._collectives.exchanges = 0
        place = self.trace.next_place() if self.trace is not None else None
        if self.trace is None or place is None:
            return self._executor.step(x, e, e0, first_frame)
        kv, cross_kv, kv_rows, step = self._bound
        forward = StepTrace(
            place=place,
            x=x.clone(),
            e=e.clone(),
            e0=e0.clone(),
            first_frame=first_frame,
            kv=[clone_pairs(layer) for layer in kv],
            cross_kv=clone_pairs(cross_kv),
            kv_rows=kv_rows,
            step=step,
        )
        self.trace.running = forward
        if self._with_residuals:
            with LayerNormInputs() as norms:
                flow = self._executor.step(x, e, e0, first_frame)
            forward.residuals = norms.seen
        else:
            flow = self._executor.step(x, e, e0, first_frame)
        self.trace.running = None
        for layer, shards in enumerate(kv):
            for shard, pair in enumerate(shards):
                for kind, tensor in zip("kv", pair, strict=True):
                    forward.outputs[f"{kind}.{layer}.{shard}"] = tensor.clone()
        forward.outputs["flow"] = flow.clone()
        self.trace.forwards[place] = forward
        return flow


def clone_pairs(pairs: Sequence[KVPair]) -> list[KVPair]:
    """Copies of keys and values."""
    return [(k.clone(), v.clone()) for k, v in pairs]
