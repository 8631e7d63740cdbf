"""`Engine`: a loaded bundle, and the sessions that generate video with it.

    engine = causalrt.load("bundle", text_encoder="Wan2.1-T2V-1.3B")
    with engine.session("a fox in the snow", seed=0) as session:
        for chunk in session:
            use(chunk.frames)                 # uint8 [T, 8H, 8W, 3], and chunk.latents [F, 16, H, W]

Commands from several sessions (or threads) take turns by chunk, first come, first served. The context pass of a chunk runs on
the ranks while the chunk is decoded and used, and the next command waits for it.

An interrupt (Ctrl-C) during a call is raised when the call is complete, so the engine stays usable. A second interrupt is
raised at once and ends the engine.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from causalrt.engines.bundle import VAE_WEIGHTS, Bundle
from causalrt.errors import CapacityError, PromptError, RequestError
from causalrt.model.text.protocol import PromptEncoder
from causalrt.runtime.canary import ExchangeCheck
from causalrt.runtime.memory import DecoderMemory, MemoryEstimate
from causalrt.runtime.messages import (
    CheckExchangesCommand,
    InitialChunkCommand,
    ResumeCommand,
    UsageCommand,
)
from causalrt.runtime.noise import Noise, SeededNoise, checked_noise
from causalrt.runtime.requests import Embeddings, checked_chunks, checked_initial_latents, checked_text
from causalrt.runtime.session import Session
from causalrt.runtime.snapshot import read_session
from causalrt.runtime.usage import Usage
from causalrt.runtime.vae_decoder import VaeDecoder
from causalrt.runtime.workers import Workers


class Engine:
    """A loaded bundle; created by `load`, ended by `close` or a `with` block.

    An engine belongs to the process that loaded it. In a forked process, every method of the engine and of its sessions raises
    a ForkError, except those that end something (`close`, the end of a `with` block, `cancel`), which do nothing.

    Attributes:
        bundle: the bundle that was loaded.
        config: the bundle's configuration.
        executor: name of the executor that runs the step.
        device: `cpu` or `cuda`.
        num_threads: CPU threads of each rank.
        memory: predicted memory of a rank with one session.
        decoder_memory: predicted memory of the decoder, or None without one.
        max_sessions: number of sessions that may be open at once.
        workers: the rank processes and the decoder process.
        makes_ahead: whether sessions generate a chunk ahead by default, which they do if the decoder has a GPU of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: str,
        *,
        device: str,
        num_threads: int,
        memory: MemoryEstimate,
        decoder_memory: DecoderMemory | None,
        max_sessions: int,
        makes_ahead: bool,
        workers: Workers,
        text_encoder: PromptEncoder | None,
    ) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.executor = executor
        self.device = device
        self.num_threads = num_threads
        self.memory, self.decoder_memory = memory, decoder_memory
        self.max_sessions = max_sessions
        self.makes_ahead = makes_ahead
        self.workers = workers
        self._text_encoder = text_encoder

    @property
    def decoder(self) -> VaeDecoder | None:
        """The process that makes frames of latents, or None."""
        return self.workers.decoder

    @property
    def has_vae(self) -> bool:
        """Whether chunks have frames."""
        return self.decoder is not None

    @property
    def open_sessions(self) -> int:
        """Number of open sessions, without those that were garbage collected."""
        return self.workers.open_sessions

    @property
    def rank_pids(self) -> list[int]:
        """Process numbers of the ranks."""
        return self.workers.ranks.pids

    def dead_processes(self) -> list[str]:
        """Names of the engine's processes that are known to have ended, such as `rank 3` or `the decoder`.

        The list is empty while all processes live, even if they are slow or hang. This method opens no file, and may be called
        from any thread, also after `close`.

        Raises:
            ForkError: the engine was loaded by another process, from which this one was forked.
        """
        self.check_owner()
        return self.workers.dead_processes()

    def silent_s(self) -> float:
        """Seconds since the ranks or the decoder last sent something while they owe an answer; 0.0 if they owe none.

        This method never waits and may be called from any thread.
        """
        return self.workers.silent_s()

    def encode_prompt(self, prompt: str | Embeddings) -> tuple[torch.Tensor, float]:
        """Encode or check a prompt; returns its embeddings `[text_len, text_dim]` and the milliseconds that encoding took.

        Raises:
            PromptError: text without a text encoder, or too long; embeddings of wrong shape, type or values.
        """
        self.check_owner()
        if not isinstance(prompt, str):
            return checked_text(self.config, prompt), 0.0
        if self._text_encoder is None:
            raise PromptError(
                "the prompt is text, and the engine has no text encoder; load it with text_encoder=FOLDER"
            )
        start = time.perf_counter()
        embeds = self._text_encoder.encode(prompt)
        return checked_text(self.config, embeds), 1e3 * (time.perf_counter() - start)

    def forget_prompts(self) -> None:
        """Empty the cache of encoded prompts; for measurements."""
        self.check_owner()
        if self._text_encoder is not None:
            self._text_encoder.forget_prompts()

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode frames to latents `[1 + k, 16, H, W]`, with which a session can begin (`initial_latents`).

        Args:
            frames: an image or a clip of 1 + 4k frames, uint8 `[T, 8H, 8W, 3]` of the bundle's size and at most its
                horizon.

        Raises:
            RequestError: wrong shape, type, number of frames, or values; or the engine has no VAE.
            CapacityError: the decoder has too little memory for them.
            RankError: the decoder's process died, hung or raised.
        """
        self.check_owner()
        if self.decoder is None:
            raise RequestError(
                "frames are encoded by the VAE, and the engine has none; build the bundle with `--vae FILE`"
            )
        video = self.config.video
        size, most = (video.pixel_height, video.pixel_width, 3), video.codec.frames_of(video.horizon_frames)
        shape = tuple(getattr(frames, "shape", ()))
        fits = shape[1:] == size and shape[0] <= most and video.codec.fills_latents(shape[0])
        if not fits or getattr(frames, "dtype", None) != torch.uint8:
            raise RequestError(
                f"frames to encode must be uint8 [T, {', '.join(map(str, size))}] with T = 1, 5, 9 ... at most {most}, got "
                f"{getattr(frames, 'dtype', type(frames).__name__)} {list(shape)}; scale or cut them"
            )
        return self.workers.encode(frames.cpu().clone())

    def session(
        self,
        prompt: str | Embeddings,
        *,
        seed: int = 0,
        num_chunks: int | None = None,
        initial_latents: torch.Tensor | None = None,
        noise: torch.Tensor | Sequence[torch.Tensor] | None = None,
        ahead: bool | None = None,
        record: bool = False,
    ) -> Session:
        """Begin a rollout.

        Args:
            prompt: text, if the engine has a text encoder, or embeddings `[rows, text_dim]` with rows <= text_len; missing
                rows are zero, as in the reference.
            seed: seed of the noise; the same seed gives the same video on any number of ranks.
            num_chunks: chunks to generate; by default as many as the horizon holds beside the initial latents; with
                `video.time_index=relative` any number is possible.
            initial_latents: `[G, 16, H, W]`, clean latents that the video begins with (an encoded clip, or the end of an
                earlier video), in whole chunks, the first of which is one frame with `independent_first_frame`; they are not
                among the chunks that the session yields.
            noise: token rows `[steps, N, 64]` for each chunk, to use instead of noise from the seed; a single tensor if all
                chunks have the same length.
            ahead: generate the next chunk while one is decoded and used, so that decoding does not lower the frame rate; a
                prompt switch then acts one chunk later. The default is true if the decoder has a GPU of its own.
            record: keep the flow and x0 of every forward in `Session.records`.

        Raises:
            CapacityError: there is no room for another session; open sessions are not affected.
            PromptError: text that cannot be encoded, wrong shape or type, or values that are not finite.
            RequestError: more chunks than the bundle can make (`checked_chunks`), or initial latents or noise of a wrong shape.
            ForkError: the engine was loaded by another process, from which this one was forked.
        """
        self.check_owner()
        initial = checked_initial_latents(self.config, initial_latents)
        chunks = checked_chunks(self.config, num_chunks, num_given=len(initial))
        source: Noise = SeededNoise(seed)
        if noise is not None:
            source = checked_noise(self.config, noise, num_chunks=chunks, num_given=len(initial))
        text, text_ms = self.encode_prompt(prompt)
        with contextlib.ExitStack() as if_opening_fails:
            with self.workers.deferred_interrupts():
                with self.workers.conversation():
                    session = self._open(
                        text,
                        source,
                        num_chunks=chunks,
                        num_given=len(initial),
                        ahead=ahead,
                        text_ms=text_ms,
                        record=record,
                    )
                    if_opening_fails.callback(session.abandon)
                    for rows in initial:
                        command = InitialChunkCommand(session=session.number, rows=rows.clone(), record=record)
                        session.take_initial(self.workers.run(command))
                if initial_latents is not None and self.decoder is not None:
                    latents = initial_latents.detach().to("cpu", torch.float32, copy=True)
                    session.initial_frames = self.workers.decode(session.number, latents).frames
            if_opening_fails.pop_all()
        return session

    def resume(self, folder: str | Path, *, num_chunks: int | None = None, ahead: bool | None = None) -> Session:
        """Continue a session from a snapshot that `Session.snapshot` has written.

        Args:
            folder: folder of the snapshot; it is not changed.
            num_chunks: chunks of the whole session, including those before the snapshot; by default as the session was begun.
            ahead: as for `session`.

        Raises:
            CapacityError: there is no room for another session.
            RequestError: the folder is no snapshot, is damaged, belongs to another checkpoint, VAE or config, or lacks the
            decoder's
                state; or `num_chunks` is too small or too large.
        """
        self.check_owner()
        folder = Path(folder).absolute()
        record, text, rows, files = read_session(folder, self.bundle)
        if self.decoder is not None and record.vae != self.bundle.hashes[VAE_WEIGHTS]:
            why = "without frames" if record.vae is None else "with another VAE"
            raise RequestError(f"{folder} was made {why}; load the engine with vae=False to resume it")
        wanted = checked_chunks(
            self.config, record.num_chunks if num_chunks is None else num_chunks, num_given=record.num_given
        )
        if wanted <= record.next_chunk:
            raise RequestError(
                f"the session has {record.next_chunk} chunks already; resume it with a larger num_chunks"
            )
        decoded = record.num_given + record.next_chunk
        made = decoded + (rows is not None)  # the ranks are ahead of the decoder then
        decoder_frame, frame = (self.config.video.first_frame_of(chunk) for chunk in (decoded, made))
        with contextlib.ExitStack() as if_opening_fails:
            with self.workers.deferred_interrupts(), self.workers.conversation():
                session = self._open(
                    text, SeededNoise(record.seed), num_chunks=wanted, num_given=record.num_given, ahead=ahead
                )
                if_opening_fails.callback(session.abandon)
                session.begin_at(record.next_chunk, rows)
                try:
                    self.workers.run(ResumeCommand(session=session.number, folder=folder, frame=frame, files=files))
                    if self.decoder is not None:
                        self.decoder.resume(session.number, folder, frame=decoder_frame, files=files)
                except (CapacityError, RequestError):
                    self.workers.close_session(session.number)
                    raise
            if_opening_fails.pop_all()
        return session

    def _open(
        self,
        text: torch.Tensor,
        noise: Noise,
        *,
        num_chunks: int,
        num_given: int,
        ahead: bool | None,
        text_ms: float = 0.0,
        record: bool = False,
    ) -> Session:
        return Session(
            self.workers.open_session(text=text, noise=noise, max_sessions=self.max_sessions),
            workers=self.workers,
            bundle=self.bundle,
            encode_prompt=self.encode_prompt,
            text=text,
            noise=noise,
            num_chunks=num_chunks,
            num_given=num_given,
            ahead=self.makes_ahead if ahead is None else ahead,
            text_ms=text_ms,
            record=record,
        )

    @property
    def is_ours(self) -> bool:
        """Whether this process loaded the engine, rather than one that it was forked from."""
        return self.workers.is_ours

    def check_owner(self) -> None:
        """Raise ForkError in a process that was forked from the one that loaded the engine."""
        self.workers.check_owner()

    def wait(self) -> None:
        """Wait until the ranks are idle, and the `times` of the last chunk's session are complete."""
        with self.workers.conversation():
            pass

    def usage(self, *, count_waits: bool = False) -> list[Usage]:
        """What each rank has used of its device so far; for measurements.

        Args:
            count_waits: count how often the host waits for the device, until this method is called again.
        """
        with self.workers.conversation():
            answers = self.workers.run_all(UsageCommand(count_waits=count_waits))
        return [answer.usage or Usage() for answer in answers]

    def check_exchanges(self) -> list[ExchangeCheck]:
        """Test the exchanges between the ranks with a known pattern (`runtime/canary.py`).

        Returns:
            What each rank found in each kind of exchange; nothing on one rank.

        Raises:
            RankError: a rank died, hung or raised.
        """
        with self.workers.conversation():
            answers = self.workers.run_all(CheckExchangesCommand())
        return [check for answer in answers for check in answer.exchanges]

    def close(self) -> None:
        """End the processes and free their memory. Calling it again, or in a forked process, has no effect.

        A thread that is waiting for a chunk gets an `EngineClosedError`.
        """
        if self.is_ours:
            self.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
