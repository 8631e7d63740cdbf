"""Several ranks as threads on one GPU, of which NCCL takes only one: recorded rollouts, and where exchanged rows arrive."""

import time

import torch

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.eager import EagerExecutor
from causalrt.measure.gpu_day.recorder import Recorder, SkippedError
from causalrt.measure.gpu_day.recordings import RECORDINGS, RecordedModel, exact_float32, recorded_model
from causalrt.proof.compare import TOLERANCE, largest_errors
from causalrt.proof.ranks import ThreadCollectives, meet, run_threads
from causalrt.proof.replay import Outputs, Player, recorded_outputs, replay_here
from causalrt.runtime.canary import ExchangeCheck, check_exchanges

WORLD_SIZES = (2, 3, 8)
TABLE = "largest errors"


def run(recorder: Recorder) -> None:
    """Replay the recordings on each number of ranks, in eager and with the fused ops."""
    exact_float32()
    worst, count = 0.0, 0
    for name in RECORDINGS[: 1 if recorder.dry_run else None]:
        for world_size in WORLD_SIZES:
            try:
                model = recorded_model(recorder, name, world_size=world_size)
            except SkippedError as reason:
                recorder.note(str(reason))
                continue
            for fused_ops in (False, True):
                with recorder.attempt(f"{name} on {world_size} ranks, {'fused ops' if fused_ops else 'eager'}"):
                    worst, count = max(worst, _replay(recorder, name, model, fused_ops=fused_ops)), count + 1
                    recorder.headline(
                        "ranks",
                        f"On {', '.join(map(str, WORLD_SIZES))} ranks as threads of one process: {count} replays, "
                        f"largest error {worst:.1e}.",
                    )
    if not recorder.record.tables and not recorder.record.wrong:
        raise SkippedError(recorder.record.notes[-1])


def _replay(recorder: Recorder, name: str, model: RecordedModel, *, fused_ops: bool) -> float:
    config, layout, device = model.bundle.config, model.bundle.layout, recorder.device
    meeting, collectives = meet(layout.world_size, ThreadCollectives)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def on_rank(rank: int) -> tuple[Outputs, tuple[ExchangeCheck, ...]]:
        if stream is not None:  # one for all ranks, so that copies are queued after the kernels that write
            torch.cuda.set_device(device)
            torch.cuda.set_stream(stream)
        mine = collectives[rank]
        dtype = TORCH_DTYPES[config.build.precision]
        checks = check_exchanges(mine, config, dtype=dtype, device=device)
        executor = EagerExecutor(model.bundle, mine, device=device, fused_ops=fused_ops)
        player = Player(executor=executor, config=config, layout=layout, collectives=mine)
        return replay_here(model.recording, player), checks

    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(max(1, threads // layout.world_size))
    try:
        found = run_threads(meeting, on_rank)
    finally:
        torch.set_num_threads(threads)
    errors = largest_errors(found[0][0], recorded_outputs(model.recording))
    faults = [check.fault for _, checks in found for check in checks if check.fault]
    largest = max(error.largest for error in errors.values())
    recorder.row(
        TABLE,
        recording=name,
        ranks=layout.world_size,
        variant="fused ops" if fused_ops else "eager",
        **{kind: error.largest for kind, error in errors.items()},
        exchange="ok" if not faults else faults[0],
        ok=largest <= TOLERANCE and not faults,
        seconds=round(time.perf_counter() - start, 1),
    )
    if faults:
        recorder.wrong(f"exchange between {layout.world_size} ranks: {faults[0]}")
    if largest > TOLERANCE:
        recorder.wrong(f"{name} on {layout.world_size} ranks: {largest:.2e}, allowed {TOLERANCE:.0e}")
    return largest
