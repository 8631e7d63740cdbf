"""`load`: a bundle on its ranks. Everything that can be refused is refused before a process is started."""

from pathlib import Path

from causalrt.engines.bundle import open_bundle
from causalrt.engines.kinds import choose_device, executor_kind, precision_fault
from causalrt.engines.vae import check_has_vae
from causalrt.errors import BundleError, ExecutorError, Faults, RequestError
from causalrt.plugins.kernel_launch import require_triton_launches
from causalrt.runtime.engine import Engine

TIMEOUT_S = {"cpu": 600.0, "cuda": 60.0}
"""Before an engine serves on GPUs everything has run there once, and a chunk takes seconds; on a CPU it may take minutes."""


def load(
    bundle: str | Path,
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
    """Verify a bundle, start its rank processes, and keep them warm.

    Args:
        bundle: folder written by `causalrt build`.
        executor: one of `EXECUTORS`; by default the best that the bundle was built for.
        world_size: ranks that the caller expects; must be what the bundle was built for.
        device: `cuda` (rank r on GPU r) or `cpu`; by default GPUs, where the executor can use them and each rank has one.
        fused_ops: have `eager` and `inductor` run self-attention by the fused ops (Triton kernels on a GPU), or not; by default
            as the bundle was built. The others run what was built.
        cuda_graphs: have `inductor` and TensorRT capture steps on a GPU, which without takes longer; off is for measurements.
        vae: decode chunks to frames, in a process of its own: on a GPU that no rank has, or else on rank 0's; by default
            if the bundle has a VAE.
        vae_executor: what runs the VAE: `eager`, or one that the bundle was built for. By default `executor`, but eager torch
            on a CPU, where it is about twice as fast as ONNX Runtime and takes a third of the memory.
        text_encoder: folder of umT5, so that prompts can be text; in this process, in bfloat16. Or of a table of words
            (`model/text/words.py`).
        text_device: where it computes: `cpu`, where a prompt takes seconds, or `cuda:N`, where it takes 11 GiB.
        max_sessions: how many may be open at once; by default as many as fit in memory.
        num_threads: CPU threads of each rank; by default the cores shared among the ranks.
        timeout_s: a rank that gives no answer for so long has failed, by default 60 s on GPUs and 600 s on a CPU. Starting may
            take two minutes however short it is, and half an hour on GPUs or with an executor that compiles.

    Raises:
        BundleError: damaged, or built for another world size or executor, or without the VAE that is asked for.
        CheckpointError: the text encoder cannot be read, or is not the model's.
        ExecutorError: the executor cannot run here.
        KernelError: `fused_ops` on GPUs, and Triton is missing.
        OutOfMemoryError: the ranks would not fit.
        RankError: a rank process failed to start.
        RequestError: `timeout_s`, `num_threads` or `max_sessions` is out of range.
    """
    check_rank_limits(num_threads=num_threads, timeout_s=timeout_s)
    if max_sessions is not None and max_sessions < 1:
        raise RequestError(f"max_sessions must be at least 1, got {max_sessions}; leave it out for what fits in memory")
    opened = open_bundle(Path(bundle))
    built_for = opened.config.build.world_size
    if world_size is not None and world_size != built_for:
        raise BundleError(
            f"{bundle} was built for {built_for} rank(s), not {world_size}; load it with world_size={built_for}, "
            f"or build one with `--world-size {world_size}`"
        )
    chosen = executor or opened.executors[-1]
    kind = executor_kind(chosen)
    if (lacking := opened.why_not(chosen)) is not None:
        raise BundleError(lacking)
    if fused_ops not in (None, True, False):
        raise RequestError(f"fused_ops must be True, False, or None (as the bundle was built), got {fused_ops!r}")
    fused = opened.fused_ops if fused_ops is None else fused_ops
    if not fused and opened.config.video.time_index == "relative":
        raise ExecutorError(
            f"{bundle} has video.time_index=relative, which is what the fused ops do; load it with fused_ops=True"
        )
    if fused != opened.fused_ops and kind.compiled:
        built, wanted = ("on", "off") if opened.fused_ops else ("off", "on")
        raise ExecutorError(
            f"{chosen} runs what was built, and {bundle} was built with fused ops {built}; build it with `--plugins {wanted}`"
        )
    decodes = opened.vae is not None if vae is None else vae
    if decodes:
        check_has_vae(opened)
    if vae_executor is not None and (lacking := opened.why_not(vae_executor)) is not None:
        raise BundleError(f"vae_executor: {lacking}")
    where = choose_device(chosen, asked=device, world_size=built_for)
    if chosen == "inductor" and where == "cpu":
        from causalrt.engines.inductor import check_can_compile

        check_can_compile()
    if where == "cuda" and (chosen == "inductor" or (fused and not kind.compiled)):
        require_triton_launches()
    if (fault := precision_fault(chosen, opened.config.build.precision, where)) is not None:
        raise ExecutorError(f"{bundle}: {fault}, or load it with executor='eager', or on another kind of device")
    decoder_executor = (vae_executor or (chosen if where == "cuda" else "eager")) if decodes else None
    if decoder_executor is not None and where not in executor_kind(decoder_executor).devices:
        raise ExecutorError(f"{decoder_executor} cannot decode on a {where}; leave vae_executor out, or take eager")
    return Engine(
        opened,
        chosen,
        device=where,
        fused_ops=fused,
        cuda_graphs=cuda_graphs,
        decoder_executor=decoder_executor,
        text_encoder=None if text_encoder is None else Path(text_encoder),
        text_device=text_device,
        max_sessions=max_sessions,
        num_threads=num_threads,
        timeout_s=TIMEOUT_S[where] if timeout_s is None else timeout_s,
    )


def check_rank_limits(*, num_threads: int | None, timeout_s: float | None) -> None:
    """Check these arguments of `load`, which takes no bundle.

    Raises:
        RequestError: one of them is out of range, or CombinedConfigError if both are.
    """
    faults = Faults()
    with faults:
        if timeout_s is not None and not 0.001 <= timeout_s <= 1e6:
            raise RequestError(f"timeout_s must lie in [0.001, 1e6], got {timeout_s}; give 1e6 for `never`")
    with faults:
        if num_threads is not None and num_threads < 1:
            raise RequestError(f"num_threads must be at least 1, got {num_threads}; leave it out to share the cores")
    faults.report()
