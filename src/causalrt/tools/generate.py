"""`causalrt generate`: generate a video file from a prompt, and measure the first frame by stage, cold and warm."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from causalrt.config import Config
from causalrt.engines.bundle import open_bundle
from causalrt.engines.toolchain import toolchain_versions
from causalrt.engines.vae import check_has_vae
from causalrt.errors import Faults, RequestError
from causalrt.media.pyav import pyav
from causalrt.media.read import read_frames
from causalrt.media.video_file import Mp4Writer, check_picture
from causalrt.progress import Progress
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import check_rank_limits, load
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.requests import checked_chunks, checked_initial_latents
from causalrt.runtime.session import Chunk, Session
from causalrt.runtime.stopwatch import process_age_s
from causalrt.tools.arguments import GenerateRequest
from causalrt.tools.files import check_writable, read_latents, read_prompt_embeds, write_latents

LATENTS, VIDEO = ".safetensors", ".mp4"
LONGEST_CHUNK_NUMBER = 9
"""Digits of the number of a chunk in `--switch`."""
_log = logging.getLogger(__name__)
Prompt = str | torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstFrame:
    """The time that the first chunk took.

    Attributes:
        total_ms: milliseconds from the start of the process (cold) or from the request (warm).
        stages_ms: milliseconds of each stage; `other` is the rest, which is the interpreter's start and imports when cold.
    """

    total_ms: float
    stages_ms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkReport:
    """The times of a chunk by stage, in milliseconds; `switch_ms` is None where the prompt stayed the same."""

    chunk: int
    latency_ms: float
    queue_ms: float
    denoise_ms: Sequence[float]
    exchange_ms: float | None
    gather_ms: float
    decode_ms: float
    hand_over_ms: float
    switch_ms: float | None
    write_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateReport:
    """The generated file, and how long it took.

    Attributes:
        out: path of the file.
        unit: what the file holds, `frames` or `latents`.
        shape: shape of all contents together.
        executor: the executor that the ranks used.
        text_s: seconds that encoding the first prompt took.
        load_s: seconds until ranks, decoder and text encoder were ready.
        first: the first chunk, `cold` and, if it was requested, `warm`.
        chunks: a report for each chunk.
    """

    out: str
    unit: str
    shape: Sequence[int]
    executor: str
    text_s: float
    load_s: float
    first: Mapping[str, FirstFrame]
    chunks: Sequence[ChunkReport]

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON types, with `first` as `first_frame` or `first_latents`."""
        found = asdict(self)
        found["first_frame" if found.pop("unit") == "frames" else "first_latents"] = found.pop("first")
        return found | {"first_chunk_ms": self.chunks[0].latency_ms}


def generate(request: GenerateRequest, *, on_progress: Progress) -> GenerateReport:
    """Generate the file of a request. A request that cannot work is refused before the ranks are started.

    Raises:
        CausalRTError: a subclass that fits, with a message that says what to do; no part of the file is left behind.
    """
    checked = _checked(request)
    as_video, encodes = request.out.suffix == VIDEO, _is_picture(request.given)
    start = time.perf_counter()
    with load(
        request.bundle,
        executor=request.executor,
        device=request.device,
        fused_ops=None if request.fused_ops is None else request.fused_ops == "on",
        cuda_graphs=request.cuda_graphs == "on",
        vae=as_video or encodes,
        text_encoder=request.text_encoder,
        text_device=request.text_device,
        num_threads=request.threads,
        timeout_s=request.timeout,
    ) as engine:
        before = {"load": 1e3 * (time.perf_counter() - start)}
        given, start = checked.given, time.perf_counter()
        if given is not None and encodes:
            given = engine.encode_frames(given)
        encode_ms = 1e3 * (time.perf_counter() - start)
        with (
            engine.session(
                checked.prompt, seed=request.seed, num_chunks=request.chunks, initial_latents=given
            ) as session,
            _sink(request, checked.config, session, given) as write,
        ):
            before |= {"text": session.text_ms, "given": encode_ms}
            cold, shape, chunks = _run(session, request, checked.switches, write, before, on_progress)
        first = {"cold": cold}
        if request.warm:
            first["warm"] = _warm(engine, request, checked.prompt, given)
    return GenerateReport(
        out=str(request.out),
        unit="frames" if as_video else "latents",
        shape=shape,
        executor=engine.executor,
        text_s=session.text_ms / 1e3,
        load_s=before["load"] / 1e3,
        first=first,
        chunks=chunks,
    )


