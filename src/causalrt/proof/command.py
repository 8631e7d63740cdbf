"""`causalrt compare BUNDLE`: check the request, certify the bundle, and return what is printed."""

import json

from causalrt.engines.bundle import open_bundle
from causalrt.errors import BundleError, ConfigError, Faults
from causalrt.options import flags
from causalrt.progress import Progress
from causalrt.proof.arguments import CompareRequest

RECORDED_ONLY = ("head_plan", "fused_ops", "time_index", "dtype", "collectives")


def run(request: CompareRequest, *, on_progress: Progress) -> tuple[bool, str]:
    """Certify the bundle that a request names.

    Returns:
        Whether the bundle passed, and the text to print.

    Raises:
        CausalRTError: see `certify`; ConfigError for options that belong to recordings.
    """
    from causalrt.export.checkpoint import open_checkpoint
    from causalrt.proof.certify import certify
    from causalrt.proof.report import as_plain, as_text, check_target
    from causalrt.proof.traced_rollout import plan_rollout

    assert request.bundle is not None
    faults = Faults()
    with faults:
        unneeded = [name for name in RECORDED_ONLY if getattr(request, name) is not None]
        if unneeded:
            raise ConfigError(
                f"{flags(unneeded)}: the bundle was built one way, and is certified so; leave it out, or use --recorded"
            )
    with faults:
        config = open_bundle(request.bundle, verify=False).config
        with faults:
            plan_rollout(config, seed=request.seed or 0, num_chunks=request.chunks)
        built_for = config.build.world_size
        if request.world_size not in (None, built_for):
            raise BundleError(
                f"{request.bundle} was built for {built_for} rank(s), not {request.world_size}; leave --world-size out"
            )
    with faults:
        if request.out is not None:
            check_target(request.out)
    with faults:
        if request.checkpoint is not None:
            open_checkpoint(request.checkpoint)
    faults.report()
    certificate = certify(
        request.bundle,
        executor=request.executor,
        out=request.out,
        checkpoint=request.checkpoint,
        num_chunks=request.chunks,
        seed=request.seed or 0,
        bisect=request.bisect,
        emulate=request.emulate,
        device=request.device,
        cuda_graphs=request.cuda_graphs == "on",
        processes=not request.no_processes,
        on_progress=on_progress,
    )
    text = json.dumps(as_plain(certificate)) if request.json else as_text(certificate, request.out)
    return certificate.passed, text
