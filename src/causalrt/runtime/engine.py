"""`Engine`: a bundle on its ranks, and the sessions that generate from it.

    engine = causalrt.load("bundle", text_encoder="Wan2.1-T2V-1.3B")
    with engine.session("a fox in the snow", seed=0) as session:
        for chunk in session:
            use(chunk.frames)                 # uint8 [T, 8H, 8W, 3], and chunk.latents [F, 16, H, W]

Commands from several sessions (or threads) take turns by chunk, first come, first served. The refresh of a chunk runs on the
ranks while it is decoded and used; whoever commands next waits for it.

An interrupt (Ctrl-C) during a call is raised when the call has done its work, so the engine stays usable; a second one is
raised at once, and ends the engine.
"""

import contextlib
import itertools
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from causalrt.config import Config
from causalrt.control_groups import available_cpus
from causalrt.engines.bundle import VAE_WEIGHTS, Bundle, unchanged
from causalrt.engines.kinds import executor_kind, warms_up
from causalrt.errors import CapacityError, PromptError, RequestError
from causalrt.model.text.words import WORDS_FILE, WordEncoder
from causalrt.runtime import interrupts
from causalrt.runtime.canary import ExchangeCheck
from causalrt.runtime.fair_lock import FairLock
from causalrt.runtime.memory import (
    UNLIMITED,
    check_memory,
    decoder_memory,
    device_sessions,
    rank_memory,
)
from causalrt.runtime.messages import (
    CheckExchangesCommand,
    CloseCommand,
    Command,
    Done,
    GivenCommand,
    LoadCommand,
    LoadVaeCommand,
    OpenCommand,
    Refused,
    Reply,
    ResumeCommand,
    UsageCommand,
)
from causalrt.runtime.noise import Noise, SeededNoise, checked_noise
from causalrt.runtime.ranks import START_S, WARM_START_S, RankPool
from causalrt.runtime.requests import Embeddings, checked_chunks, checked_given, checked_text
from causalrt.runtime.session import Session
from causalrt.runtime.snapshot import read_session
from causalrt.runtime.usage import Usage
from causalrt.runtime.vae_decoder import Decoded, VaeDecoder

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from causalrt.model.text.umt5 import TextEncoder


def open_text_encoder(folder: Path, device: str, config: Config) -> "TextEncoder | WordEncoder":
    """The text encoder in a folder, for the prompts of a model: a table of words where there is one, or else umT5.

    Raises:
        CheckpointError: it cannot be read, or is not the model's.
        ConfigError, ExecutorError: umT5 cannot compute on `device`, or lacks a library; a table of words needs neither.
    """
    model = config.model
    if (folder / WORDS_FILE).is_file():
        return WordEncoder.from_folder(folder, text_dim=model.text_dim, max_tokens=model.text_len)
    from causalrt.model.text.umt5 import TextEncoder

    return TextEncoder.from_folder(folder, device=device, text_dim=model.text_dim, max_tokens=model.text_len)


