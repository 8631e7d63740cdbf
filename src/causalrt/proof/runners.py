"""The sides as Polygraphy runners, and its comparator over them.

    RolloutRunner   {prompt 0, prompt 1}             ->  every flow, x0, latent, key and value of a free-running rollout
    StepRunner      all that a forward is given,     ->  its flow, what its exchanges carried, the KV slots as it left them,
                    rank by rank                         rank by rank

Polygraphy's own PyTorch runner takes a module and a dictionary; ours are executors whose ranks meet inside a forward.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, RunResults
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER

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
        self._memory = 1_000  # of no session

    @torch.inference_mode()
    def outputs(self, feed: Feed) -> Feed:
        """By name and rank, in the order in which they arise."""
        self._memory += 1
        layers = 1 + max(int(name.split(".")[1]) for name in feed if name.startswith("cross_k."))
        cross_kv = [(feed[f"cross_k.{layer}"].clone(), feed[f"cross_v.{layer}"].clone()) for layer in range(layers)]
        shards = range(len(self.side.bundle.layout.shards))

        def on_rank(rank: int) -> dict[str, torch.Tensor]:
            executor, prefix = self.side.executors[rank], f"rank {rank} "
            kv = [
                [
                    (feed[f"{prefix}k.{layer}.{shard}"].clone(), feed[f"{prefix}v.{layer}.{shard}"].clone())
                    for shard in shards
                ]
                for layer in range(layers)
            ]
            tape = executor.tape = Trace([(0, "step 0")], num_steps=1)
            tape.begin_chunk(0)
            executor.bind(kv, cross_kv, kv_rows=int(feed["kv_rows"]), memory=self._memory, step=int(feed["step"]))
            executor.step(feed[f"{prefix}x"].clone(), feed["e"], feed["e0"], int(feed["first_frame"]))
            executor.tape = None
            return tape.forwards[0].outputs

        by_rank = self.side.run(on_rank)
        return {f"{name}, rank {rank}": found[name] for name in by_rank[0] for rank, found in enumerate(by_rank)}


def forwards_at(tapes: Sequence[Trace], place: StepId) -> list[StepTrace]:
    """That forward of every rank."""
    return [next(forward for forward in tape.forwards if forward.place == place) for tape in tapes]


def step_feed(forwards: Sequence[StepTrace]) -> dict[str, torch.Tensor]:
    """What a forward was given, rank by rank; what is the same on every rank once."""
    common = forwards[0]
    feed = {"e": common.e, "e0": common.e0}
    for name in ("first_frame", "kv_rows", "step"):
        feed[name] = torch.tensor(int(getattr(common, name)))
    for layer, pair in enumerate(common.cross_kv):
        feed[f"cross_k.{layer}"], feed[f"cross_v.{layer}"] = pair
    for rank, forward in enumerate(forwards):
        feed[f"rank {rank} x"] = forward.x
        for layer, shards in enumerate(forward.kv):
            for shard, (k, v) in enumerate(shards):
                feed[f"rank {rank} k.{layer}.{shard}"], feed[f"rank {rank} v.{layer}.{shard}"] = k, v
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
