"""Traces: what each rank computes and exchanges, recorded while it runs.

    Rollout -> TracedExecutor -> Executor -> TracedCollectives -> ThreadCollectives
                    |                               |
                    +----------> Trace <------------+          one trace a rank, one StepTrace for each traced forward

A forward's inputs are recorded as well, so that another replica can run the forward from the same inputs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from causalrt.engines.base import Executor, SessionView
from causalrt.model.wan.conditioning import Conditioning
from causalrt.proof.ranks import ThreadCollectives, ThreadGroup

StepId = tuple[int, str]
"""Chunk and forward: `(1, "step 0")`, or `(1, "refresh")` for the context pass."""


@dataclass(kw_only=True, slots=True)
class StepTrace:
    """One forward on one rank.

    Attributes:
        place: chunk and forward.
        x: `[S, 64]`.
        time: conditioning of the timestep.
        first_frame: time index that the step was called with.
        view: copy of what was bound, made before the step wrote to it.
        outputs: by name, in the order in which they are computed: blocks sent and received, KV slots after the step, flow.
        residuals: the input of each LayerNorm, `[S, C]`, in order; recorded for eager only.
    """

    place: StepId
    x: torch.Tensor
    time: Conditioning
    first_frame: int
    view: SessionView
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
        self._bound = SessionView(buffers_id=0, step=0, prompt={}, kv=(), kv_rows=0)

    @property
    def trace(self) -> Trace | None:
        """The trace that forwards are recorded in; None records nothing."""
        return self._collectives.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._collectives.trace = trace

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`."""
        self._bound = view
        self._executor.bind(view)

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        self._collectives.exchanges = 0
        place = self.trace.next_place() if self.trace is not None else None
        if self.trace is None or place is None:
            return self._executor.step(x, time, first_frame)
        forward = StepTrace(
            place=place, x=x.clone(), time=copied(time), first_frame=first_frame, view=copied_view(self._bound)
        )
        self.trace.running = forward
        if self._with_residuals:
            with LayerNormInputs() as norms:
                flow = self._executor.step(x, time, first_frame)
            forward.residuals = norms.seen
        else:
            flow = self._executor.step(x, time, first_frame)
        self.trace.running = None
        forward.outputs |= copied(self._bound.slots())
        forward.outputs["flow"] = flow.clone()
        self.trace.forwards[place] = forward
        return flow


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors, by name."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def copied_view(view: SessionView) -> SessionView:
    """A view of copies of the session's tensors."""
    kv = [[(k.clone(), v.clone()) for k, v in layer] for layer in view.kv]
    return replace(view, prompt=copied(view.prompt), kv=kv)
