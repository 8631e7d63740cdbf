"""`load`: check a bundle and the arguments, then start an engine. All checks come before the first process is started."""

from pathlib import Path

from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.kinds import choose_device, executor_kind, precision_fault
from causalrt.engines.vae import check_has_vae
from causalrt.errors import BundleError, ExecutorError, Faults, RequestError
from causalrt.plugins.kernel_launch import require_triton_launches
from causalrt.runtime.engine import Engine
from causalrt.runtime.start import EngineOptions, start_engine

TIMEOUT_S = {"cpu": 600.0, "cuda": 60.0}
"""Default time limit by device. On a GPU, where loading has run everything once, a chunk takes seconds; on a CPU, minutes."""


def load(
    bundle: str | Path | Bundle,
    *,
    executor: str | None = None,
    world_size: int | None = None,
    device: str | None = None,
    fused_ops: bool | None = None,
    cuda_graphs: bool = True,
    vae: bool | None = None,
    vae_executor: str | None = None,
    text_encoder: str | Path | None = None,
    text_device: str = "cpu",
    max_sessions: int | None = None,
    num_threads: int | None = None,
    timeout_s: float | None = None,
) -> Engine:
    """Verify a bundle, start its rank processes, and return the engine that they form.

    Args:
        bundle: folder written by `causalrt build`; or the bundle that `open_bundle` returned for it, which is not hashed again.
        executor: one of `EXECUTORS`; by default the best that the bundle was built for.
        world_size: ranks that the caller expects; must be what the bundle was built for.
        device: `cuda` (rank r on GPU r) or `cpu`; by default GPUs, where the executor can use them and each rank has one.
        fused_ops: have `eager` and `inductor` run self-attention by the fused ops (Triton kernels on a GPU), or not; by default
            as the bundle was built. The other executors run what was built.
        cuda_graphs: let `inductor` and TensorRT capture steps in CUDA graphs on a GPU, which is faster.
        vae: decode chunks to frames, in a separate process, on a GPU that no rank uses or otherwise on rank 0's. By default, if
            the bundle has a VAE.
        vae_executor: what runs the VAE: `eager`, or one that the bundle was built for. By default `executor`, but eager torch
            on a CPU, where it is about twice as fast as ONNX Runtime and takes a third of the memory.
        text_encoder: folder of umT5, so that prompts can be text, or of a table of words (`model/text/words.py`). It runs in
        this
            process; umT5 in bfloat16.
        text_device: device of the text encoder: `cpu`, where a prompt takes seconds, or `cuda:N`, where umT5 needs 11 GiB.
        max_sessions: number of sessions that may be open at once; by default as many as fit in memory.
        num_threads: CPU threads of each rank; by default the cores are divided among the ranks.
        timeout_s: seconds after which a rank without an answer counts as failed, by default 60 on GPUs and 600 on a CPU.
        Starting may
            always take two minutes, and half an hour on GPUs or with an executor that compiles.

    Raises:
        BundleError: the bundle is damaged, was built for another world size or executor, or has no VAE although `vae` is true.
        CheckpointError: the text encoder cannot be read, or does not fit the model.
        ExecutorError: the executor cannot run on this machine.
        KernelError: `fused_ops` on GPUs, and Triton is missing.
        OutOfMemoryError: the ranks would not fit.
        RankError: a rank process failed to start.
        RequestError: `timeout_s`, `num_threads` or `max_sessions` is out of range.
    """
    check_rank_limits(num_threads=num_threads, timeout_s=timeout_s)
    if max_sessions is not None and max_sessions < 1:
        raise RequestError(f"max_sessions must be at least 1, got {max_sessions}; leave it out for what fits in memory")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    chosen = executor or opened.executors[-1]
    _check_built_for(opened, chosen, world_size=world_size, vae_executor=vae_executor)
    fused = _checked_fused_ops(opened, chosen, fused_ops)
    decodes = opened.vae is not None if vae is None else vae
    if decodes:
        check_has_vae(opened)
    where = choose_device(chosen, asked=device, world_size=opened.config.build.world_size)
    _check_runs_on(opened, chosen, where, fused_ops=fused)
    decoder_executor = (vae_executor or (chosen if where == "cuda" else "eager")) if decodes else None
    if decoder_executor is not None and where not in executor_kind(decoder_executor).devices:
        raise ExecutorError(f"{decoder_executor} cannot decode on a {where}; leave vae_executor out, or take eager")
    return start_engine(
        opened,
        EngineOptions(
            executor=chosen,
            device=where,
            fused_ops=fused,
            cuda_graphs=cuda_graphs,
            decoder_executor=decoder_executor,
            text_encoder=None if text_encoder is None else Path(text_encoder),
            text_device=text_device,
            max_sessions=max_sessions,
            num_threads=num_threads,
            timeout_s=TIMEOUT_S[where] if timeout_s is None else timeout_s,
        ),
    )


