"""Recorded rollouts on one GPU: every flow, x0 and latent against the reference, by every way of running the step."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from causalrt.engines.base import Executor
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.inductor import InductorExecutor
from causalrt.measure.gpu_day.book import Book, SkippedError
from causalrt.measure.gpu_day.rollouts import RECORDINGS, Case, exact_float32, make_case
from causalrt.proof.compare import TOLERANCE, largest_errors
from causalrt.proof.replay import Player, recorded_outputs, replay_here
from causalrt.runtime.collectives import LocalCollectives

TABLE = "largest errors"


@dataclass(frozen=True, slots=True)
class Way:
    """A way of running the step.

    Attributes:
        name: for people.
        compiled: by torch.compile.
        plugins: self-attention by the fused ops.
        captured: in CUDA graphs.
    """

    name: str
    compiled: bool = False
    plugins: bool = False
    captured: bool = False

    def executor(self, case: Case, device: torch.device) -> Executor:
        """The executor; eager steps are captured by the class that captures compiled ones, told not to compile."""
        if not (self.compiled or self.captured):
            return EagerExecutor(case.bundle, LocalCollectives(), device=device, fused_ops=self.plugins)
        return InductorExecutor(
            case.bundle, LocalCollectives(), device=device, fused_ops=self.plugins, cuda_graphs=self.captured
        )

    def stance(self) -> AbstractContextManager[object]:
        """In the block, compiled functions are compiled, or run as they are written."""
        if self.compiled or not self.captured:
            return nullcontext()
        eagerly: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eagerly


WAYS = (
    Way("eager"),
    Way("eager, fused ops", plugins=True),
    Way("inductor", compiled=True),
    Way("inductor, fused ops", compiled=True, plugins=True),
    Way("inductor, captured", compiled=True, captured=True),
    Way("inductor, fused ops, captured", compiled=True, plugins=True, captured=True),
    Way("eager, captured", captured=True),
    Way("eager, fused ops, captured", plugins=True, captured=True),
)
"""Those that are captured come last: a capture that fails may leave the process unusable."""


def run(book: Book) -> None:
    """Replay every recording in every way, those first that need least."""
    exact_float32()
    cases = {}
    for name in RECORDINGS:
        try:
            cases[name] = make_case(book, name)
        except SkippedError as reason:
            book.note(str(reason))
    if not cases:
        raise SkippedError(book.record.notes[-1])
    if book.dry_run:
        book.note(
            "CUDA graphs cannot be tried on a CPU; steps that are captured are left out, as are compiled J and R."
        )
        book.note("On a CPU the fused ops are their references: Triton's kernels run on GPUs alone.")
    worst, count = 0.0, 0
    for way in WAYS:
        for name, case in cases.items():
            if book.dry_run and (way.captured or (way.compiled and name != RECORDINGS[0])):
                continue
            with book.attempt(f"{name}, {way.name}"):
                worst, count = max(worst, _replay(book, name, way, case)), count + 1
                book.headline(
                    "golden",
                    f"{count} replays of recorded rollouts, largest error {worst:.1e} (allowed {TOLERANCE:.0e}).",
                )


def _replay(book: Book, name: str, way: Way, case: Case) -> float:
    start = time.perf_counter()
    torch.compiler.reset()  # it would take the step of another executor for one compiled too often
    with way.stance():
        player = Player(executor=way.executor(case, book.device), config=case.bundle.config, layout=case.bundle.layout)
        outputs = replay_here(case.recording, player)
    errors = largest_errors(outputs, recorded_outputs(case.recording))
    worst = max(errors.values(), key=lambda error: error.largest)
    agrees = worst.largest <= TOLERANCE
    book.row(
        TABLE,
        recording=name,
        way=way.name,
        **{kind: error.largest for kind, error in errors.items()},
        ok=agrees,
        seconds=round(time.perf_counter() - start, 1),
    )
    if not agrees:
        book.wrong(f"{name}, {way.name}: {worst.largest:.2e} at {worst.at}, allowed {TOLERANCE:.0e}")
    return worst.largest
