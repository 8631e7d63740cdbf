"""`certify`: everything that is checked of a bundle, in order.

files      tables and indices, references, weights
rollouts   eager on 1 rank | eager on P ranks | the executor on P ranks, free-running in threads of this process
steps      single steps and ONNX segments from eager's own inputs; the first difference gives layer and part
processes  the executor in its rank processes, and the exchange self-test
"""

import time
from contextlib import ExitStack
from pathlib import Path

from causalrt.engines.bundle import Bundle, open_bundle, unchanged
from causalrt.engines.kinds import choose_device, executor_kind, precision_fault
from causalrt.engines.streams import own_stream
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import BundleError, ExecutorError
from causalrt.install_hint import install_extra
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.proof.certificate import Certificate, describe_subject
from causalrt.proof.differences import TOLERANCE
from causalrt.proof.file_checks import check_files
from causalrt.proof.replica import ranks_device
from causalrt.proof.report import new_folder, write_report
from causalrt.proof.traced_rollout import plan_rollout


def certify(
    path: Path,
    *,
    executor: str | None = None,
    out: Path | None = None,
    checkpoint: Path | None = None,
    num_chunks: int | None = None,
    seed: int = 0,
    bisect: bool = False,
    emulate: bool = False,
    device: str | None = None,
    cuda_graphs: bool = True,
    processes: bool = True,
    on_progress: Progress = lambda *_: None,
) -> Certificate:
    """Check a bundle and compare its executor with eager.

    Args:
        path: the bundle.
        executor: the executor to certify; by default the best that the bundle was built for.
        out: folder for JSON, Markdown, the picture and Polygraphy's files, written atomically. None writes nothing.
        checkpoint: the checkpoint that the bundle was built from, to compare every weight with.
        num_chunks: chunks of the rollouts; by default up to the first one after an eviction.
        seed: of noise and prompts.
        bisect: find where the largest difference arises even if everything is within the tolerance.
        emulate: for TensorRT without a GPU: run the graphs that its engines were built from, all ranks in this process.
        device: `cpu` or `cuda`; by default the CPU if the executor runs there.
        cuda_graphs: let inductor and TensorRT capture steps on a GPU.
        processes: run the executor and the exchange self-test in rank processes too.
        on_progress: called at the start and the end of each stage.

    Raises:
        BundleError: the folder is not a bundle, or a file differs from the manifest.
        ExecutorError: the executor cannot run here, or Polygraphy or matplotlib is missing.
        CheckpointError: the checkpoint cannot be read, or has other sizes than the bundle.
        RequestError: the seed or the number of chunks is out of range, or the certificate cannot be written.
        OutOfMemoryError: the traces of the rollouts would not fit.
    """
    _require_proof()
    from causalrt.proof.comparisons import Stage, compare_exchanges, compare_processes, compare_rollouts, make_replicas
    from causalrt.proof.step_comparisons import compare_segments, compare_steps, find_first

    started = time.perf_counter()
    bundle = open_bundle(path)
    chosen = executor or bundle.executors[-1]
    where = _where(bundle, chosen, emulate=emulate, device=device)
    plan = plan_rollout(bundle.config, seed=seed, num_chunks=num_chunks)
    low = bundle.config.build.precision != "float32"
    certificate = Certificate(
        subject=describe_subject(bundle, chosen, plan, device=where, emulated=emulate),
        tolerance=None if low else TOLERANCE,
    )
    stage = Stage(
        certificate=certificate,
        bundle=bundle,
        executor=chosen,
        plan=plan,
        device=where,
        emulate=emulate,
        cuda_graphs=cuda_graphs,
    )
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(out)) if out is not None else None
        scratch = stack.enter_context(TemporaryFolder("certificate"))
        stack.enter_context(unchanged(bundle))
        stack.enter_context(own_stream(ranks_device(where)))
        on_progress("files", 0, 1)
        check_files(certificate, bundle, checkpoint)
        on_progress("files", 1, 1)
        stage.check_memory()
        if plan.evicted_chunk is None or plan.evicted_chunk >= plan.num_chunks:
            why = "the window holds the whole horizon" if plan.evicted_chunk is None else "too few chunks; add --chunks"
            stage.skip("a chunk after eviction", why)
        make_replicas(stage, scratch)
        compare_rollouts(stage, on_progress)
        compare_exchanges(stage)
        step = compare_steps(stage, on_progress)
        compare_segments(stage, folder, out, on_progress, always_bisect=bisect)
        find_first(stage, step)
        if not processes:
            stage.skip("rank processes", "they were left out by the caller")
        elif emulate:
            why = "its engines want a GPU; only the graphs that they were built from were run"
            stage.skip(f"rank processes and engines of {chosen}", why)
        else:
            compare_processes(stage, on_progress)
        if bundle.vae is not None:
            stage.skip("the VAE", "a certificate is of latents")
        certificate.subject["seconds"] = time.perf_counter() - started
        if folder is not None:
            write_report(certificate, folder)
    return certificate


def _require_proof() -> None:
    try:
        import matplotlib  # noqa: F401
        import polygraphy  # noqa: F401
    except ImportError as error:
        raise ExecutorError(
            f"a certificate wants Polygraphy and matplotlib ({error}); {install_extra('proof')}"
        ) from error


def _where(bundle: Bundle, executor: str, *, emulate: bool, device: str | None) -> str:
    """The device to run on.

    Raises:
        BundleError: the bundle was not built for the executor, or has no graphs to emulate.
        ExecutorError: the executor cannot run here.
    """
    kind = executor_kind(executor)
    lacking = bundle.why_not(executor)
    if lacking is not None and not (emulate and executor in bundle.unfinished):
        emulation = ". Here, `--emulate` compares the graphs that the engines will be built from"
        raise BundleError(lacking + (emulation if executor in bundle.unfinished else ""))
    if emulate:
        if executor not in FLAVOURS:
            raise ExecutorError(f"--emulate is for {' and '.join(FLAVOURS)}; {executor} runs here as it is")
        if not any(step.tensorrt for step in bundle.steps):
            raise BundleError(
                f"{bundle.path} holds no ONNX graphs of its engines (its front end was torch-tensorrt), so there is nothing "
                "to emulate; certify it on its GPU, or build with `--frontend onnx`"
            )
        return "cpu"
    if "cpu" in kind.devices:
        if (fault := precision_fault(executor, bundle.config.build.precision, device or "cpu")) is not None:
            raise ExecutorError(
                f"{bundle.path}: {fault}, or certify it with `--executor eager`, or on a GPU with `--device cuda`"
            )
        return choose_device(executor, asked=device or "cpu", world_size=bundle.config.build.world_size)
    try:
        return choose_device(executor, asked=device, world_size=bundle.config.build.world_size)
    except ExecutorError as error:
        raise ExecutorError(
            f"{error}. Here, `--emulate` compares the graphs that the engines were built from, and `--executor eager` the ranks"
        ) from error
