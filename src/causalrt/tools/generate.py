"""`causalrt generate`: a video from a prompt, as a file, and how long its first frame took, cold and warm, by stage."""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from causalrt.config import Config
from causalrt.engines.bundle import open_bundle
from causalrt.engines.toolchain import toolchain_versions
from causalrt.engines.vae import check_has_vae
from causalrt.errors import Faults, RequestError
from causalrt.media.pyav import pyav
from causalrt.media.read import BACKGROUND, Part, read_frames
from causalrt.media.video_file import Mp4Writer, check_picture
from causalrt.progress import Progress
from causalrt.runtime.engine import Engine
from causalrt.runtime.load import check_rank_limits, load
from causalrt.runtime.noise import SeededNoise
from causalrt.runtime.requests import checked_chunks, checked_initial_latents
from causalrt.runtime.rollout import SwitchPolicy
from causalrt.runtime.session import Chunk, Session
from causalrt.runtime.stopwatch import process_age_s
from causalrt.tools.files import check_writable, read_latents, read_prompt_embeds, write_latents

LATENTS, VIDEO = ".safetensors", ".mp4"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to generate.

    Attributes:
        out: an MP4 file, or a safetensors file of latents; given frames are included.
        prompt: what to show, as text; with `text_encoder`.
        prompt_embeds: or a file of embeddings.
        text_encoder: folder of umT5, or of a table of words.
        text_device: where it computes.
        given: latents that the video begins with (safetensors), or an image or clip, which is encoded.
        given_part: whether a clip that leaves no room for `chunks` (one by default) gives its first or its last frames; with
            None such a clip is refused. Of a clip that is not whole chunks, None takes the last frames.
        background: colour behind an image or clip that is transparent.
        switches: `CHUNK=PROMPT`, other prompts from these chunks on, given as the first one is.
        switch_policy: what becomes of history then.
        seed: of the noise.
        chunks: how many; by default as many as the horizon holds.
        warm: afterwards begin a second video on the warm ranks, for the latency of its first frame.
        executor: as for `load`, like what follows.
        device: `cuda` or `cpu`.
        plugins: fused ops.
        cuda_graphs: capture steps.
        threads: of each rank, on a CPU.
        timeout_s: of a silent rank.
    """

    out: Path
    prompt: str | None = None
    prompt_embeds: Path | None = None
    text_encoder: Path | None = None
    text_device: str = "cpu"
    given: Path | None = None
    given_part: Part | None = None
    background: str = BACKGROUND
    switches: Sequence[str] = field(default=())
    switch_policy: SwitchPolicy = "keep"
    seed: int = 0
    chunks: int | None = None
    warm: bool = False
    executor: str | None = None
    device: str | None = None
    plugins: bool | None = None
    cuda_graphs: bool = True
    threads: int | None = None
    timeout_s: float | None = None


def generate(bundle: Path, request: Request, *, on_progress: Progress) -> dict[str, Any]:
    """Make the file; what is refused is refused before the ranks are started, and `out` appears whole or not at all.

    Returns:
        `out`, `shape` (of the latents, or of the frames), `executor`, `load_s` (ranks, decoder and text encoder), `text_s`,
        `first_frame` (`cold`, and `warm` if that was asked for: total and stages, ms; `first_latents` where there is no VAE),
        and for each of `chunks` where its time went.

    Raises:
        CausalRTError: of the type that fits; the message says what to do.
    """
    checked = _checked(bundle, request)
    config, given, prompt, switches = checked.config, checked.given, checked.prompt, checked.switches
    as_video, encodes = request.out.suffix == VIDEO, _is_picture(request.given)
    start = time.perf_counter()
    with load(
        bundle,
        executor=request.executor,
        device=request.device,
        fused_ops=request.plugins,
        cuda_graphs=request.cuda_graphs,
        vae=as_video or encodes,
        text_encoder=request.text_encoder,
        text_device=request.text_device,
        num_threads=request.threads,
        timeout_s=request.timeout_s,
    ) as engine:
        load_s = time.perf_counter() - start
        encoded, encode_ms = given, 0.0
        if given is not None and encodes:
            start = time.perf_counter()
            encoded = engine.encode_frames(given)
            encode_ms = 1e3 * (time.perf_counter() - start)
        with (
            engine.session(prompt, seed=request.seed, num_chunks=request.chunks, initial_latents=encoded) as session,
            _sink(request, config, session, encoded) as write,
        ):
            on_progress("chunks", 0, session.num_chunks)
            report = []
            for index in range(session.num_chunks):
                switch_ms = None
                if index in switches:
                    switch_ms = session.switch_prompt(switches[index], policy=request.switch_policy)
                chunk = next(session)
                if index == 0:
                    before = {"load": 1e3 * load_s, "text": session.text_ms, "given": encode_ms}
                    cold = _first(chunk, total_ms=1e3 * process_age_s(), before=before)
                start = time.perf_counter()
                shape = write(chunk)
                write_ms = 1e3 * (time.perf_counter() - start)
                report.append({**chunk_report(chunk), "switch_ms": switch_ms, "write_ms": write_ms})
                on_progress("chunks", chunk.index + 1, session.num_chunks)
        warm = _warm(engine, request, prompt, encoded) if request.warm else None
    return {
        "out": str(request.out),
        "shape": shape,
        "executor": engine.executor,
        "text_s": session.text_ms / 1e3,
        "load_s": load_s,
        "first_frame" if as_video else "first_latents": {"cold": cold, **({"warm": warm} if warm else {})},
        "first_chunk_ms": report[0]["latency_ms"],
        "chunks": report,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    config: Config
    prompt: str | torch.Tensor
    switches: Mapping[int, str | torch.Tensor]
    given: torch.Tensor | None


def _is_picture(given: Path | None) -> bool:
    return given is not None and given.suffix != LATENTS


def _checked(bundle: Path, request: Request) -> _Checked:
    """What is read for a request before anything is loaded; one error names everything that is wrong with it."""
    opened, given, prompt, switches, faults = None, None, None, dict[int, Any](), Faults()
    as_video, encodes = request.out.suffix == VIDEO, _is_picture(request.given)
    with faults:
        opened = open_bundle(bundle, verify=False)
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
        check_rank_limits(num_threads=request.threads, timeout_s=request.timeout_s)
    with faults:
        prompt, switches = _prompts(request)
    with faults:
        if as_video:
            pyav()
    if opened is not None:
        config = opened.config
        with faults:
            if as_video or encodes:
                check_has_vae(opened)
        with faults:
            if as_video:
                check_picture(height=config.video.pixel_height, width=config.video.pixel_width, fps=config.video.fps)
        with faults:
            num_given, given = 0, _read_given(request, config)
            if given is not None:
                num_given = (
                    config.video.chunks_in(_latents_of(given, config))
                    if encodes
                    else len(checked_initial_latents(config, given))
                )
            check_switches(switches, checked_chunks(config, request.chunks, num_given=num_given))
    faults.report()
    assert opened is not None
    assert prompt is not None
    return _Checked(config=opened.config, prompt=prompt, switches=switches, given=given)


def chunk_report(chunk: Chunk) -> dict[str, Any]:
    """Where a chunk's time went, for JSON."""
    return {
        "chunk": chunk.index,
        "latency_ms": chunk.latency_ms,
        "queue_ms": chunk.queue_ms,
        "denoise_ms": chunk.times.denoise_ms,
        "exchange_ms": chunk.times.exchange_ms,
        "gather_ms": chunk.times.gather_ms,
        "decode_ms": chunk.decode_ms,
        "hand_over_ms": chunk.hand_over_ms,
    }


