"""`certify`: everything that is checked of a bundle, in order.

files      tables and indices, references, weights
threads    eager on 1 rank | eager on P ranks | the executor on P ranks       free-running; then step by step, fed alike
segments   each ONNX file, fed with eager's own tensors                       the first that differs names layer and part
processes  the executor as users run it; the canary in its exchanges
"""

import time
from collections.abc import Callable
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
from causalrt.proof.attempt import attempt
from causalrt.proof.compare import TOLERANCE
from causalrt.proof.record import Certificate, Check, NotChecked
from causalrt.proof.report import new_folder, write_report
from causalrt.proof.rollouts import plan_rollout
from causalrt.proof.sides import ranks_device
from causalrt.proof.subject import describe_subject
from causalrt.proof.tables import check_references, check_tables, graph_files
from causalrt.proof.weights import check_against_checkpoint, check_digests


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
        executor: to certify; by default the best that the bundle was built for.
        out: folder for JSON, Markdown, picture and what Polygraphy reads; written whole or not at all. None writes nothing.
        checkpoint: that the bundle was built from, to compare every weight with.
        num_chunks: of the rollouts; by default up to the first one after eviction.
        seed: of noise and prompts.
        bisect: look for the layer where the executor leaves eager though nothing is out of tolerance; otherwise that is done
            only if something is. It then says where the largest difference arises.
        emulate: TensorRT without a GPU: run the graphs that its engines were built from, all ranks in this process.
        device: `cpu` or `cuda`; by default the CPU, where the executor runs there.
        cuda_graphs: have inductor and TensorRT capture steps on a GPU.
        processes: run the executor in rank processes too, and the canary in their exchanges.
        on_progress: told of each stage.

    Raises:
        BundleError: no bundle, or damaged in a way that its manifest tells.
        ExecutorError: the executor cannot run here, or Polygraphy or matplotlib is missing.
        CheckpointError, RequestError, OutOfMemoryError: as they say.
    """
    _require_proof()
    from causalrt.proof.numerics import compare_sides  # needs Polygraphy

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
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(out)) if out is not None else None
        scratch = stack.enter_context(TemporaryFolder("certificate"))
        stack.enter_context(unchanged(bundle))
        stack.enter_context(own_stream(ranks_device(where)))
        on_progress("files", 0, 1)
        _check_files(certificate, bundle, checkpoint)
        on_progress("files", 1, 1)
        compare_sides(
            certificate,
            bundle,
            chosen,
            plan,
            device=where,
            emulate=emulate,
            cuda_graphs=cuda_graphs,
            always_bisect=bisect,
            processes=processes,
            scratch=scratch,
            folder=folder,
            out=out,
            on_progress=on_progress,
        )
        if bundle.vae is not None:
            certificate.not_checked.append(NotChecked(what="the VAE", why="a certificate is of latents"))
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
    """The device to run on, everything that cannot be done here having been refused."""
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


def _check_files(certificate: Certificate, bundle: Bundle, checkpoint: Path | None) -> None:
    """Tables, references and weights."""

    def add(name: str, what: str, check: Callable[[], tuple[int, list[str]]]) -> int:
        result, fault = attempt(f"the check of {name}", check)
        count, faults = result or (0, [fault])
        if count or faults:
            certificate.checks.append(Check(name=name, count=count, found=f"{count} {what}", faults=tuple(faults)))
        return count

    add("hashes", "files as the manifest has them", lambda: (len(bundle.hashes), []))
    if graph_files(bundle):
        add("tables", "constants of graphs equal the tables of this version, bit for bit", lambda: _tables(bundle))
        add("references", "references of graphs to weights", lambda: check_references(bundle))
    if len(bundle.unfinished) < len(bundle.engines):
        _check_engine_tables(certificate, bundle)
    if not add("weights", "weights are finite, and what the build wrote of them", lambda: check_digests(bundle)):
        why = "the weight file holds no digests (it was built by an earlier version)"
        certificate.not_checked.append(NotChecked(what="weights against what the build wrote", why=why))
    if checkpoint is not None:
        add("checkpoint", f"weights equal {checkpoint.name}", lambda: check_against_checkpoint(bundle, checkpoint))
    else:
        why = "no checkpoint was given; add --checkpoint FILE"
        certificate.not_checked.append(NotChecked(what="weights against a checkpoint", why=why))


def _tables(bundle: Bundle) -> tuple[int, list[str]]:
    found, faults = check_tables(bundle)
    return sum(found.values()), faults


def _check_engine_tables(certificate: Certificate, bundle: Bundle) -> None:
    """What the build wrote of the networks that engines were built from."""
    from causalrt.tools.inspect_engines import describe_engines

    def check() -> tuple[int, list[str]]:
        count, faults = 0, []
        try:
            engines = describe_engines(bundle)
        except BundleError as error:
            return 0, [str(error)]
        for engine in engines:
            for step in engine.steps:
                for name, table in step.constants.items():
                    count += table["equal_constants"]
                    if not table["equal_constants"]:
                        at = f"{engine.flavour} {engine.target} {step.frames}-frame step"
                        faults.append(f"{at}: no constant of the network equals the table {name}")
        return count, faults

    result, fault = attempt("the check of the engines' networks", check)
    count, faults = result or (0, [fault])
    found = f"{count} constants of the networks that engines were built from equal the tables"
    certificate.checks.append(Check(name="networks", count=count, found=found, faults=tuple(faults)))
