"""Several ranks as threads on one GPU, where NCCL takes one: the rollouts, and where each exchanged row arrives."""

import time

import torch

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.eager import EagerExecutor
from causalrt.measure.gpu_day.book import Book, SkippedError
from causalrt.measure.gpu_day.rollouts import RECORDINGS, Case, exact_float32, make_case
from causalrt.proof.compare import TOLERANCE, largest_errors
from causalrt.proof.ranks import ThreadCollectives, meet, run_threads
from causalrt.proof.replay import Outputs, Player, recorded_outputs, replay_here
from causalrt.runtime.canary import ExchangeCheck, check_exchanges

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
    meeting, collectives = meet(layout.world_size, ThreadCollectives)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def on_rank(rank: int) -> tuple[Outputs, tuple[ExchangeCheck, ...]]:
        if stream is not None:  # one for all ranks, so that what a rank copies is queued after what has written it
            torch.cuda.set_device(device)
            torch.cuda.set_stream(stream)
        mine = collectives[rank]
        dtype = TORCH_DTYPES[config.build.precision]
        checks = check_exchanges(mine, config, dtype=dtype, device=device)
        executor = EagerExecutor(case.bundle, mine, device=device, fused_ops=plugins)
        player = Player(executor=executor, config=config, layout=layout, collectives=mine)
        return replay_here(case.recording, player), checks

    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // layout.world_size))
    try:
        found = run_threads(meeting, on_rank)
    finally:
        torch.set_num_threads(threads)
    errors = largest_errors(found[0][0], recorded_outputs(case.recording))
    faults = [check.fault for _, checks in found for check in checks if check.fault]
    largest = max(error.largest for error in errors.values())
    book.row(
        TABLE,
        recording=name,
        ranks=layout.world_size,
        way="fused ops" if plugins else "eager",
        **{kind: error.largest for kind, error in errors.items()},
        exchange="ok" if not faults else faults[0],
        ok=largest <= TOLERANCE and not faults,
        seconds=round(time.perf_counter() - start, 1),
    )
    if faults:
        book.wrong(f"exchange between {layout.world_size} ranks: {faults[0]}")
    if largest > TOLERANCE:
        book.wrong(f"{name} on {layout.world_size} ranks: {largest:.2e}, allowed {TOLERANCE:.0e}")
    return largest