def _run(
    session: Session,
    request: GenerateRequest,
    switches: Mapping[int, Prompt],
    write: Callable[[Chunk], list[int]],
    before: Mapping[str, float],
    on_progress: Progress,
) -> tuple[FirstFrame, list[int], list[ChunkReport]]:
    """Generate and write every chunk; return the time of the first, the shape of the file's contents, and the reports."""
    reports = []
    on_progress("chunks", 0, session.num_chunks)
    for index in range(session.num_chunks):
        switch_ms = None
        if index in switches:
            switch_ms = session.switch_prompt(switches[index], policy=request.switch_policy)
        chunk = next(session)
        if index == 0:
            cold = _first_frame(chunk, total_ms=1e3 * process_age_s(), before=before)
        start = time.perf_counter()
        shape = write(chunk)
        reports.append(_chunk_report(chunk, switch_ms=switch_ms, write_ms=1e3 * (time.perf_counter() - start)))
        on_progress("chunks", chunk.index + 1, session.num_chunks)
    return cold, shape, reports


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    config: Config
    prompt: Prompt
    switches: Mapping[int, Prompt]
    given: torch.Tensor | None


def _is_picture(given: Path | None) -> bool:
    return given is not None and given.suffix != LATENTS


def _checked(request: GenerateRequest) -> _Checked:
    """Read what a request names before anything is loaded; one error lists everything that is wrong with it."""
    opened, given, prompt, faults = None, None, None, Faults()
    switches: Mapping[int, Prompt] = {}
    as_video = request.out.suffix == VIDEO
    with faults:
        opened = open_bundle(request.bundle, verify=False)
    with faults:
        if request.out.suffix not in (LATENTS, VIDEO):
            raise RequestError(
                f"--out must end in {VIDEO} for a video or {LATENTS} for latents, got {request.out.name}"
            )
    with faults:
        check_writable(request.out)
    with faults:
        SeededNoise(request.seed)
    with faults:
        check_rank_limits(num_threads=request.threads, timeout_s=request.timeout)
    with faults:
        prompt, switches = _prompts(request)
    with faults:
        if as_video:
            pyav()
    if opened is not None:
        video = opened.config.video
        with faults:
            if as_video or _is_picture(request.given):
                check_has_vae(opened)
        with faults:
            if as_video:
                check_picture(height=video.pixel_height, width=video.pixel_width, fps=video.fps)
        with faults:
            given, num_given = _read_given(request, opened.config)
            check_switches(switches, checked_chunks(opened.config, request.chunks, num_given=num_given))
    faults.report()
    assert opened is not None
    assert prompt is not None
    return _Checked(config=opened.config, prompt=prompt, switches=switches, given=given)


def _chunk_report(chunk: Chunk, *, switch_ms: float | None, write_ms: float) -> ChunkReport:
    return ChunkReport(
        chunk=chunk.index,
        latency_ms=chunk.latency_ms,
        queue_ms=chunk.queue_ms,
        denoise_ms=chunk.times.denoise_ms,
        exchange_ms=chunk.times.exchange_ms,
        gather_ms=chunk.times.gather_ms,
        decode_ms=chunk.decode_ms,
        hand_over_ms=chunk.hand_over_ms,
        switch_ms=switch_ms,
        write_ms=write_ms,
    )


def _first_frame(chunk: Chunk, *, total_ms: float, before: Mapping[str, float]) -> FirstFrame:
    stages = {
        **before,
        "queue": chunk.queue_ms,
        "denoise": sum(chunk.times.denoise_ms),
        "gather": chunk.times.gather_ms,
        "decode": chunk.decode_ms,
        "hand_over": chunk.hand_over_ms,
    }
    return FirstFrame(total_ms=total_ms, stages_ms=stages | {"other": max(0.0, total_ms - sum(stages.values()))})


def _warm(engine: Engine, request: GenerateRequest, prompt: Prompt, given: torch.Tensor | None) -> FirstFrame:
    """Time the first frame of a second video on loaded ranks, decoder and encoder; the prompt is encoded again."""
    engine.wait()
    engine.forget_prompts()
    start = time.perf_counter()
    with engine.session(prompt, seed=(request.seed + 1) % 2**64, num_chunks=1, initial_latents=given) as session:
        chunk = next(session)
    return _first_frame(chunk, total_ms=1e3 * (time.perf_counter() - start), before={"text": session.text_ms})


def parsed_switches(texts: Sequence[str]) -> dict[int, str]:
    """Parse `CHUNK=PROMPT` into prompts by chunk.

    Raises:
        RequestError: a text has another form, or a chunk occurs twice.
    """
    found = {}
    for text in texts:
        chunk, separator, prompt = text.partition("=")
        if not separator or not chunk.isdecimal() or len(chunk) > LONGEST_CHUNK_NUMBER:
            raise RequestError(f"--switch wants CHUNK=PROMPT, for example --switch '3=a fox runs', got {text[:200]!r}")
        if int(chunk) in found:
            raise RequestError(f"--switch names chunk {int(chunk)} more than once; leave one of its prompts out")
        found[int(chunk)] = prompt
    return found


