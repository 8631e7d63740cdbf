"""`causalrt demo`: the shipped model's video, made by several executors on several ranks, and compared.

    prompt -> a bundle for each number of ranks -> the same video by every row -> demo.mp4, contact-sheet.png, a table

Every row goes the way that any bundle goes: files -> `build` -> `load` -> a session with frames. The first row, eager on one
rank, is what the others are compared with.
"""

import contextlib
import logging
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causalrt.config import Config, override
from causalrt.demo_model import DemoFiles, demo_files
from causalrt.engines.bundle import file_digest, open_bundle, record_digest
from causalrt.engines.toolchain import toolchain_versions
from causalrt.errors import BuildError, BundleError, Faults, RequestError
from causalrt.export.build import build
from causalrt.media.pyav import pyav
from causalrt.media.video_file import Mp4Writer, check_picture
from causalrt.model.text.words import WordEncoder
from causalrt.owned_paths import TemporaryFolder
from causalrt.progress import Progress
from causalrt.recipes import recipe
from causalrt.runtime.load import load
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.session import Chunk
from causalrt.tools.contact_sheet import SheetRow, contact_sheet, enlarged
from causalrt.tools.demo_request import ABOUT, EXAMPLES, DemoRequest
from causalrt.tools.files import check_writable_in, make_folder, write_whole
from causalrt.tools.generate import check_switches, parsed_switches
from causalrt.user_cache import kept_folder, remove_unused

logger = logging.getLogger(__name__)

MOST_KEPT_BUNDLES = 6
SHOWN = ("onnxruntime", 2)
"""The row that is filmed, if it is there."""
MOST_GREY_LEVELS = 1
VIDEO_FILE, SHEET_FILE = "demo.mp4", "contact-sheet.png"
LEAST_SIDE = 384
"""Of the video, in pixels: players blur smaller ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A row's video: `load_s` until the ranks were ready; from the prompt `first_ms` to frames, `total_s` to the last."""

    chunks: list[Chunk]
    load_s: float
    first_ms: float
    total_s: float

    @property
    def frames(self) -> list[torch.Tensor]:
        """Of each chunk, uint8 `[T, h, w, 3]`."""
        return [chunk.frames for chunk in self.chunks if chunk.frames is not None]


def run_demo(request: DemoRequest, *, on_progress: Progress, on_stage: Callable[[str], None]) -> dict[str, Any]:
    """Build, generate by every row, compare, and write the files; what is refused is refused before anything is built.

    Args:
        request: what to show.
        on_progress: told of (stage, done, total).
        on_stage: told in words what comes next.

    Returns:
        `rows` (executor, world_size, load_s, first_frame_ms, chunk_ms, frames_per_s, latent_error, grey_levels,
        mean_grey_levels), `passed`,
        `most_grey_levels`, `build_s`, `total_s`, `prompt`, `files`.

    Raises:
        PromptError: a word that the model does not know.
        RequestError: too many chunks, no such chunk to switch at, no seed, or the files cannot be written.
    """
    began = time.perf_counter()
    config, model = recipe("demo"), demo_files()
    switches = _checked(request, config, model)
    worlds = sorted({world_size for _, world_size in request.rows})
    with contextlib.ExitStack() as kept:
        on_stage(f"Building bundles of the demo model for {', '.join(map(str, worlds))} rank(s), unless they are kept")
        start = time.perf_counter()
        bundles = {}
        for done, world_size in enumerate(worlds):
            on_progress("bundles", done, len(worlds))
            bundles[world_size] = kept.enter_context(kept_demo_bundle(world_size=world_size))
        on_progress("bundles", len(worlds), len(worlds))
        build_s = time.perf_counter() - start
        on_stage(f"Generating {request.chunks} chunks: {request.prompt!r}")
        made = {}
        for executor, world_size in request.rows:
            made[executor, world_size] = make_video(
                request,
                switches,
                bundles[world_size],
                executor,
                on_progress=on_progress,
                stage=row_name(executor, world_size),
            )
    rows = [compared(row, video, made[request.rows[0]]) for row, video in made.items()]
    files = _write(request, config, switches, made, rows)
    return {
        "prompt": request.prompt,
        "rows": rows,
        "most_grey_levels": MOST_GREY_LEVELS,
        "passed": all(row["grey_levels"] <= MOST_GREY_LEVELS for row in rows),
        "build_s": build_s,
        "total_s": time.perf_counter() - began,
        "files": list(map(str, files)),
    }


