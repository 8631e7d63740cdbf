"""Several ranks as threads on one GPU, of which NCCL takes only one: recorded rollouts, and where exchanged rows arrive."""

import time

from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.streams import own_stream
from causalrt.measure.gpu_day.recorder import Recorder, SkippedError
from causalrt.measure.gpu_day.recordings import RECORDINGS, RecordedModel, exact_float32, recorded_model
from causalrt.proof.compare import largest_errors, replay_here
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.replica import Replica
from causalrt.runtime.canary import check_exchanges

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
    replica = Replica(
        name,
        config,
        layout,
        lambda collectives: EagerExecutor(model.bundle, collectives, device=device, fused_ops=fused_ops),
    )
    dtype, start = TORCH_DTYPES[config.build.precision], time.perf_counter()
    with own_stream(device):
        checks = replica.run(
            lambda rank: check_exchanges(replica.collectives[rank], config, dtype=dtype, device=device)
        )
        outputs = replay_here(model.recording, replica)
    errors = largest_errors(outputs, model.recording.outputs())
    faults = [check.fault for found in checks for check in found if check.fault]
    largest = max(error.error for error in errors.values())
    recorder.row(
        TABLE,
        recording=name,
        ranks=layout.world_size,
        variant="fused ops" if fused_ops else "eager",
        **{kind: error.error for kind, error in errors.items()},
        exchange="ok" if not faults else faults[0],
        ok=largest <= TOLERANCE and not faults,
        seconds=round(time.perf_counter() - start, 1),
    )
    if faults:
        recorder.wrong(f"exchange between {layout.world_size} ranks: {faults[0]}")
    if largest > TOLERANCE:
        recorder.wrong(f"{name} on {layout.world_size} ranks: {largest:.2e}, allowed {TOLERANCE:.0e}")
    return largest
