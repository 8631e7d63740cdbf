"""`causalrt bench`: choose, build, load, measure, report."""

import contextlib
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from causalrt.config import Config
from causalrt.engines.bundle import MANIFEST, file_digest
from causalrt.errors import ConfigError, Faults
from causalrt.measure.bench.arguments import REPEATS, BenchRequest
from causalrt.measure.bench.ceilings import Ceilings
from causalrt.measure.bench.machine import describe_machine, describe_moment
from causalrt.measure.bench.picture import draw, figure_class
from causalrt.measure.bench.replicas import (
    LeftOut,
    Replica,
    Source,
    build_random,
    bundles_of,
    check_all_fit,
    choose_replicas,
    sources_of,
)
from causalrt.measure.bench.report import Manifest, Report
from causalrt.measure.bench.rollouts import Rollouts
from causalrt.measure.bench.rows import comparisons, row
from causalrt.measure.bench.show import show
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.requests import checked_chunks
from causalrt.tools.doctor import examine
from causalrt.tools.files import check_writable_in, make_folder, write_whole

SCHEMA = 2
CONTEXT_PASS = "after the latency of its chunk, within frames a second"
JSON_FILE, PICTURE_FILE = "bench.json", "bench.png"


def run(
    request: BenchRequest,
    read_config: Callable[[], Config | None],
    *,
    write: Callable[[str], None],
    on_progress: Progress,
) -> None:
    """Run the command.

    Raises:
        CausalRTError: of the type that fits, or CombinedConfigError for several faults. Requests are refused before anything
            is loaded, and an earlier report is replaced only when the new one is complete.
    """
    with TemporaryFolder("bench") as folder:
        config, sources, replicas, left_out = _checked(request, read_config, folder)
        vae = config is None and request.vae
        check_all_fit(replicas, vae=vae)
        make_folder(request.out)
        if config is not None:
            build_random(sources, replicas, folder, seed=request.seed, on_progress=on_progress)
        report = measure(replicas, left_out, request, vae=vae, on_progress=on_progress)
    plain = asdict(report)
    written = {request.out / JSON_FILE: (json.dumps(plain, indent=1) + "\n").encode()}
    if request.picture:
        written[request.out / PICTURE_FILE] = draw(report)
    for path, content in written.items():
        write_whole(path, content)
    if request.json:
        write(json.dumps(plain))
    else:
        show(report, write)
        write(f"written: {', '.join(map(str, written))}")


def _checked(
    request: BenchRequest, read_config: Callable[[], Config | None], folder: Path
) -> tuple[Config | None, list[Source], list[Replica], list[LeftOut]]:
    """Check the request and choose what to measure, or raise everything that is wrong with it at once."""
    config, sources, replicas, left_out, faults = None, list[Source](), list[Replica](), list[LeftOut](), Faults()
    with faults:
        if request.repeats < 1:
            raise ConfigError(
                f"--repeats must be at least 1, got {request.repeats}; {REPEATS} are the fewest that can show anything"
            )
    with faults:
        if request.threads is not None and request.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {request.threads}; leave it out for all cores")
    with faults:
        SeededNoise(request.seed)
    with faults:
        if request.picture:
            figure_class()
        check_writable_in(request.out, (JSON_FILE, PICTURE_FILE) if request.picture else (JSON_FILE,))
    with faults:
        config = read_config()
        sources = bundles_of(request) if config is None else sources_of(config, request, folder)
    if sources:
        with faults:
            checked_chunks(sources[0].config, request.chunks)
        with faults:
            replicas, left_out = choose_replicas(sources, request, examine()["can"])
    faults.report()
    return config, sources, replicas, left_out


def measure(
    replicas: Sequence[Replica],
    left_out: list[LeftOut],
    request: BenchRequest,
    *,
    vae: bool,
    on_progress: Progress,
) -> Report:
    """Measure replicas whose bundles are built; engines and processes have ended when this returns or raises."""
    device = replicas[0].device
    before = describe_moment(device)
    digests = {replica.bundle: file_digest(replica.bundle / MANIFEST) for replica in replicas}
    with contextlib.ExitStack() as stack:
        rollouts = stack.enter_context(Rollouts(replicas, seed=request.seed, num_chunks=request.chunks, vae=vae))
        rollouts.load(on_progress)
        ceilings = stack.enter_context(Ceilings(replicas)) if request.ceilings else None
        _repeat(rollouts, ceilings, request.repeats, on_progress)
        rollouts.read_memory()
        decodes = rollouts.decodes
    ranks = {replica.bundle: replica.world_size for replica in replicas}
    manifest = Manifest(
        what=request.recipe or ", ".join(path.name for path in digests),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=sys.argv,
        machine=describe_machine(device),
        before=before,
        after=describe_moment(device),
        bundles=[{"name": path.name, "world_size": ranks[path], "sha256": sha} for path, sha in digests.items()],
        random_weights=not request.bundles,
        seed=request.seed,
        repeats=request.repeats,
        chunks=rollouts.num_chunks,
        config=replicas[0].config.as_dict(),
        includes={"text": False, "vae": decodes, "context pass": CONTEXT_PASS, "build": False},
    )
    return Report(
        schema=SCHEMA,
        manifest=manifest,
        rows=[row(replica, rollouts.measured[replica.name], ceilings) for replica in replicas],
        comparisons=comparisons(replicas, rollouts.measured),
        ceilings=[] if ceilings is None else ceilings.summary(),
        left_out=left_out,
    )


def _repeat(rollouts: Rollouts, ceilings: Ceilings | None, repeats: int, on_progress: Progress) -> None:
    """Run the warm-up and all repeats, each between two rounds of the ceilings."""
    on_progress("rollouts", 0, repeats + 1)
    for done in range(repeats + 1):
        rollouts.repeat(done - 1)
        if ceilings is not None:
            if done == 0:
                ceilings.measure(counts=False)
            ceilings.measure()
        on_progress("rollouts", done + 1, repeats + 1)