def demo_bundle(out: Path, *, world_size: int = 2, on_progress: Progress | None = None) -> Path:
    """The demo model as a bundle with its codec, for eager and onnxruntime."""
    model = demo_files()
    config = override(recipe("demo"), {"build.world_size": str(world_size)})
    return build(config, checkpoint=model.checkpoint, vae=model.codec, out=out, on_progress=on_progress)


@contextlib.contextmanager
def kept_demo_bundle(*, world_size: int = 2, on_progress: Progress | None = None) -> Iterator[Path]:
    """The demo's bundle in the user's cache, built first if it is missing or damaged.

    If there can be no cache, or another process uses the damaged bundle, the bundle is built in a temporary folder, which is
    removed at the end of the block.
    """

    def complete(path: Path) -> None:
        try:
            open_bundle(path)
        except BundleError as error:
            if path.exists():
                logger.warning("the demo's bundle is built again: %s", error)
                remove_unused(path)
            demo_bundle(path, world_size=world_size, on_progress=on_progress)

    with contextlib.ExitStack() as stack:
        try:
            kept = kept_folder("demo", _bundle_key(world_size), complete=complete, most=MOST_KEPT_BUNDLES)
            bundle = stack.enter_context(kept)
        except (OSError, BuildError) as error:
            logger.warning("the demo's bundle is built in a temporary folder, since it cannot be cached: %s", error)
            folder = stack.enter_context(TemporaryFolder("demo"))
            bundle = demo_bundle(folder / "bundle", world_size=world_size, on_progress=on_progress)
        yield bundle


def _bundle_key(world_size: int) -> str:
    """A digest of everything that the demo's bundle depends on: the model's files, this package, and the build's libraries."""
    model, package = demo_files(), Path(__file__).parents[1]
    files = [model.checkpoint, model.codec, *sorted(package.rglob("*.py"))]
    record = {
        "files": {str(path.relative_to(package)): file_digest(path) for path in files},
        "toolchain": toolchain_versions(),
        "python": platform.python_version(),
    }
    return f"ranks-{world_size}-{record_digest(record)[:32]}"


@contextlib.contextmanager
def served_demo(*, on_progress: Progress) -> Iterator[dict[str, Any]]:
    """What `causalrt serve` is given where no bundle is named: arguments by name; the bundle stays while the block runs."""
    with kept_demo_bundle(on_progress=on_progress) as bundle:
        words = demo_files().words
        yield {"bundle": bundle, "text_encoder": words, "about": ABOUT, "examples": EXAMPLES}


def row_name(executor: str, world_size: int) -> str:
    """For people."""
    return f"{executor}, {world_size} rank{'s' if world_size > 1 else ''}"


def _checked(request: DemoRequest, config: Config, model: DemoFiles) -> Mapping[int, str]:
    """The switches, everything having been refused that can be; the folder of the files is there."""
    words = WordEncoder.from_folder(model.words, text_dim=config.model.text_dim, max_tokens=config.model.text_len)
    switches, faults = dict[int, str](), Faults()
    with faults:
        switches = parsed_switches(request.switches)
    with faults:
        if not 1 <= request.chunks <= config.video.horizon_chunks:
            raise RequestError(f"the demo model makes 1 to {config.video.horizon_chunks} chunks, not {request.chunks}")
        check_switches(switches, request.chunks)
    for prompt in (request.prompt, *switches.values()):
        with faults:
            words.encode(prompt)
    with faults:
        SeededNoise(request.seed)
    with faults:
        pyav()
    with faults:
        check_writable_in(request.out, (VIDEO_FILE, SHEET_FILE))
    faults.report()
    scale = _scale(config)
    check_picture(
        height=scale * config.video.pixel_height, width=scale * config.video.pixel_width, fps=config.video.fps
    )
    make_folder(request.out)
    return switches


