"""`Engine`: a bundle on its ranks, and the sessions that generate from it.

    engine = causalrt.load("bundle", text_encoder="Wan2.1-T2V-1.3B")
    with engine.session("a fox in the snow", seed=0) as session:
        for chunk in session:
            use(chunk.frames)                 # uint8 [T, 8H, 8W, 3], and chunk.latents [F, 16, H, W]

Commands from several sessions (or threads) take turns by chunk, first come, first served. The context pass of a chunk runs on
the ranks while the chunk is decoded and used, and the next command waits for it.

An interrupt (Ctrl-C) during a call is raised when the call has done its work, so the engine stays usable; a second one is
raised at once, and ends the engine.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from causalrt.config import Config
from causalrt.control_groups import available_cpus
from causalrt.engines.bundle import VAE_WEIGHTS, Bundle, unchanged
from causalrt.engines.kinds import executor_kind, warms_up
from causalrt.errors import PromptError, RequestError
from causalrt.model.text.words import WORDS_FILE, WordEncoder
from causalrt.runtime.canary import ExchangeCheck
from causalrt.runtime.memory import (
    UNLIMITED,
    check_memory,
    decoder_memory,
    device_sessions,
    rank_memory,
)
from causalrt.runtime.messages import (
    CheckExchangesCommand,
    Done,
    InitialChunkCommand,
    LoadCommand,
    LoadVaeCommand,
    ResumeCommand,
    UsageCommand,
)
from causalrt.runtime.noise import Noise, SeededNoise, checked_noise
from causalrt.runtime.ranks import START_S, WARM_START_S
from causalrt.runtime.requests import Embeddings, checked_chunks, checked_initial_latents, checked_text
from causalrt.runtime.session import Session
from causalrt.runtime.snapshot import read_session
from causalrt.runtime.usage import Usage
from causalrt.runtime.vae_decoder import VaeDecoder
from causalrt.runtime.workers import Workers

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from causalrt.model.text.umt5 import TextEncoder


def open_text_encoder(folder: Path | None, device: str, config: Config) -> "TextEncoder | WordEncoder | None":
    """The text encoder in a folder, for the prompts of a model: a table of words if the folder has one, otherwise umT5.

    Raises:
        CheckpointError: it cannot be read, or is not the model's.
        ConfigError, ExecutorError: umT5 cannot compute on `device`, or lacks a library; a table of words needs neither.
    """
    if folder is None:
        return None
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
        max_sessions: how many may be open at once.
        workers: the processes that do the work.
        makes_ahead: sessions make a chunk ahead unless they are told otherwise: the decoder has a GPU of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        executor: str,
        *,
        device: str,
        fused_ops: bool,
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
        start_s = WARM_START_S if warms_up(executor, device) else START_S
        own_gpu = device == "cuda" and torch.cuda.device_count() > world_size
        self.makes_ahead = decoder_executor is not None and own_gpu
        open_encoder = functools.partial(open_text_encoder, text_encoder, text_device, bundle.config)
        encoder_on_gpu = text_device != "cpu"  # such an encoder is loaded before the ranks measure their free memory
        self._text_encoder = open_encoder() if encoder_on_gpu else None
        with contextlib.ExitStack() as if_loading_fails:
            self.workers = Workers(world_size, timeout_s=timeout_s, decodes=decoder_executor is not None)
            if_loading_fails.callback(self.workers.end)
            with unchanged(bundle):
                if self.decoder is not None and decoder_executor is not None:
                    self.decoder.start(
                        LoadVaeCommand(
                            bundle=bundle.path,
                            digest=bundle.digest,
                            executor=decoder_executor,
                            device=f"cuda:{world_size if own_gpu else 0}" if device == "cuda" else "cpu",
                            num_threads=num_threads or cores,
                        )
                    )
                self.workers.ranks.send(
                    LoadCommand(
                        bundle=bundle.path,
                        digest=bundle.digest,
                        executor=executor,
                        device=device,
                        fused_ops=fused_ops,
                        cuda_graphs=cuda_graphs,
                        num_threads=self.num_threads,
                        timeout_s=max(timeout_s, start_s),
                    )
                )
                if not encoder_on_gpu:
                    self._text_encoder = open_encoder()  # while the ranks load
                answers = self.workers.answers(at_least_s=start_s)
                if self.decoder is not None:
                    self.decoder.wait_started(at_least_s=start_s)
            if device == "cuda":
                fitting = self._sessions_on_gpus(answers, decoder_shares_gpu=not own_gpu)
            if_loading_fails.pop_all()
        self.max_sessions = min(fitting, max_sessions or fitting)
        if max_sessions is not None and fitting < max_sessions:
            logger.warning("%d sessions fit in memory, of %d that were asked for", fitting, max_sessions)

    def _sessions_on_gpus(self, answers: Sequence[Done], *, decoder_shares_gpu: bool) -> int:
        graph_bytes = max(answer.graph_bytes for answer in answers)
        fitting = device_sessions(
            self.memory,
            [answer.free_bytes or 0 for answer in answers],
            self.decoder_memory,
            self.decoder.free_bytes if self.decoder is not None else None,
            graph_bytes=graph_bytes,
            shared=decoder_shares_gpu,
        )
        logger.info(
            "%d sessions fit, each of %.2f GiB a rank and %.1f MiB of CUDA graphs",
            fitting,
            self.memory.session_bytes / 2**30,
            graph_bytes / 2**20,
        )
        return fitting

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

        Empty while all of them live, however slow they are or however long they hang. It opens no file, and may be called
        from any thread, also after `close`.

        Raises:
            ForkError: the engine was loaded by another process, from which this one was forked.
        """
        self.check_owner()
        return self.workers.dead_processes()

    def silent_s(self) -> float:
        """Seconds since anything was heard from the ranks or the decoder while they owe an answer; 0.0 if they owe none.

        Never waits, and may be called from any thread.
        """
        return self.workers.silent_s()

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
        """Frames -> latents `[1 + k, 16, H, W]` that `session(initial_latents=...)` takes.

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
            seed: of the noise; the same seed gives the same video on any number of ranks.
            num_chunks: chunks to generate; by default as many as the horizon holds beside the initial latents; with
                `video.time_index=relative` any number is possible.
            initial_latents: `[G, 16, H, W]`, clean latents that the video begins with (an encoded clip, or the end of an
                earlier video), in whole chunks, the first of which is one frame with `independent_first_frame`; they are not
                among the chunks that the session yields.
            noise: for each chunk `[steps, N, 64]` token rows to use instead of the seed's; one tensor will do where all chunks
                are of one length.
            ahead: have the ranks make the next chunk while one is decoded and used, so that decoding costs no frames a second;
                a prompt switch then acts a chunk later. By default where the decoder has a device of its own.
            record: keep the flow and x0 of every forward in `Session.records`.

        Raises:
            CapacityError: no further session fits; those that are open go on.
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
        with contextlib.ExitStack() as if_opening_fails:
            with self.workers.deferred_interrupts(), self.workers.conversation():
                session = self._open(
                    text, SeededNoise(record.seed), num_chunks=wanted, num_given=record.num_given, ahead=ahead
                )
                if_opening_fails.callback(session.abandon)
                session.begin_at(record.next_chunk, rows)
                self.workers.run(ResumeCommand(session=session.number, folder=folder, frame=frame, files=files))
                if self.decoder is not None:
                    self.decoder.resume(session.number, folder, frame=decoder_frame, files=files)
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
        """Return when the ranks are idle: the last chunk's refresh has ended, and its session's `times` are complete."""
        with self.workers.conversation():
            pass

    def usage(self, *, count_waits: bool = False) -> list[Usage]:
        """What each rank has used of its device so far; for measurements.

        Args:
            count_waits: count how often the host waits from here on, until this is called again.
        """
        with self.workers.conversation():
            answers = self.workers.run_all(UsageCommand(count_waits=count_waits))
        return [answer.usage or Usage() for answer in answers]

    def check_exchanges(self) -> list[ExchangeCheck]:
        """Send a pattern through the collectives that the ranks use in steps, and see what arrives (`runtime/canary.py`).

        Returns:
            What each rank found in each kind of exchange; nothing on one rank.

        Raises:
            RankError: a rank died, hung or raised.
        """
        with self.workers.conversation():
            answers = self.workers.run_all(CheckExchangesCommand())
        return [check for answer in answers for check in answer.exchanges]

    def close(self) -> None:
        """End the ranks and free their memory; harmless when called again.

        A chunk that another thread is waiting for ends with an `EngineClosedError` there. In a process that was forked from
        the engine's, nothing happens.
        """
        if self.is_ours:
            self.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