def _first(chunk: Chunk, *, total_ms: float, before: Mapping[str, float]) -> dict[str, Any]:
    """The way to the first chunk, by stage; `other` is what has no name, the interpreter's start and imports when cold."""
    stages = dict(before) | {
        "queue": chunk.queue_ms,
        "denoise": sum(chunk.times.denoise_ms),
        "gather": chunk.times.gather_ms,
        "decode": chunk.decode_ms,
        "hand_over": chunk.hand_over_ms,
    }
    return {"total_ms": total_ms, "stages_ms": stages | {"other": max(0.0, total_ms - sum(stages.values()))}}


def _warm(engine: Engine, request: Request, prompt: str | torch.Tensor, given: torch.Tensor | None) -> dict[str, Any]:
    """The first frame of a second video: ranks, decoder and encoder are there, the prompt is encoded anew."""
    engine.wait()
    engine.forget_prompts()
    start = time.perf_counter()
    with engine.session(prompt, seed=(request.seed + 1) % 2**64, num_chunks=1, initial_latents=given) as session:
        chunk = next(session)
    return _first(chunk, total_ms=1e3 * (time.perf_counter() - start), before={"text": session.text_ms})


MOST_DIGITS = 9
"""Of a chunk's number."""


def parsed_switches(texts: Sequence[str]) -> dict[int, str]:
    """`CHUNK=PROMPT`, by chunk.

    Raises:
        RequestError: something else.
    """
    found = {}
    for text in texts:
        chunk, separator, prompt = text.partition("=")
        if not separator or not chunk.isdecimal() or len(chunk) > MOST_DIGITS:
            raise RequestError(f"--switch wants CHUNK=PROMPT, for example --switch '3=a fox runs', got {text[:200]!r}")
        if int(chunk) in found:
            raise RequestError(f"--switch names chunk {int(chunk)} more than once; leave one of its prompts out")
        found[int(chunk)] = prompt
    return found