def make_video(
    request: DemoRequest,
    switches: Mapping[int, str],
    bundle: Path,
    executor: str,
    *,
    device: str = "cpu",
    plugins: bool | None = None,
    on_progress: Progress,
    stage: str,
) -> Made:
    """Generate the video of a request.

    Args:
        request: what to show; its rows and folder are not looked at.
        switches: other prompts, by the chunk from which on they count.
        bundle: of the demo model.
        executor: of the ranks and of the decoder.
        device: `cpu` or `cuda`.
        plugins: see `load`.
        on_progress: told of (`stage`, chunks done, chunks in all).
        stage: what this is called.
    """
    on_progress(stage, 0, request.chunks)
    start = time.perf_counter()
    with load(
        bundle,
        executor=executor,
        vae_executor=executor,
        device=device,
        fused_ops=plugins,
        cuda_graphs=request.cuda_graphs,
        text_encoder=demo_files().words,
    ) as engine:
        ready = time.perf_counter()
        chunks, first_ms = [], 0.0
        with engine.session(request.prompt, seed=request.seed, num_chunks=request.chunks) as session:
            for index in range(request.chunks):
                if index in switches:
                    session.switch_prompt(switches[index])
                chunks.append(next(session))
                first_ms = first_ms or 1e3 * (time.perf_counter() - ready)
                on_progress(stage, index + 1, request.chunks)
        return Made(chunks=chunks, load_s=ready - start, first_ms=first_ms, total_s=time.perf_counter() - ready)


def compared(row: tuple[str, int], made: Made, wanted: Made) -> dict[str, Any]:
    """Compare a video with the one that it should equal.

    Args:
        row: executor and number of ranks.
        made: the video.
        wanted: what it should be.

    Returns:
        A row of `run_demo`, and `mean_grey_levels`.
    """
    executor, world_size = row
    latency = [chunk.latency_ms for chunk in made.chunks]
    pairs = list(zip(made.chunks, wanted.chunks, strict=True))
    levels = [(one.int() - other.int()).abs() for one, other in zip(made.frames, wanted.frames, strict=True)]
    return {
        "executor": executor,
        "world_size": world_size,
        "load_s": made.load_s,
        "first_frame_ms": made.first_ms,
        "chunk_ms": latency,
        "median_chunk_ms": statistics.median(latency),
        "frames_per_s": sum(map(len, made.frames)) / made.total_s,
        "latent_error": max(float((one.latents - other.latents).abs().max()) for one, other in pairs),
        "grey_levels": max(int(level.max()) for level in levels),
        "mean_grey_levels": statistics.mean(float(level.float().mean()) for level in levels),
    }


def _scale(config: Config) -> int:
    """How many pixels wide one of the model's is in the video."""
    return max(1, -(-LEAST_SIDE // max(config.video.pixel_height, config.video.pixel_width)))


def _write(
    request: DemoRequest,
    config: Config,
    switches: Mapping[int, str],
    made: Mapping[tuple[str, int], Made],
    rows: Sequence[Mapping[str, Any]],
) -> list[Path]:
    """Each file whole or not at all, in the place of an earlier demo's."""
    video, scale = config.video, _scale(config)
    shown = SHOWN if SHOWN in made else request.rows[-1]
    height, width = scale * video.pixel_height, scale * video.pixel_width
    with Mp4Writer(request.out / VIDEO_FILE, height=height, width=width, fps=video.fps) as writer:
        for frames in made[shown].frames:
            writer.write(enlarged(frames.numpy(), scale))
    said = [request.prompt, *switches.values()]
    starts = [f"seed {request.seed}", *(f"from chunk {chunk}" for chunk in switches)]
    title = "\n".join(f"{start}: {textwrap.shorten(text, 90)}" for start, text in zip(starts, said, strict=True))
    sheet = [_sheet_row(row, made[row["executor"], row["world_size"]], number) for number, row in enumerate(rows)]
    write_whole(request.out / SHEET_FILE, contact_sheet(title, sheet))
    return [request.out / VIDEO_FILE, request.out / SHEET_FILE]


def _sheet_row(row: Mapping[str, Any], made: Made, number: int) -> SheetRow:
    levels = row["grey_levels"]
    return SheetRow(
        name=row_name(row["executor"], row["world_size"]).replace(", ", "\n"),
        frames=made.frames,
        verdict=f"largest difference:\n{levels} of 255 grey levels" if number else "what the others\nare compared with",
        agrees=levels <= MOST_GREY_LEVELS if number else None,
    )
