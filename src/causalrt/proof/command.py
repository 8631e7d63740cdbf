"""`causalrt compare BUNDLE`: its arguments, and what is printed."""

import argparse
import json
from pathlib import Path

from causalrt.engines.bundle import open_bundle
from causalrt.errors import BundleError, ConfigError, Faults
from causalrt.progress import Progress

RECORDED_ONLY = ("head_plan", "plugins", "time_index", "dtype", "collectives")
EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a certificate."""
    parser.add_argument("bundle", nargs="?", type=Path, help="bundle to certify")
    parser.add_argument(
        "--out", type=Path, help="folder for the certificate: JSON, Markdown, picture, Polygraphy's files"
    )
    parser.add_argument("--checkpoint", type=Path, help="that the bundle was built from, to compare every weight with")
    parser.add_argument("--chunks", type=int, help="of the rollouts (up to the first after eviction)")
    parser.add_argument("--seed", type=int, help="of noise and prompts (0)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(the CPU, where the executor runs there)")
    parser.add_argument("--no-processes", action="store_true", help="leave the rank processes and their canary out")
    parser.add_argument(
        "--bisect", action="store_true", help="say where the largest difference arises even if all is well"
    )


def run(arguments: argparse.Namespace, *, on_progress: Progress) -> tuple[int, str]:
    """Exit code and what to print.

    Raises:
        CausalRTError: see `certify`; ConfigError for options that are a recording's.
    """
    from causalrt.export.checkpoint import open_checkpoint
    from causalrt.proof.certify import certify
    from causalrt.proof.report import as_plain, as_text, check_target
    from causalrt.proof.traced_rollout import plan_rollout

    faults = Faults()
    with faults:
        given = [name for name in RECORDED_ONLY if getattr(arguments, name) is not None]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(
                f"{names}: the bundle was built one way, and is certified so; leave it out, or use --recorded"
            )
    with faults:
        config = open_bundle(arguments.bundle, verify=False).config
        with faults:
            plan_rollout(config, seed=arguments.seed or 0, num_chunks=arguments.chunks)
        built_for = config.build.world_size
        if arguments.world_size not in (None, built_for):
            raise BundleError(
                f"{arguments.bundle} was built for {built_for} rank(s), not {arguments.world_size}; leave --world-size out"
            )
    with faults:
        if arguments.out is not None:
            check_target(arguments.out)
    with faults:
        if arguments.checkpoint is not None:
            open_checkpoint(arguments.checkpoint)
    faults.report()
    certificate = certify(
        arguments.bundle,
        executor=arguments.executor,
        out=arguments.out,
        checkpoint=arguments.checkpoint,
        num_chunks=arguments.chunks,
        seed=arguments.seed or 0,
        bisect=arguments.bisect,
        emulate=arguments.emulate,
        device=arguments.device,
        cuda_graphs=arguments.cuda_graphs == "on",
        processes=not arguments.no_processes,
        on_progress=on_progress,
    )
    text = json.dumps(as_plain(certificate)) if arguments.json else as_text(certificate, arguments.out)
    return (0 if certificate.passed else EXIT_FAILED), text
