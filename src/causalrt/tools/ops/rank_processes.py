"""P rank processes of a module of this package, for measurements: each line that is sent to all of them is answered by each.

    caller    RankProcesses(module, ...)  --- one line "go" --->  rank 0 .. P-1     a JSON line back from each
    ranks     `serve(prepare)` in the module: join the process group, prepare, answer every line

The ranks have what the ranks of an engine have: the environment, the number of threads, gloo or NCCL, and the thread pool of
ONNX Runtime.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from causalrt.child_python import python_command, python_environment
from causalrt.errors import MeasurementError
from causalrt.owned_paths import TemporaryFolder
from causalrt.runtime.collectives import join_ranks
from causalrt.runtime.ranks import ENVIRONMENT

ANSWER_S = 600.0
"""Longest time that the ranks may take to get ready, or to answer."""
LOG_TAIL = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What a rank process is started with.

    Attributes:
        rank: its number.
        world_size: number of ranks.
        device_type: `cpu` or `cuda`; rank r has GPU r.
        threads: CPU threads.
        store: path of the file in which the ranks find each other.
        task: plain JSON types for the module.
    """

    rank: int
    world_size: int
    device_type: str
    threads: int
    store: str
    task: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """The rank's own device."""
        return torch.device("cuda", self.rank) if self.device_type == "cuda" else torch.device("cpu")


class RankProcesses(AbstractContextManager["RankProcesses"]):
    """P processes that run `serve`; they are killed at the end of the `with` block."""

    def __init__(
        self, module: str, world_size: int, *, device: str, threads: int, task: dict[str, Any], what: str
    ) -> None:
        """Start the processes.

        Args:
            module: dotted name of a module that calls `serve`.
            world_size: number of ranks.
            device: `cpu` or `cuda`.
            threads: CPU threads of each rank.
            task: plain JSON types for the module.
            what: what is measured, for messages.
        """
        self._what = what
        self._folder = TemporaryFolder("bench")
        self._logs = [self._folder.path / f"log{rank}" for rank in range(world_size)]
        self._processes: list[subprocess.Popen[str]] = []
        store = str(self._folder.path / "store")
        for number, path in enumerate(self._logs):
            rank = Rank(rank=number, world_size=world_size, device_type=device, threads=threads, store=store, task=task)
            with path.open("w") as log:
                # A session of their own: Ctrl-C reaches the caller alone, who ends them.
                self._processes.append(
                    subprocess.Popen(
                        [*python_command(module), json.dumps(asdict(rank))],
                        env=python_environment(**ENVIRONMENT["rank"]),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        start_new_session=True,
                    )
                )

    def wait_ready(self) -> None:
        """Return when every rank is prepared and idle.

        Raises:
            MeasurementError: a rank failed, or gave no answer in time.
        """
        self._answers()

    def ask(self) -> list[Any]:
        """Have every rank measure once, and return the answer of each.

        Raises:
            MeasurementError: a rank failed, or gave no answer in time.
        """
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has ended, and the end of its answers says so
                process.stdin.write("go\n")
                process.stdin.flush()
        return self._answers()

    def _answers(self) -> list[Any]:
        """Read a line of every rank as they come: when one has ended, the others wait for it and would never answer."""
        pipes = {process.stdout.fileno(): process.stdout for process in self._processes if process.stdout is not None}
        ranks = {number: rank for rank, number in enumerate(pipes)}
        answers: dict[int, Any] = {}
        while len(answers) < len(pipes):
            found = connection.wait([number for number in pipes if number not in answers], timeout=ANSWER_S)
            if not found:
                raise MeasurementError(f"{self._what} could not be measured: no answer within {ANSWER_S:g} s")
            for ready in found:
                number = cast("int", ready)
                try:
                    answers[number] = json.loads(pipes[number].readline())
                except (OSError, ValueError) as error:
                    said = self._logs[ranks[number]].read_text(errors="replace")[-LOG_TAIL:].strip() or error
                    raise MeasurementError(
                        f"{self._what} could not be measured: rank {ranks[number]} failed: {said}"
                    ) from error
        return [answers[number] for number in pipes]

    def close(self) -> None:
        """Kill the processes. Harmless when called again."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._folder.remove()

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(prepare: Callable[[Rank], Callable[[], Any]]) -> None:
    """Be a rank: join the others, prepare, and answer every line of stdin with a line of JSON.

    Args:
        prepare: makes what is called for each line; it returns plain JSON types.
    """
    import onnxruntime as ort

    rank = Rank(**json.loads(sys.argv[1]))
    torch.set_num_threads(rank.threads)
    ort.set_global_thread_pool_sizes(rank.threads, 1)
    if rank.device_type == "cuda":
        torch.cuda.set_device(rank.device)
    if rank.world_size > 1:
        join_ranks(Path(rank.store), rank.rank, rank.world_size, device=rank.device)
    with torch.inference_mode():
        measure = prepare(rank)
        print("null", flush=True)  # noqa: T201
        for _ in sys.stdin:
            print(json.dumps(measure()), flush=True)  # noqa: T201
    if dist.is_initialized():
        dist.destroy_process_group()
