"""What is compared of a bundle's sides: rollouts, chunk steps, segments, rank processes; and where they part.

Float32: every tensor is within the tolerance of the reference, eager on one rank. Lower: the reference is eager on one rank in
float32 over the bundle's own weights, and the root mean square error of each kind of tensor is at most `EAGER_RATIO` times
that of eager on one rank in the bundle's precision; exchanges are still compared bit for bit.
"""

from pathlib import Path

from causalrt.engines.bundle import Bundle
from causalrt.errors import OutOfMemoryError
from causalrt.progress import Progress
from causalrt.proof.record import Certificate, NotChecked
from causalrt.proof.rollout_comparisons import compare_processes, compare_rollouts
from causalrt.proof.rollouts import RolloutPlan, recording_bytes
from causalrt.proof.stage import Stage, make_sides
from causalrt.proof.step_comparisons import compare_exchanges, compare_segments, compare_steps, find_first
from causalrt.runtime.memory import available_bytes


def compare_sides(
    certificate: Certificate,
    bundle: Bundle,
    executor: str,
    plan: RolloutPlan,
    *,
    device: str,
    emulate: bool,
    cuda_graphs: bool,
    always_bisect: bool,
    processes: bool,
    scratch: Path,
    folder: Path | None,
    out: Path | None,
    on_progress: Progress,
) -> None:
    """Fill in what is compared; see `certify` for the arguments.

    Raises:
        OutOfMemoryError: what is kept of the forwards would not fit.
        CausalRTError: an executor cannot run here.
    """
    needed, available = recording_bytes(bundle.config, bundle.layout, plan), available_bytes()
    if available is not None and needed > available:
        raise OutOfMemoryError(
            f"a certificate keeps about {needed / 2**30:.1f} GiB of tensors of {len(plan.places)} forwards, and "
            f"{available / 2**30:.1f} GiB are free; certify with fewer chunks (--chunks 1), or on a machine with more memory"
        )
    stage = Stage(
        certificate=certificate,
        bundle=bundle,
        executor=executor,
        plan=plan,
        device=device,
        emulate=emulate,
        cuda_graphs=cuda_graphs,
    )
    if plan.evicted_chunk is None or plan.evicted_chunk >= plan.num_chunks:
        why = "the window holds the whole horizon" if plan.evicted_chunk is None else "too few chunks; add --chunks"
        certificate.not_checked.append(NotChecked(what="a chunk after eviction", why=why))
    make_sides(stage, scratch)
    compare_rollouts(stage, on_progress)
    compare_exchanges(stage)
    step = compare_steps(stage, on_progress)
    compare_segments(stage, folder, out, on_progress, always_bisect=always_bisect)
    find_first(stage, step)
    compare_processes(stage, on_progress, processes=processes)
