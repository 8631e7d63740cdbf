"""`causalrt demo`: generate a video with the shipped model, several executors and numbers of ranks, and compare them.

    prompt -> a bundle for each number of ranks -> the same video from every row -> demo.mp4, contact-sheet.png, a table

Every row takes the usual path: files -> `build` -> `load` -> a session with frames. The other rows are compared with the first,
which is eager on one rank.
"""

import contextlib
import logging
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from causalrt.tools.arguments import DemoRequest
from causalrt.tools.contact_sheet import SheetRow, contact_sheet, enlarged
from causalrt.tools.files import check_writable_in, make_folder, write_whole
from causalrt.tools.generate import check_switches, parsed_switches
from causalrt.user_cache import kept_folder, remove_unused

logger = logging.getLogger(__name__)

MOST_KEPT_BUNDLES = 6
SHOWN = ("onnxruntime", 2)
"""The row whose frames become the video, if it was requested."""
MOST_GREY_LEVELS = 1
VIDEO_FILE, SHEET_FILE = "demo.mp4", "contact-sheet.png"
LEAST_SIDE = 384
"""Pixels of the longer side of the video: players blur smaller videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """The video of a row.

    Attributes:
        chunks: its chunks.
        load_s: seconds until the ranks were ready.
        first_ms: milliseconds from the prompt to the first frames.
        total_s: seconds from the prompt to the last frames.
    """

    chunks: list[Chunk]
    load_s: float
    first_ms: float
    total_s: float

    @property
    def frames(self) -> list[torch.Tensor]:
        """The frames of each chunk, uint8 `[T, h, w, 3]`."""
        return [chunk.frames for chunk in self.chunks if chunk.frames is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRow:
    """The video of an executor on a number of ranks, and its largest and mean difference from that of the first row."""

    executor: str
    world_size: int
    load_s: float
    first_frame_ms: float
    chunk_ms: Sequence[float]
    median_chunk_ms: float
    frames_per_s: float
    latent_error: float
    grey_levels: int
    mean_grey_levels: float

    @property
    def name(self) -> str:
        """The name that tables show."""
        return row_name(self.executor, self.world_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """The rows of the demo, and the files that it wrote; rows agree up to `most_grey_levels` of 255."""

    prompt: str
    rows: Sequence[DemoRow]
    most_grey_levels: int
    build_s: float
    total_s: float
    files: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether every row agrees with the first."""
        return all(row.grey_levels <= self.most_grey_levels for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"passed": self.passed}


def run_demo(request: DemoRequest, *, on_progress: Progress, on_stage: Callable[[str], None]) -> DemoResult:
    """Build, generate every row, compare, and write the files. A request that cannot work is refused before the build.

    Args:
        request: what to show.
        on_progress: called with (stage, done, total).
        on_stage: called with a sentence before each stage.

    Raises:
        PromptError: the model does not know a word.
        RequestError: the number of chunks, a switch or the seed is out of range, or the files cannot be written.
    """
    began = time.perf_counter()
    config, model = recipe("demo"), demo_files()
    switches = _checked(request, config, model)
    worlds = sorted({world_size for _, world_size in request.rows})
    with contextlib.ExitStack() as kept:
        on_stage(f"Preparing bundles of the demo model for {', '.join(map(str, worlds))} rank(s)")
        start = time.perf_counter()
        bundles = {}
        for done, world_size in enumerate(worlds):
            on_progress("bundles", done, len(worlds))
            bundles[world_size] = kept.enter_context(kept_demo_bundle(world_size=world_size))
        on_progress("bundles", len(worlds), len(worlds))
        build_s = time.perf_counter() - start
        on_stage(f"Generating {request.chunks} chunks: {request.prompt!r}")
        made = {
            (executor, world_size): make_video(
                request,
                switches,
                bundles[world_size],
                executor,
                on_progress=on_progress,
                stage=row_name(executor, world_size),
            )
            for executor, world_size in request.rows
        }
    rows = [compared(row, video, made[request.rows[0]]) for row, video in made.items()]
    files = _write(request, config, switches, made, rows)
    return DemoResult(
        prompt=request.prompt,
        rows=rows,
        most_grey_levels=MOST_GREY_LEVELS,
        build_s=build_s,
        total_s=time.perf_counter() - began,
        files=list(map(str, files)),
    )