class Engine:
    """A loaded bundle; made by `load`, ended by `close` or a `with` block.

    An engine belongs to the process that loaded it. In a process that is forked from that one, every method of the engine
    and its sessions raises a ForkError, except those that end something (`close`, the end of a `with` block, `cancel`): they
    do nothing, so that they do not hide another error.

    Attributes:
        bundle: what it runs.
        config: the bundle's.
        executor: what runs the step.
        device: `cpu` or `cuda`.
        num_threads: CPU threads of each rank.
        memory: bytes predicted for a rank with one session.
        decoder_memory: likewise for the decoder, if there is one.
        decoder: what makes frames of latents, in a process of its own.
        max_sessions: how many may be open at once.
        makes_ahead: sessions make a chunk ahead unless they are told otherwise: the decoder has a GPU of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: str,
        *,
        device: str,
        plugins: bool,
        cuda_graphs: bool,
        decoder_executor: str | None,
        text_encoder: Path | None,
        text_device: str,
        max_sessions: int | None,
        num_threads: int | None,
        timeout_s: float,
    ) -> None:
        self.bundle = bundle
        self.config = bundle.config
        self.executor = executor
        self.device = device
        world_size = bundle.config.build.world_size
        cores = available_cpus()
        self.num_threads = num_threads or max(1, cores // world_size)
        self.memory = rank_memory(bundle, executor, device=device)
        self.decoder_memory = decoder_memory(bundle, decoder_executor) if decoder_executor else None
        fitting = UNLIMITED
        if device == "cpu":
            shared_weights = not executor_kind(executor).compiled
            fitting = check_memory(
                self.memory, ranks=world_size, shared_weights=shared_weights, decoder=self.decoder_memory
            )
        self._start_s = WARM_START_S if warms_up(executor, device) else START_S
        self._lock = FairLock(interruptible=True)
        self._numbers = itertools.count()
        self._open: set[int] = set()
        self._dropped: deque[int] = deque()
        self._unfinished: tuple[Session, Iterator[tuple[int, Reply]]] | None = None
        self._text_encoder: TextEncoder | WordEncoder | None = None
        if text_encoder is not None and text_device != "cpu":  # before the ranks look at what is free
            self._text_encoder = open_text_encoder(text_encoder, text_device, bundle.config)
        self.decoder: VaeDecoder | None = None
        own_gpu = device == "cuda" and torch.cuda.device_count() > world_size
        self.makes_ahead = decoder_executor is not None and own_gpu
        with contextlib.ExitStack() as if_loading_fails:
            with interrupts.deferred():
                self._pool = RankPool(world_size, timeout_s=timeout_s)
                self._finalizer = weakref.finalize(self, self._pool.close, kill=True)
                if_loading_fails.callback(self._finalizer)
                if decoder_executor:
                    self.decoder = VaeDecoder(timeout_s=timeout_s)
                    if_loading_fails.callback(weakref.finalize(self, self.decoder.end))
            with unchanged(bundle):
                if self.decoder is not None:
                    assert decoder_executor is not None
                    self.decoder.start(
                        LoadVaeCommand(
                            bundle=bundle.path,
                            digest=bundle.digest,
                            executor=decoder_executor,
                            device=f"cuda:{world_size if own_gpu else 0}" if device == "cuda" else "cpu",
                            num_threads=num_threads or cores,
                        )
                    )
                self._pool.send(
                    LoadCommand(
                        bundle=bundle.path,
                        digest=bundle.digest,
                        executor=executor,
                        device=device,
                        plugins=plugins,
                        cuda_graphs=cuda_graphs,
                        num_threads=self.num_threads,
                        timeout_s=max(timeout_s, self._start_s),
                    )
                )
                if text_encoder is not None and self._text_encoder is None:  # while the ranks load
                    self._text_encoder = open_text_encoder(text_encoder, text_device, bundle.config)
                answers = self._answers(at_least_s=self._start_s)
                if self.decoder is not None:
                    self.decoder.wait_started(at_least_s=self._start_s)
                if device == "cuda":
                    free = [answers[rank].free_bytes or 0 for rank in range(world_size)]
                    decoder_free = self.decoder.free_bytes if self.decoder is not None else None
                    graph_bytes = max(answer.graph_bytes for answer in answers.values())
                    fitting = device_sessions(
                        self.memory,
                        free,
                        self.decoder_memory,
                        decoder_free,
                        graph_bytes=graph_bytes,
                        shared=not own_gpu,
                    )
                    logger.info(
                        "%d sessions fit, each of %.2f GiB a rank and %.1f MiB of CUDA graphs",
                        fitting,
                        self.memory.session_bytes / 2**30,
                        graph_bytes / 2**20,
                    )
            if_loading_fails.pop_all()
        self.max_sessions = min(fitting, max_sessions or fitting)
        if max_sessions is not None and fitting < max_sessions:
            logger.warning("%d sessions fit in memory, of %d that were asked for", fitting, max_sessions)

    @property
    def has_vae(self) -> bool:
        """Whether chunks have frames."""
        return self.decoder is not None

    @property
    def open_sessions(self) -> int:
        """Sessions that are open, those that nobody holds any more left out."""
        return len(self._open) - len(self._dropped)

    @property
    def rank_pids(self) -> list[int]:
        """Process numbers of the ranks."""
        return self._pool.pids

    def dead_processes(self) -> list[str]:
        """Names of the engine's processes that are known to have ended, such as `rank 3` or `the decoder`.

        Empty while all of them live, however slow they are or however long they hang. It opens no file, and may be called
        from any thread, also after `close`.

        Raises:
            ForkError: the engine was loaded by another process, from which this one was forked.
        """
        self.check_owner()
        return self._pool.dead_processes() + (self.decoder.dead_processes() if self.decoder is not None else [])

    def silent_s(self) -> float:
        """Seconds since anything was heard from the ranks or the decoder while they owe an answer; 0.0 if they owe none.

        Never waits, and may be called from any thread.
        """
        return max(self._pool.silent_s(), self.decoder.silent_s() if self.decoder is not None else 0.0)

    def encode_prompt(self, prompt: str | Embeddings) -> tuple[torch.Tensor, float]:
        """What the ranks take for a prompt, `[text_len, text_dim]`, and the milliseconds that its encoding took.

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
        """Have each text encoded again when it comes next; for measurements."""
        self.check_owner()
        if self._text_encoder is not None:
            self._text_encoder.forget_prompts()

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames -> latents `[1 + k, 16, H, W]` that `session(given=...)` takes.

        Args:
            frames: an image or a clip of 1 + 4k frames, uint8 `[T, 8H, 8W, 3]` of the bundle's size and at most its
                horizon.

        Raises:
            RequestError: wrong shape, type, number of frames, or values; or the engine has no VAE.
            CapacityError: the memory of the decoder does not hold them.
            RankError: the decoder's process died, hung or raised.
        """
        self.check_owner()
        if self.decoder is None:
            raise RequestError(
                "frames are encoded by the VAE, and the engine has none; build the bundle with `--vae FILE`"
            )
        video = self.config.video
        size, most = (video.pixel_height, video.pixel_width, 3), 4 * video.horizon_frames - 3
        shape = tuple(getattr(frames, "shape", ()))
        if shape[1:] != size or getattr(frames, "dtype", None) != torch.uint8 or shape[0] > most or shape[0] % 4 != 1:
            raise RequestError(
                f"frames to encode must be uint8 [T, {', '.join(map(str, size))}] with T = 1, 5, 9 ... at most {most}, got "
                f"{getattr(frames, 'dtype', type(frames).__name__)} {list(shape)}; scale or cut them"
            )
        with self._decoding():
            return self.decoder.encode(frames.cpu().clone())

    def session(
        self,
        prompt: str | Embeddings,
        *,
        seed: int = 0,
        num_chunks: int | None = None,
        given: torch.Tensor | None = None,
        noise: torch.Tensor | Sequence[torch.Tensor] | None = None,
        ahead: bool | None = None,
        record: bool = False,
    ) -> Session:
        """Begin a rollout.

        Args:
            prompt: text, if the engine has a text encoder, or embeddings `[rows, text_dim]` with rows <= text_len; missing
                rows are zero, as in the reference.
            seed: of the noise; the same seed gives the same video on any number of ranks.
            num_chunks: chunks to generate; by default as many as the horizon holds, given frames included, and with
                `video.time_index=relative` any number is possible.
            given: `[G, 16, H, W]`, clean latents that the video begins with (an encoded clip, or the end of an earlier video),
                whole chunks, after one frame where a video's first is alone (`independent_first_frame`); they are not among
                the chunks that come out.
            noise: for each chunk `[steps, N, 64]` token rows to use instead of the seed's; one tensor will do where all chunks
                are of one length.
            ahead: have the ranks make the next chunk while one is decoded and used, so that decoding costs no frames a second;
                a prompt switch then acts a chunk later. By default where the decoder has a device of its own.
            record: keep the flow and x0 of every forward in `Session.records`.

        Raises:
            CapacityError: no further session fits; those that are open go on.
            PromptError: text that cannot be encoded, wrong shape or type, or values that are not finite.
            RequestError: more chunks than the bundle can make (`checked_chunks`), or given frames or noise of a wrong shape.
            ForkError: the engine was loaded by another process, from which this one was forked.
        """
        self.check_owner()
        given_rows = checked_given(self.config, given)
        chunks = checked_chunks(self.config, num_chunks, num_given=len(given_rows))
        source: Noise = SeededNoise(seed)
        if noise is not None:
            source = checked_noise(self.config, noise, num_chunks=chunks, num_given=len(given_rows))
        text, text_ms = self.encode_prompt(prompt)
        with self._opening() as opened:
            with self._turn():
                session = self._begin(chunks, record, text, source, text_ms, ahead, len(given_rows))
                opened.append(session)
                for rows in given_rows:
                    given_command = GivenCommand(session=session.number, rows=rows.clone(), record=record)
                    session.take_given(self._run(given_command))
            if given is not None and self.decoder is not None:
                session.given_frames = self.decode(
                    session.number, given.detach().to("cpu", torch.float32, copy=True)
                ).frames
        return session

    def resume(self, folder: str | Path, *, num_chunks: int | None = None, ahead: bool | None = None) -> Session:
        """Take up a session that `Session.snapshot` has written, where it stood.

        Args:
            folder: of the snapshot; it stays as it is.
            num_chunks: chunks of the whole session, those before the snapshot included; by default as it was begun.
            ahead: as for `session`.

        Raises:
            CapacityError: no further session fits.
            RequestError: no snapshot, damaged, of another checkpoint, VAE or config, without the frames that this engine makes,
                or more chunks than the bundle can make.
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
        with self._opening() as opened, self._turn():
            session = self._begin(wanted, False, text, SeededNoise(record.seed), 0.0, ahead, record.num_given)
            opened.append(session)
            session.begin_at(record.next_chunk, rows)
            try:
                self._run(ResumeCommand(session=session.number, folder=folder, frame=frame, files=files))
                if self.decoder is not None:
                    self.decoder.resume(session.number, folder, frame=decoder_frame, files=files)
            except (CapacityError, RequestError):
                self._close_session(session.number)
                session.forget()
                raise
        return session

    @contextlib.contextmanager
    def _opening(self) -> Iterator[list[Session]]:
        """Drop the session that the block puts in the list if the block fails, since the caller will not get it."""
        opened: list[Session] = []
        try:
            with self.deferred_interrupts():
                yield opened
        except BaseException:
            for session in opened:
                session.drop()
            raise

    def _begin(
        self,
        num_chunks: int,
        record: bool,
        text: torch.Tensor,
        noise: Noise,
        text_ms: float,
        ahead: bool | None,
        num_given: int,
    ) -> Session:
        """Free what nobody holds any more, refuse a session too many, and open one on every rank."""
        self._settle()
        while self._dropped:
            self._close_session(self._dropped[0])
            self._dropped.popleft()
        if len(self._open) >= self.max_sessions:
            raise CapacityError(
                f"{len(self._open)} sessions are open, and there is room for no more (max_sessions, by default what fits "
                "in memory); end one with session.close(), or wait for one to end"
            )
        ahead = self.makes_ahead if ahead is None else ahead
        session = Session(self, next(self._numbers), num_chunks, record, text, noise, text_ms, ahead, num_given)
        try:
            self._run(OpenCommand(session=session.number, text=text, noise=noise))
        except CapacityError:  # other ranks may have opened it
            self._run(CloseCommand(session=session.number, opened=False))
            session.forget()
            raise
        self._open.add(session.number)
        return session

    def decode(self, session: int, latents: torch.Tensor) -> Decoded:
        """The next frames of a session's video; a decoder that breaks down takes the ranks along.

        Raises:
            RequestError: latents that are not finite.
            CapacityError: the decoder has no memory for the session, whose place in its video is lost.
            RankError: the decoder's process died, hung or raised.
            EngineClosedError: the engine was closed.
        """
        self.check_owner()
        assert self.decoder is not None
        with self._decoding():
            return self.decoder.decode(session, latents)

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        """A conversation with the decoder. One that breaks off ends all processes, one that is refused none."""
        with self.deferred_interrupts():
            try:
                yield
            except (CapacityError, RequestError):
                raise
            except BaseException:
                self._end_at_once()
                raise

    @property
    def is_ours(self) -> bool:
        """Whether this process loaded the engine, rather than one that it was forked from."""
        return self._pool.is_ours

    def check_owner(self) -> None:
        """Raise ForkError in a process that was forked from the one that loaded the engine."""
        self._pool.check_owner()

    @contextlib.contextmanager
    def deferred_interrupts(self) -> Iterator[None]:
        """Raise an interrupt (Ctrl-C) at the end of the block; a second one ends the engine."""
        with interrupts.deferred() as deferred:
            try:
                yield
            except BaseException:
                if deferred.broken_off:
                    self._end_at_once()
                raise

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One conversation with the ranks. One that breaks off ends them: its answers would be left in the channels."""
        self.check_owner()  # before the lock, which a thread of the owner may have held at the fork
        with self.deferred_interrupts(), self._lock:
            try:
                yield
            except (CapacityError, RequestError):  # refused, with the conversation at its end
                raise
            except BaseException:
                self._pool.close(kill=True)
                if self.decoder is not None:
                    self.decoder.kill()
                raise

    def _end_at_once(self) -> None:
        """End all processes, from any thread."""
        self._pool.kill()
        if self.decoder is not None:
            self.decoder.kill()

    def _run(self, command: Command) -> Done:
        """Have every rank do it; what rank 0 answers."""
        self._pool.send(command)
        return self._answers()[0]

    def _answers(self, *, at_least_s: float = 0.0) -> dict[int, Done]:
        """What each rank answers last.

        Raises:
            CausalRTError: a rank has refused.
        """
        answers: dict[int, Done] = {}
        refused: Refused | None = None
        for rank, reply in self._pool.replies(at_least_s=at_least_s):
            if isinstance(reply, Refused):
                refused = refused or reply
            elif isinstance(reply, Done):
                answers[rank] = reply
        if refused is not None:
            raise refused.error()
        return answers

    def _close_session(self, number: int) -> None:
        """Free a session's memory everywhere."""
        self._run(CloseCommand(session=number))
        if self.decoder is not None:
            self.decoder.close_session(number)
        self._open.discard(number)

    def _settle(self) -> None:
        """Take in what the ranks still owe: the end of the last chunk's refresh."""
        if self._unfinished is not None:
            session, replies = self._unfinished
            for rank, reply in replies:
                session.take(rank, reply)
            self._unfinished = None

    def wait(self) -> None:
        """Return when the ranks are idle: the last chunk's refresh has ended, and its session's `times` are complete."""
        with self._turn():
            self._pool.check_open()
            self._settle()

    def usage(self, *, count_waits: bool = False) -> list[Usage]:
        """What each rank has used of its device so far; for measurements.

        Args:
            count_waits: count how often the host waits from here on, until this is called again.
        """
        with self._turn():
            self._pool.check_open()
            self._settle()
            self._pool.send(UsageCommand(count_waits=count_waits))
            answers = self._answers()
        return [answers[rank].usage or Usage() for rank in sorted(answers)]

    def check_exchanges(self) -> list[ExchangeCheck]:
        """Send a pattern through the collectives that the ranks use in steps, and see what arrives (`runtime/canary.py`).

        Returns:
            What each rank found in each kind of exchange; nothing on one rank.

        Raises:
            RankError: a rank died, hung or raised.
        """
        with self._turn():
            self._pool.check_open()
            self._settle()
            self._pool.send(CheckExchangesCommand())
            answers = self._answers()
        return [check for rank in sorted(answers) for check in answers[rank].exchanges]

    def close(self) -> None:
        """End the ranks and free their memory; harmless when called again.

        A chunk that another thread is waiting for ends with an `EngineClosedError` there. In a process that was forked from
        the engine's, nothing happens.
        """
        if not self.is_ours:
            return
        with self.deferred_interrupts(), self._lock.after_ending(self._end_at_once):
            if self.decoder is not None:
                self.decoder.close()
            self._pool.close()
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
