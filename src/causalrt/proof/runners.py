"""The sides as Polygraphy runners, and its comparator over them.

    RolloutRunner   {prompt 0, prompt 1}             ->  every flow, x0, latent, key and value of a free-running rollout
    StepRunner      all that a forward is given,     ->  its flow, what its exchanges carried, the KV slots as it left them,
                    rank by rank                         rank by rank

Polygraphy's own PyTorch runner takes a module and a dictionary; ours are executors whose ranks meet inside a forward.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, RunResults
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER

from causalrt.engines.base import SessionView
from causalrt.layout import Layout
from causalrt.proof.errors import TensorError, Within
from causalrt.proof.rollouts import RolloutPlan, RolloutTrace, play
from causalrt.proof.sides import Replica
from causalrt.proof.watch import StepId, StepTrace, Trace

Feed = Mapping[str, torch.Tensor]


class _SideRunner(BaseRunner):  # type: ignore[misc]
    """A runner on a side, whose executors it opens; they stay open, for the next runner on that side."""

    def __init__(self, side: Replica, feed: Feed) -> None:
        super().__init__(name=side.name)
        self.side = side
        self._feed = feed

    def activate_impl(self) -> None:
        """Make the executors."""
        self.side.open()

    def get_input_metadata_impl(self) -> Any:
        """Names and types of the feed; sizes differ from chunk to chunk."""
        metadata = TensorMetadata()
        for name, tensor in self._feed.items():
            metadata.add(name, dtype=DataType.from_dtype(tensor.dtype, "torch"), shape=(None,) * tensor.dim())
        return metadata

    def infer_impl(self, feed_dict: Feed) -> "OrderedDict[str, torch.Tensor]":
        """Run, and time it."""
        start = time.perf_counter()
        outputs = self.outputs(feed_dict)
        self.inference_time = time.perf_counter() - start
        return OrderedDict(outputs)

    def outputs(self, feed: Feed) -> Feed:
        """What the side makes of a feed."""
        raise NotImplementedError


class RolloutRunner(_SideRunner):
    """A free-running rollout; `played` is the last one."""

    def __init__(self, side: Replica, feed: Feed, plan: RolloutPlan, *, held_by: Layout) -> None:
        super().__init__(side, feed)
        self.played: RolloutTrace | None = None
        self._plan, self._held_by = plan, held_by

    def outputs(self, feed: Feed) -> Feed:
        """See `rollouts.play`."""
        self.played = play(self.side, self._plan, feed, held_by=self._held_by)
        return self.played.outputs


class StepRunner(_SideRunner):
    """One forward on all ranks, from inputs that another side had."""

    def __init__(self, side: Replica, feed: Feed) -> None:
        super().__init__(side, feed)
        self._buffers_id = 1_000  # of no session

    @torch.inference_mode()
    def outputs(self, feed: Feed) -> Feed:
        """By name and rank, in the order in which they arise."""
        self._buffers_id += 1
        prompt, time = ({name: tensor.clone() for name, tensor in part(feed, kind)} for kind in ("prompt ", "time "))
        shards = range(len(self.side.bundle.layout.shards))
        layers = range(self.side.bundle.config.model.num_layers)

        def on_rank(rank: int) -> dict[str, torch.Tensor]:
            executor, own = self.side.executors[rank], dict(part(feed, f"rank {rank} "))
            kv = [
                [(own[f"k.{layer}.{shard}"].clone(), own[f"v.{layer}.{shard}"].clone()) for shard in shards]
                for layer in layers
            ]
            view = SessionView(
                buffers_id=self._buffers_id, step=int(feed["step"]), prompt=prompt, kv=kv, kv_rows=int(feed["kv_rows"])
            )
            tape = executor.tape = Trace([(0, "step 0")], num_steps=1)
            tape.begin_chunk(0)
            executor.bind(view)
            executor.step(own["x"].clone(), time, int(feed["first_frame"]))
            executor.tape = None
            return tape.forwards[0].outputs

        by_rank = self.side.run(on_rank)
        return {f"{name}, rank {rank}": found[name] for name in by_rank[0] for rank, found in enumerate(by_rank)}


def part(feed: Feed, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors whose names begin with `prefix`, by the rest of the name."""
    return ((name.removeprefix(prefix), tensor) for name, tensor in feed.items() if name.startswith(prefix))


def forwards_at(tapes: Sequence[Trace], place: StepId) -> list[StepTrace]:
    """That forward of every rank."""
    return [next(forward for forward in tape.forwards if forward.place == place) for tape in tapes]


def step_feed(forwards: Sequence[StepTrace]) -> dict[str, torch.Tensor]:
    """What a forward was given, rank by rank; what is the same on every rank once."""
    common = forwards[0]
    feed = {f"time {name}": tensor for name, tensor in common.time.items()}
    feed |= {f"prompt {name}": tensor for name, tensor in common.view.prompt.items()}
    numbers = {"first_frame": common.first_frame, "kv_rows": common.view.kv_rows, "step": common.view.step}
    feed |= {name: torch.tensor(number) for name, number in numbers.items()}
    for rank, forward in enumerate(forwards):
        feed |= {f"rank {rank} {name}": tensor for name, tensor in {"x": forward.x, **forward.view.slots()}.items()}
    return feed


def run(runners: Sequence[BaseRunner], feeds: Sequence[Feed]) -> Any:
    """Polygraphy's results of all runners on all feeds."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return Comparator.run(list(runners), data_loader=[dict(feed) for feed in feeds])


def compared(results: Any, *, reference: str, candidate: str, tolerance: float) -> list[list[TensorError]]:
    """Errors of one runner against another by the comparison function, a list for each feed.

    `Comparator.compare_accuracy` would call the same function, and makes a histogram of every tensor to log, logged or not:
    three quarters of the time of a small certificate.
    """
    function = Within(tolerance)
    pairs = zip(results[reference], results[candidate], strict=True)
    return [list(function(expected, got).values()) for expected, got in pairs]


def results_of(outputs: Mapping[str, Sequence[Feed]]) -> Any:
    """Outputs that are there already, by side, as Polygraphy's results."""
    results = RunResults()
    for name, made in outputs.items():
        results.add([OrderedDict(values) for values in made], runtime=0.0, runner_name=name)
    return results