def demo_bundle(out: Path, *, world_size: int = 2, on_progress: Progress | None = None) -> Path:
    """Build the demo model and its codec into a bundle for eager and onnxruntime."""
    model = demo_files()
    config = override(recipe("demo"), {"build.world_size": str(world_size)})
    return build(config, checkpoint=model.checkpoint, vae=model.codec, out=out, on_progress=on_progress)


@contextlib.contextmanager
def kept_demo_bundle(*, world_size: int = 2, on_progress: Progress | None = None) -> Iterator[Path]:
    """The demo's bundle in the user's cache, built first if it is missing or damaged.

    If no cache can be written, or another process uses the damaged bundle, the bundle is built in a temporary folder, which is
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


def row_name(executor: str, world_size: int) -> str:
    """The name of a row in tables and pictures."""
    return f"{executor}, {world_size} rank{'s' if world_size > 1 else ''}"


def _checked(request: DemoRequest, config: Config, model: DemoFiles) -> Mapping[int, str]:
    """Check the request, make the folder of the files, and return the switches."""
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
    fused_ops: bool | None = None,
    on_progress: Progress,
    stage: str,
) -> Made:
    """Generate the video of a request.

    Args:
        request: what to show; its rows and folder are ignored.
        switches: later prompts, by the chunk from which on they hold.
        bundle: a bundle of the demo model.
        executor: the executor of the ranks and of the decoder.
        device: `cpu` or `cuda`.
        fused_ops: whether to use the fused ops, see `load`.
        on_progress: called with (`stage`, chunks done, number of chunks).
        stage: the name of this video in progress reports.
    """
    on_progress(stage, 0, request.chunks)
    start = time.perf_counter()
    with load(
        bundle,
        executor=executor,
        vae_executor=executor,
        device=device,
        fused_ops=fused_ops,
        cuda_graphs=request.cuda_graphs == "on",
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


def compared(row: tuple[str, int], made: Made, wanted: Made) -> DemoRow:
    """Compare the video of a row, which is an executor and a number of ranks, with the video that it should equal."""
    executor, world_size = row
    latency = [chunk.latency_ms for chunk in made.chunks]
    pairs = list(zip(made.chunks, wanted.chunks, strict=True))
    levels = [(one.int() - other.int()).abs() for one, other in zip(made.frames, wanted.frames, strict=True)]
    return DemoRow(
        executor=executor,
        world_size=world_size,
        load_s=made.load_s,
        first_frame_ms=made.first_ms,
        chunk_ms=latency,
        median_chunk_ms=statistics.median(latency),
        frames_per_s=sum(map(len, made.frames)) / made.total_s,
        latent_error=max(float((one.latents - other.latents).abs().max()) for one, other in pairs),
        grey_levels=max(int(level.max()) for level in levels),
        mean_grey_levels=statistics.mean(float(level.float().mean()) for level in levels),
    )


def _scale(config: Config) -> int:
    """Factor by which the model's frames are enlarged in the video."""
    return max(1, -(-LEAST_SIDE // max(config.video.pixel_height, config.video.pixel_width)))


def _write(
    request: DemoRequest,
    config: Config,
    switches: Mapping[int, str],
    made: Mapping[tuple[str, int], Made],
    rows: Sequence[DemoRow],
) -> list[Path]:
    video, scale = config.video, _scale(config)
    shown = SHOWN if SHOWN in made else request.rows[-1]
    height, width = scale * video.pixel_height, scale * video.pixel_width
    with Mp4Writer(request.out / VIDEO_FILE, height=height, width=width, fps=video.fps) as writer:
        for frames in made[shown].frames:
            writer.write(enlarged(frames.numpy(), scale))
    said = [request.prompt, *switches.values()]
    starts = [f"seed {request.seed}", *(f"from chunk {chunk}" for chunk in switches)]
    title = "\n".join(f"{start}: {textwrap.shorten(text, 90)}" for start, text in zip(starts, said, strict=True))
    sheet = [_sheet_row(row, made[row.executor, row.world_size], number) for number, row in enumerate(rows)]
    write_whole(request.out / SHEET_FILE, contact_sheet(title, sheet))
    return [request.out / VIDEO_FILE, request.out / SHEET_FILE]


def _sheet_row(row: DemoRow, made: Made, number: int) -> SheetRow:
    levels = row.grey_levels
    return SheetRow(
        name=row.name.replace(", ", "\n"),
        frames=made.frames,
        verdict=f"largest difference:\n{levels} of 255 grey levels" if number else "the reference\nof the others",
        agrees=levels <= MOST_GREY_LEVELS if number else None,
    )
