"""Several ranks as threads on one GPU, where NCCL takes one: the rollouts, and where each exchanged row arrives."""

import time

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.streams import own_stream
from causalrt.measure.gpu_day.book import Book, SkippedError
from causalrt.measure.gpu_day.rollouts import RECORDINGS, Case, exact_float32, make_case
from causalrt.proof.compare import largest_errors, replay_here
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.replica import Replica
from causalrt.runtime.canary import check_exchanges

WORLD_SIZES = (2, 3, 8)
TABLE = "largest errors"


def run(book: Book) -> None:
    """Replay the recordings on each number of ranks, in eager and with the fused ops."""
    exact_float32()
    worst, count = 0.0, 0
    for name in RECORDINGS[: 1 if book.dry_run else None]:
        for world_size in WORLD_SIZES:
            try:
                case = make_case(book, name, world_size=world_size)
            except SkippedError as reason:
                book.note(str(reason))
                continue
            for plugins in (False, True):
                with book.attempt(f"{name} on {world_size} ranks, {'fused ops' if plugins else 'eager'}"):
                    worst, count = max(worst, _replay(book, name, case, plugins=plugins)), count + 1
                    book.headline(
                        "ranks",
                        f"On {', '.join(map(str, WORLD_SIZES))} ranks as threads of one process: {count} replays, "
                        f"largest error {worst:.1e}.",
                    )
    if not book.record.tables and not book.record.wrong:
        raise SkippedError(book.record.notes[-1])


def _replay(book: Book, name: str, case: Case, *, plugins: bool) -> float:
    config, layout, device = case.bundle.config, case.bundle.layout, book.device
    replica = Replica(
        name,
        config,
        layout,
        lambda collectives: EagerExecutor(case.bundle, collectives, device=device, plugins=plugins),
    )
    dtype, start = TORCH_DTYPES[config.build.precision], time.perf_counter()
    with own_stream(device):
        checks = replica.run(
            lambda rank: check_exchanges(replica.collectives[rank], config, dtype=dtype, device=device)
        )
        outputs = replay_here(case.recording, replica)
    errors = largest_errors(outputs, case.recording.outputs())
    faults = [check.fault for found in checks for check in found if check.fault]
    largest = max(error.error for error in errors.values())
    book.row(
        TABLE,
        recording=name,
        ranks=layout.world_size,
        way="fused ops" if plugins else "eager",
        **{kind: error.error for kind, error in errors.items()},
        exchange="ok" if not faults else faults[0],
        ok=largest <= TOLERANCE and not faults,
        seconds=round(time.perf_counter() - start, 1),
    )
    if faults:
        book.wrong(f"exchange between {layout.world_size} ranks: {faults[0]}")
    if largest > TOLERANCE:
        book.wrong(f"{name} on {layout.world_size} ranks: {largest:.2e}, allowed {TOLERANCE:.0e}")
    return largest
