"""Errors of low precisions: eager and the graph that TensorRT parses, each against an independent float64 replay.

    PYTHONPATH=tests python benchmarks/precision.py     # writes docs/precision.png, prints one JSON line

A rollout of random weights through a rolling window is recorded in float64 (tests/support/float64_replay.py). It is then
replayed in each precision by eager torch, and by the whole-step graph of the TensorRT build under ONNX Runtime, with every
value rounded as a strongly typed engine rounds it (causalrt/proof/emulated_graph.py). Twice:

    free-running     each chunk is conditioned on what this replay itself has made: the error of the latents
    teacher-forced   every forward is given the recorded input: the error of the flow, its own and that of its cached keys
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from support import float64_replay

from causalrt.config import Config, Precision
from causalrt.engines.base import Executor, SessionView
from causalrt.model.schedule import schedule_from_config
from causalrt.model.wan.conditioning import Conditioning
from causalrt.proof.compare import replay_here
from causalrt.proof.emulate import write_graphs
from causalrt.proof.recording import Recording, open_recording
from causalrt.proof.replica import Replica, eager_replica, emulated_replica, replica_on
from causalrt.proof.rollouts import Outputs

ROOT = Path(__file__).parents[1]
WORLD_SIZES = (1, 8)
# On 8 ranks, each rank attends for a quarter of the query rows of 3 of the 6 heads, and holds 23 of 180 tokens (184 with
# padding). The window of 12 latent frames, 3 of them pinned, is full from chunk 3 on and rolls from chunk 4 on.
SIZES: dict[str, Any] = {
    "dim": 192,
    "num_heads": 6,
    "num_layers": 4,
    "ffn_dim": 768,
    "freq_dim": 64,
    "in_dim": 16,
    "patch_size": [1, 2, 2],
    "text_dim": 64,
    "text_len": 32,
    "text_rows": 20,
    "eps": 1e-6,
    "latent_h": 12,
    "latent_w": 20,
    "num_frame_per_block": 3,
    "local_attn_size": 12,
    "sink_size": 3,
    "denoising_step_list": [1000, 750, 500, 250],
    "timestep_shift": 5.0,
    "warp_denoising_step": True,
    "context_noise": 0,
    "batch_size": 1,
    "seed": 0,
}


class Forced:
    """An executor whose every step takes the next recorded input in place of its own."""

    def __init__(self, executor: Executor, inputs: Sequence[torch.Tensor]) -> None:
        self.device, self.whole_slots = executor.device, executor.whole_slots
        self.encode_prompt, self.embed_time = executor.encode_prompt, executor.embed_time
        self._executor, self._inputs = executor, iter(inputs)

    def warmed_up(self) -> None:
        """See `Executor.warmed_up`."""
        self._executor.warmed_up()

    def graph_bytes(self) -> int:
        """See `Executor.graph_bytes`."""
        return self._executor.graph_bytes()

    def bind(self, view: SessionView) -> None:
        """See `Executor.bind`."""
        self._executor.bind(view)

    def step(self, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        """See `Executor.step`."""
        return self._executor.step(next(self._inputs), time, first_frame)


def record(path: Path, num_chunks: int) -> Recording:
    """Record a rollout of these sizes in float64."""
    float64_replay.record(SIZES | {"num_chunks": num_chunks}, path)
    return open_recording(path, world_size=1)


def recorded_inputs(recording: Recording, expected: Outputs) -> list[torch.Tensor]:
    """The input of each forward, in order: the denoising steps of a chunk, then its context pass."""
    noise, sigmas = recording.noise(0), schedule_from_config(recording.config.sampler).sigmas
    inputs = []
    for chunk in range(recording.num_chunks):
        clean = [expected[f"element 0 out.c{chunk}.s{step}.x0"] for step in range(len(sigmas))]
        inputs.append(noise[chunk][0])
        inputs += [
            (1 - s) * x0 + s * noise[chunk][k + 1] for k, (s, x0) in enumerate(zip(sigmas[1:], clean, strict=False))
        ]
        inputs.append(clean[-1])
    return inputs


def errors_by_chunk(got: Outputs, expected: Outputs, num_chunks: int, ending: str) -> list[float]:
    """For each chunk, the root mean square of the difference over that of the expected values."""
    errors = []
    for chunk in range(num_chunks):
        names = [key for key in expected if key.split(".")[1] == f"c{chunk}" and key.endswith(ending or f"c{chunk}")]
        ours, theirs = (torch.stack([outputs[key].double() for key in names]) for outputs in (got, expected))
        errors.append(float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()))
    return errors


def replicas(config: Config, checkpoint: Path, folder: Path) -> dict[str, Replica]:
    """Make replicas of eager, and of the emulated engine graph on each number of ranks."""
    folder.mkdir()
    made = {"eager": eager_replica(config, checkpoint=checkpoint, folder=folder / "eager")}
    for world_size in WORLD_SIZES:
        graphs_folder = folder / f"graphs-{world_size}"
        graphs_folder.mkdir()
        ranks = replace(config, build=replace(config.build, world_size=world_size))
        graphs = write_graphs(ranks, checkpoint=checkpoint, folder=graphs_folder, collectives="engine")
        name = f"engine graph, P = {world_size}"
        made[name] = emulated_replica(name, graphs, num_threads=torch.get_num_threads())
    return made


Curves = dict[str, dict[str, dict[str, list[float]]]]
"""By kind of replay, precision and player, the error of each chunk."""


def measure(num_chunks: int) -> Curves:
    """Replay one recording with every player in every precision, and return the errors."""
    curves: Curves = {"free-running": {}, "teacher-forced": {}}
    with tempfile.TemporaryDirectory(prefix="causalrt-precision-") as name:
        folder = Path(name)
        recording = record(folder / "recording.safetensors", num_chunks)
        checkpoint = recording.write_checkpoint(folder / "checkpoint.safetensors")
        expected = recording.outputs()
        inputs = recorded_inputs(recording, expected)
        for precision in get_args(Precision):
            config = replace(recording.config, build=replace(recording.config.build, precision=precision))
            for name, replica in replicas(config, checkpoint, folder / precision).items():
                print(f"{precision}, {name}", file=sys.stderr)
                free = replay_here(recording, replica)
                forcing = Forced(replica.executors[0], inputs)
                forced = replay_here(recording, replica_on(forcing, replica.config, replica.layout))
                for kind, outputs, ending in (("free-running", free, ""), ("teacher-forced", forced, ".flow")):
                    errors = errors_by_chunk(outputs, expected, num_chunks, ending)
                    curves[kind].setdefault(precision, {})[name] = errors
    return curves


def plot(curves: Curves, path: Path) -> None:
    """Draw both kinds of replay side by side, with a colour for each precision and a line style for each player."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {"float32": "tab:green", "float16": "tab:orange", "bfloat16": "tab:blue"}
    styles: list[dict[str, Any]] = [
        {"linestyle": "-", "linewidth": 3.5, "alpha": 0.4},
        {"linestyle": "-", "linewidth": 1.2},
        {"linestyle": "none", "marker": "o", "markersize": 4.5, "fillstyle": "none"},
    ]
    titles = {"free-running": "latents, free-running", "teacher-forced": "flow, every forward given the recorded input"}
    for ax, (kind, by_precision) in zip(axes, curves.items(), strict=True):
        for precision in ("bfloat16", "float16", "float32"):
            for style, (name, errors) in zip(styles, by_precision[precision].items(), strict=True):
                ax.semilogy(errors, color=colours[precision], label=f"{precision}, {name}", **style)
        ax.set_title(titles[kind])
        ax.set_xlabel("chunk (the window rolls from chunk 4 on)")
        ax.grid(visible=True, which="major", alpha=0.3)
    axes[0].set_ylabel("relative RMS error against float64")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle("TensorRT's whole-step graph, emulated by ONNX Runtime, and eager torch: 4 layers, random weights")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, draw the picture, and print the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=14)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "precision.png")
    arguments = parser.parse_args()
    curves = measure(arguments.chunks)
    plot(curves, arguments.out)
    means = {
        kind: {
            precision: {name: sum(errors) / len(errors) for name, errors in by_name.items()}
            for precision, by_name in by_precision.items()
        }
        for kind, by_precision in curves.items()
    }
    print(json.dumps({"mean_relative_rms_error": means, "curves": curves}))


if __name__ == "__main__":
    main()
