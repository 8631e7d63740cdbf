"""What a rank computes and exchanges, written down while it runs.

    Rollout -> WatchedExecutor -> Executor -> WatchedCollectives -> ThreadCollectives
                    |                               |
                    +----------> Trace <-------------+          a tape a rank, a StepTrace for each forward that is looked at

A forward's inputs are kept as well, so that another side can be given the very same ones.
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
"""Chunk and forward: `(1, "step 0")`, `(1, "refresh")`."""


@dataclass(kw_only=True, slots=True)
class StepTrace:
    """One forward on one rank.

    Attributes:
        place: where in the rollout.
        x: `[S, 64]`.
        time: conditioning of the timestep.
        first_frame: that the step was given.
        view: copy of what was bound, before the step wrote to it.
        outputs: by name, in the order in which they arise: exchanges sent and received, flow, KV slots as the step left them.
        residuals: what each LayerNorm was given, `[S, C]`, in order; eager alone tells.
    """

    place: StepId
    x: torch.Tensor
    time: Conditioning
    first_frame: int
    view: SessionView
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    residuals: list[torch.Tensor] = field(default_factory=list)


class Trace:
    """The forwards of one rank that are looked at."""

    def __init__(self, places: Collection[StepId], *, num_steps: int) -> None:
        self.forwards: list[StepTrace] = []
        self.running: StepTrace | None = None
        self._places, self._num_steps = places, num_steps
        self._chunk = self._count = 0

    def begin_chunk(self, chunk: int) -> None:
        """The next forwards are of this chunk."""
        self._chunk, self._count = chunk, 0

    def next_place(self) -> StepId | None:
        """Where the next forward is, if it is looked at."""
        label = f"step {self._count}" if self._count < self._num_steps else "refresh"
        self._count += 1
        place = self._chunk, label
        return place if place in self._places else None


class WatchedCollectives(ThreadCollectives):
    """Collectives whose blocks are put on a tape."""

    def __init__(self, meeting: ThreadGroup, rank: int) -> None:
        super().__init__(meeting, rank)
        self.tape: Trace | None = None
        self.exchanges = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """See `Collectives.all_to_all`."""
        super().all_to_all(received, sent)
        name = exchange_name(self.exchanges)
        self.exchanges += 1
        if self.tape is not None and self.tape.running is not None:
            self.tape.running.outputs[f"{name} sent"] = sent.detach().clone()
            self.tape.running.outputs[f"{name} received"] = received.detach().clone()


def exchange_name(number: int) -> str:
    """Name of a forward's exchange by its number."""
    layer, second = divmod(number, 2)
    return f"layer {layer} {'gather_heads' if second else 'scatter_heads'}"


class LayerNormInputs(TorchFunctionMode):
    """Keeps what every LayerNorm is given: the residual stream, wherever the model looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, having looked at its argument."""
        if func is F.layer_norm:
            self.seen.append(args[0].detach().clone())
        return func(*args, **(kwargs or {}))


def residual_name(number: int) -> str:
    """What made the value that the forward's LayerNorm `number` reads; a layer has three, the head one."""
    layer, part = divmod(number, 3)
    if part:
        return f"layer {layer} {'self-attention' if part == 1 else 'cross-attention'}"
    return f"layer {layer - 1} feed-forward" if layer else "patch embedding"


class WatchedExecutor:
    """An executor whose forwards are put on a tape."""

    def __init__(self, executor: Executor, collectives: WatchedCollectives) -> None:
        self.device, self.whole_slots = executor.device, executor.whole_slots
        self._executor, self._collectives = executor, collectives
        self._bound = SessionView(buffers_id=0, step=0, prompt={}, kv=(), kv_rows=0)
        self.watches_residuals = False

    @property
    def tape(self) -> Trace | None:
        """Where forwards go; None to watch nothing."""
        return self._collectives.tape

    @tape.setter
    def tape(self, tape: Trace | None) -> None:
        self._collectives.tape = tape

    def encode_prompt(self, text: torch.Tensor) -> Conditioning:
        """See `Executor.encode_prompt`."""
        return self._executor.encode_prompt(text)

    def embed_time(self, timestep: float) -> Conditioning:
        """See `Executor.embed_time`."""
        return self._executor.embed_time(timestep)

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`."""
        self._bound = view
        self._executor.bind(view)

    def warmed_up(self) -> None:
        """See `Executor.warmed_up`."""
        self._executor.warmed_up()

    def graph_bytes(self) -> int:
        """See `Executor.graph_bytes`."""
        return self._executor.graph_bytes()

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        self._collectives.exchanges = 0
        place = self.tape.next_place() if self.tape is not None else None
        if self.tape is None or place is None:
            return self._executor.step(x, time, first_frame)
        forward = StepTrace(
            place=place, x=x.clone(), time=copied(time), first_frame=first_frame, view=copied_view(self._bound)
        )
        self.tape.running = forward
        if self.watches_residuals:
            with LayerNormInputs() as watched:
                flow = self._executor.step(x, time, first_frame)
            forward.residuals = watched.seen
        else:
            flow = self._executor.step(x, time, first_frame)
        self.tape.running = None
        forward.outputs |= copied(self._bound.slots())
        forward.outputs["flow"] = flow.clone()
        self.tape.forwards.append(forward)
        return flow


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors, by name."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def copied_view(view: SessionView) -> SessionView:
    """A view of copies of the session's tensors."""
    kv = [[(k.clone(), v.clone()) for k, v in layer] for layer in view.kv]
    return replace(view, prompt=copied(view.prompt), kv=kv)