def check_switches(switches: Iterable[int], num_chunks: int) -> None:
    """Refuse to switch the prompt at chunk 0, or at a chunk that the video does not have.

    Raises:
        RequestError: there is such a switch.
    """
    wrong = [chunk for chunk in switches if not 0 < chunk < num_chunks]
    if wrong:
        raise RequestError(
            f"--switch {wrong[0]}=...: chunks are 0 to {num_chunks - 1}, and the first has its prompt already"
        )


def _prompts(request: GenerateRequest) -> tuple[Prompt, dict[int, Prompt]]:
    """The first prompt and the later ones by chunk, as texts or as embeddings read from files."""
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise RequestError("give the prompt as text with --prompt, or as a file with --prompt-embeds; one of the two")
    later = parsed_switches(request.switches)
    if request.prompt_embeds is not None:
        if request.text_encoder is not None:
            raise RequestError("--text-encoder is for --prompt; leave it out, or give the prompt as text")
        embeds = read_prompt_embeds(request.prompt_embeds)
        return embeds, {chunk: read_prompt_embeds(Path(path)) for chunk, path in later.items()}
    assert request.prompt is not None
    if request.text_encoder is None:
        raise RequestError(
            "--prompt needs --text-encoder FOLDER: Wan's released folder, or one in the diffusers layout"
        )
    return request.prompt, dict(later)


def _read_given(request: GenerateRequest, config: Config) -> tuple[torch.Tensor | None, int]:
    """Read the initial latents, or frames to be encoded to them, and return them with their number of chunks."""
    if request.given is None:
        return None, 0
    if not _is_picture(request.given):
        latents = read_latents(request.given)
        return latents, len(checked_initial_latents(config, latents))
    frames = _read_clip(request, request.given, config)
    return frames, config.video.chunks_in(_whole_latents(frames, config))


def _read_clip(request: GenerateRequest, path: Path, config: Config) -> torch.Tensor:
    """The frames of an image or a clip at the size of the video, as many as make whole chunks."""
    video, part = config.video, request.given_part or "last"
    num_chunks = checked_chunks(config, request.chunks or 1, num_given=1)
    has_end = video.time_index != "relative"
    room = video.horizon_frames
    if request.given_part and has_end:
        room = video.first_frame_of(video.horizon_chunks - num_chunks)
    frames = read_frames(
        path,
        height=video.pixel_height,
        width=video.pixel_width,
        max_frames=video.codec.frames_of(room),
        fps=video.fps,
        background=request.background,
        part=part,
    )
    latents = _whole_latents(frames, config)
    if latents == 0:
        raise RequestError(
            f"{path} has {len(frames)} frame(s), and the bundle's chunks have {video.chunk_frames} latents, "
            f"{video.codec.frames_of(video.chunk_frames)} frames for the first; give a longer clip"
        )
    count = video.codec.frames_of(latents)
    if latents == video.horizon_frames and has_end:
        raise RequestError(
            f"{path} is a clip that fills the bundle's horizon of {count} frames, {count / video.fps:.2f} s, so that nothing "
            "is left to generate; give a shorter clip, or `--given-part last` (or `first`) to take as much of it as leaves "
            "room for `--chunks`"
        )
    if count < len(frames):
        _log.warning("%s: of its %d frames the %s %d are given, which are whole chunks", path, len(frames), part, count)
    return frames[:count] if part == "first" else frames[-count:]


def _whole_latents(frames: torch.Tensor, config: Config) -> int:
    """How many latents the whole chunks at the beginning of a clip have."""
    video = config.video
    return video.first_frame_of(video.chunks_in(video.codec.whole_latents(len(frames))))


@contextlib.contextmanager
def _sink(
    request: GenerateRequest, config: Config, session: Session, given: torch.Tensor | None
) -> Iterator[Callable[[Chunk], list[int]]]:
    """A function that takes each chunk and returns the shape of all so far; the file appears when the block ends well."""
    if request.out.suffix == LATENTS:
        latents = [] if given is None else [given.float()]

        def collect(chunk: Chunk) -> list[int]:
            latents.append(chunk.latents)
            return [sum(map(len, latents)), *chunk.latents.shape[1:]]

        yield collect
        metadata = {"seed": str(request.seed), "causalrt": toolchain_versions().get("causalrt", "unknown")}
        write_latents(request.out, torch.cat(latents), metadata)
        return
    video = config.video
    written = 0
    with Mp4Writer(request.out, height=video.pixel_height, width=video.pixel_width, fps=video.fps) as writer:

        def encode(frames: torch.Tensor) -> list[int]:
            nonlocal written
            writer.write(frames)
            written += len(frames)
            return [written, *frames.shape[1:]]

        if session.initial_frames is not None:
            encode(session.initial_frames)
        yield lambda chunk: [] if chunk.frames is None else encode(chunk.frames)