def check_switches(switches: Iterable[int], num_chunks: int) -> None:
    """Refuse a chunk that there is not, or that has its prompt already.

    Raises:
        RequestError: there is one.
    """
    late = [chunk for chunk in switches if not 0 < chunk < num_chunks]
    if late:
        raise RequestError(
            f"--switch {late[0]}=...: chunks are 0 to {num_chunks - 1}, and the first has its prompt already"
        )


def _prompts(request: Request) -> tuple[str | torch.Tensor, dict[int, str | torch.Tensor]]:
    """The first prompt, and those that follow by chunk: texts, or embeddings read from files."""
    later = parsed_switches(request.switches)
    if request.prompt is None:
        if request.text_encoder is not None:
            raise RequestError("--text-encoder is for --prompt; leave it out, or give the prompt as text")
        assert request.prompt_embeds is not None
        embeds = read_prompt_embeds(request.prompt_embeds)
        return embeds, {chunk: read_prompt_embeds(Path(path)) for chunk, path in later.items()}
    if request.text_encoder is None:
        raise RequestError(
            "--prompt needs --text-encoder FOLDER: Wan's released folder, or one in the diffusers layout"
        )
    return request.prompt, dict(later)


def _read_given(request: Request, config: Config) -> torch.Tensor | None:
    """Latents, or the frames of an image or clip at the video's size, as many as make whole chunks."""
    path, video = request.given, config.video
    if path is None or path.suffix == LATENTS:
        return None if path is None else read_latents(path)
    num_chunks = checked_chunks(config, request.chunks or 1, num_given=1)
    is_endless = video.time_index == "relative"
    part, room = request.given_part or "last", video.horizon_frames
    if request.given_part and not is_endless:
        room = video.first_frame_of(video.horizon_chunks - num_chunks)
    frames = read_frames(
        path,
        height=video.pixel_height,
        width=video.pixel_width,
        max_frames=4 * room - 3,
        fps=video.fps,
        background=request.background,
        part=part,
    )
    num = _latents_of(frames, config)
    if num == 0:
        raise RequestError(
            f"{path} has {len(frames)} frame(s), and the bundle's chunks have {video.chunk_frames} latents, "
            f"{4 * video.chunk_frames - 3} frames for the first; give a longer clip"
        )
    if num == video.horizon_frames and not is_endless:
        raise RequestError(
            f"{path} is a clip that fills the bundle's horizon of {4 * num - 3} frames, {(4 * num - 3) / video.fps:.2f} s, so "
            "that nothing is left to generate; give a shorter clip, or `--given-part last` (or `first`) to take as much of it "
            "as leaves room for `--chunks`"
        )
    count = 4 * num - 3
    if count < len(frames):
        _log.warning("%s: of its %d frames the %s %d are given, which are whole chunks", path, len(frames), part, count)
    return frames[:count] if part == "first" else frames[-count:]


def _latents_of(frames: torch.Tensor, config: Config) -> int:
    """How many latents of a clip make whole chunks."""
    video = config.video
    return video.first_frame_of(video.chunks_in(1 + (len(frames) - 1) // 4))


@contextlib.contextmanager
def _sink(request: Request, config: Config, session: Session, given: torch.Tensor | None) -> Iterator[Any]:
    """What takes each chunk and says the shape of everything so far; the file is there when the block has ended well."""
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
        yield lambda chunk: encode(chunk.frames)
