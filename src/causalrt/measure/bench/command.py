"""`causalrt bench`: choose, build, load, measure, report."""

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from causalrt.config import Config
from causalrt.engines.bundle import MANIFEST, file_digest
from causalrt.errors import ConfigError, Faults
from causalrt.measure.bench.ceilings import Ceilings
from causalrt.measure.bench.machine import describe_machine, describe_moment
from causalrt.measure.bench.picture import draw, figure_class
from causalrt.measure.bench.report import comparisons, row
from causalrt.measure.bench.rollouts import Rollouts
from causalrt.measure.bench.show import show
from causalrt.measure.bench.sides import LeftOut, Replica, check_all_fit, choose_sides
from causalrt.measure.bench.sources import BenchRequest, Source, build_random, bundles_of, sources_of
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.requests import checked_chunks
from causalrt.tools.doctor import examine
from causalrt.tools.files import check_writable_in, make_folder, write_whole

SCHEMA = 1
JSON_FILE, PICTURE_FILE = "bench.json", "bench.png"


def run(
    arguments: argparse.Namespace,
    read_config: Callable[[], Config | None],
    *,
    write: Callable[[str], None],
    on_progress: Progress,
) -> None:
    """Run the command.

    Args:
        arguments: of the command line.
        read_config: the config of the recipe; None where bundles are given.
        write: takes what is said.
        on_progress: told of each stage.

    Raises:
        CausalRTError: of the type that fits, or CombinedConfigError if several things are wrong. Whatever is refused is
            refused before anything is loaded, and no file is half-written.
    """
    config, sources, sides, left_out, faults = None, list[Source](), list[Replica](), list[LeftOut](), Faults()
    with faults:
        if arguments.repeats < 1:
            raise ConfigError(
                f"--repeats must be at least 1, got {arguments.repeats}; 5 are the fewest that can show anything"
            )
    with faults:
        if arguments.threads is not None and arguments.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {arguments.threads}; leave it out for all cores")
    with faults:
        SeededNoise(arguments.seed)
    with faults:
        _check_out(arguments.out, picture=not arguments.no_picture)
    wishes = BenchRequest(
        executors=arguments.executors,
        world_sizes=arguments.world_sizes,
        plugins=arguments.plugins,
        cuda_graphs=arguments.cuda_graphs,
        device=arguments.device,
        threads=arguments.threads,
    )
    with TemporaryFolder("bench") as folder:
        with faults:
            config = read_config()
            sources = bundles_of(arguments.bundles, wishes) if config is None else sources_of(config, wishes, folder)
        if sources:
            with faults:
                checked_chunks(sources[0].config, arguments.chunks)
            with faults:
                sides, left_out = choose_sides(sources, wishes, examine()["can"])
        faults.report()
        vae = config is None and not arguments.no_vae
        check_all_fit(sides, vae=vae)
        make_folder(arguments.out)
        if config is not None:
            wanted = {s.path: [side.executor for side in sides if side.bundle == s.path] for s in sources}
            build_random(sources, wanted, folder, seed=arguments.seed, on_progress=on_progress)
        report = measure(sides, arguments, vae=vae, on_progress=on_progress)
    report["left_out"] = [
        {"executor": each.executor, "world_size": each.world_size, "reason": each.reason} for each in left_out
    ]
    written = [arguments.out / JSON_FILE]
    contents = [(json.dumps(report, indent=1) + "\n").encode()]
    if not arguments.no_picture:
        written.append(arguments.out / PICTURE_FILE)
        contents.append(draw(report))
    for path, content in zip(written, contents, strict=True):
        write_whole(path, content)
    if arguments.json:
        write(json.dumps(report))
    else:
        show(report, write)
        write(f"written: {', '.join(map(str, written))}")


def measure(
    sides: Sequence[Replica], arguments: argparse.Namespace, *, vae: bool, on_progress: Progress
) -> dict[str, Any]:
    """All of it, once bundles are there; engines and processes have ended when this returns or raises."""
    device, repeats = sides[0].device, arguments.repeats
    before = describe_moment(device)
    bundles = {
        side.bundle: {
            "name": side.bundle.name,
            "world_size": side.world_size,
            "sha256": file_digest(side.bundle / MANIFEST),
        }
        for side in sides
    }
    with contextlib.ExitStack() as stack:
        rollouts = stack.enter_context(Rollouts(sides, seed=arguments.seed, num_chunks=arguments.chunks, vae=vae))
        rollouts.load(on_progress)
        ceilings = None if arguments.no_ceilings else stack.enter_context(Ceilings(sides))
        on_progress("rollouts", 0, repeats + 1)
        for done in range(repeats + 1):
            rollouts.repeat(done - 1)
            if ceilings is not None:
                if done == 0:
                    ceilings.measure(counts=False)
                ceilings.measure()
            on_progress("rollouts", done + 1, repeats + 1)
        rollouts.read_memory()
        decodes = rollouts.decodes
    rows = [row(side, rollouts.measured[side.name], ceilings) for side in sides]
    config = sides[0].config
    return {
        "schema": SCHEMA,
        "manifest": {
            "what": arguments.recipe or ", ".join(path.name for path in bundles),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "machine": describe_machine(device),
            "before": before,
            "after": describe_moment(device),
            "bundles": list(bundles.values()),
            "random_weights": not arguments.bundles,
            "seed": arguments.seed,
            "repeats": repeats,
            "chunks": rollouts.num_chunks,
            "config": config.as_dict(),
            "includes": {
                "text": False,
                "vae": decodes,
                "refresh": "after the latency of its chunk, within frames a second",
                "build": False,
            },
        },
        "rows": rows,
        "comparisons": [each.as_dict() for each in comparisons(sides, rollouts.measured)],
        "ceilings": [] if ceilings is None else ceilings.as_list(),
    }


def _check_out(folder: Path, *, picture: bool) -> None:
    """Find out before the work, not after it, that the result cannot be written."""
    if picture:
        figure_class()
    check_writable_in(folder, (JSON_FILE, PICTURE_FILE) if picture else (JSON_FILE,))