def _check_built_for(bundle: Bundle, executor: str, *, world_size: int | None, vae_executor: str | None) -> None:
    built_for = bundle.config.build.world_size
    if world_size not in (None, built_for):
        raise BundleError(
            f"{bundle.path} was built for {built_for} rank(s), not {world_size}; load it with world_size={built_for}, "
            f"or build one with `--world-size {world_size}`"
        )
    executor_kind(executor)
    if (lacking := bundle.why_not(executor)) is not None:
        raise BundleError(lacking)
    if vae_executor is not None and (lacking := bundle.why_not(vae_executor)) is not None:
        raise BundleError(f"vae_executor: {lacking}")


def _checked_fused_ops(bundle: Bundle, executor: str, fused_ops: bool | None) -> bool:
    """Whether to run the fused ops: as requested, or as the bundle was built."""
    if fused_ops not in (None, True, False):
        raise RequestError(f"fused_ops must be True, False, or None (as the bundle was built), got {fused_ops!r}")
    fused = bundle.fused_ops if fused_ops is None else fused_ops
    if not fused and bundle.config.video.time_index == "relative":
        raise ExecutorError(
            f"{bundle.path} has video.time_index=relative, which only the fused ops support; load it with fused_ops=True"
        )
    if fused != bundle.fused_ops and executor_kind(executor).compiled:
        built, wanted = ("on", "off") if bundle.fused_ops else ("off", "on")
        raise ExecutorError(
            f"{executor} runs what was built, and {bundle.path} was built with fused ops {built}; build it with "
            f"`--fused-ops {wanted}`"
        )
    return fused


def _check_runs_on(bundle: Bundle, executor: str, device: str, *, fused_ops: bool) -> None:
    """Check that this machine has the compilers and precisions that the executor needs on `device`."""
    if executor == "inductor" and device == "cpu":
        from causalrt.engines.inductor import check_can_compile

        check_can_compile()
    if device == "cuda" and (executor == "inductor" or (fused_ops and not executor_kind(executor).compiled)):
        require_triton_launches()
    if (fault := precision_fault(executor, bundle.config.build.precision, device)) is not None:
        raise ExecutorError(f"{bundle.path}: {fault}, or load it with executor='eager', or on another kind of device")


def check_rank_limits(*, num_threads: int | None, timeout_s: float | None) -> None:
    """Check those arguments of `load` that can be checked without a bundle.

    Raises:
        RequestError: one of them is out of range, or CombinedConfigError if both are.
    """
    faults = Faults()
    with faults:
        if timeout_s is not None and not 0.001 <= timeout_s <= 1e6:
            raise RequestError(f"timeout_s must lie in [0.001, 1e6], got {timeout_s}; give 1e6 for no time limit")
    with faults:
        if num_threads is not None and num_threads < 1:
            raise RequestError(f"num_threads must be at least 1, got {num_threads}; leave it out to share the cores")
    faults.report()
