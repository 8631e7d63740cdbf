"""The processes of an engine, and whose turn it is to talk to them.

    Engine, Session  ->  Workers  ->  RankPool     P rank processes, which generate
                                  ->  VaeDecoder   one process that decodes, if the engine makes frames

A *conversation* is a command to the ranks and their answers. Sessions and threads hold conversations one after another, first
come, first served. Rank 0 sends a chunk's latents before the ranks have finished the chunk's context pass, so the rest of
their answers stays pending while the chunk is decoded and used; the next conversation begins by reading it.
"""

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterator

import torch

from causalrt.errors import CapacityError, RequestError
from causalrt.runtime import interrupts
from causalrt.runtime.fair_lock import FairLock
from causalrt.runtime.messages import ChunkCommand, CloseCommand, Command, Done, Latents, OpenCommand, Refused, Reply
from causalrt.runtime.noise import Noise
from causalrt.runtime.ranks import RankPool
from causalrt.runtime.vae_decoder import Decoded, VaeDecoder


class Workers:
    """The rank processes and the decoder process of one engine.

    The methods that send commands to the ranks must be called inside `conversation()`; those of the decoder must not, since
    the decoder has a queue of its own.

    Attributes:
        ranks: the rank processes.
        decoder: the decoder process, or None.
    """

    def __init__(self, world_size: int, *, timeout_s: float, decodes: bool) -> None:
        self._lock = FairLock(interruptible=True)
        self._numbers = itertools.count()
        self._open: set[int] = set()
        self._abandoned: deque[int] = deque()
        self._pending: tuple[Iterator[tuple[int, Reply]], Callable[[int, Reply], None]] | None = None
        self.decoder: VaeDecoder | None = None
        self._finalizers: list[weakref.finalize[..., Workers]] = []
        with contextlib.ExitStack() as if_starting_fails:
            if_starting_fails.callback(self.end)
            with interrupts.deferred():
                self.ranks = RankPool(world_size, timeout_s=timeout_s)
                self._finalizers.append(weakref.finalize(self, self.ranks.close, kill=True))
                if decodes:
                    self.decoder = VaeDecoder(timeout_s=timeout_s)
                    self._finalizers.append(weakref.finalize(self, self.decoder.end))
            if_starting_fails.pop_all()

    # ---- the processes

    def check_owner(self) -> None:
        """Raise ForkError in a process that was forked from the one that started the workers."""
        self.ranks.check_owner()

    @property
    def is_ours(self) -> bool:
        """Whether this process started the workers, rather than one that it was forked from."""
        return self.ranks.is_ours

    def dead_processes(self) -> list[str]:
        """Names of the processes that are known to have ended, such as `rank 3` or `the decoder`."""
        return self.ranks.dead_processes() + (self.decoder.dead_processes() if self.decoder is not None else [])

    def silent_s(self) -> float:
        """Seconds since the ranks or the decoder last sent something while they owe an answer; 0.0 if they owe none."""
        return max(self.ranks.silent_s(), self.decoder.silent_s() if self.decoder is not None else 0.0)

    def kill(self) -> None:
        """End all processes at once, from any thread."""
        self.ranks.kill()
        if self.decoder is not None:
            self.decoder.kill()

    def end(self) -> None:
        """End all processes at once and free their channels, while no other thread talks to them."""
        for finalizer in self._finalizers:
            finalizer()

    def close(self) -> None:
        """End all processes. A thread that is waiting for an answer gets an EngineClosedError."""
        with self.deferred_interrupts(), self._lock.after_ending(self.kill):
            if self.decoder is not None:
                self.decoder.close()
            self.ranks.close()
        for finalizer in self._finalizers:
            finalizer.detach()

    # ---- conversations with the ranks

    @contextlib.contextmanager
    def deferred_interrupts(self) -> Iterator[None]:
        """Raise an interrupt (Ctrl-C) at the end of the block; a second one ends all processes."""
        with interrupts.deferred() as deferred:
            try:
                yield
            except BaseException:
                if deferred.broken_off:
                    self.kill()
                raise

    @contextlib.contextmanager
    def conversation(self) -> Iterator[None]:
        """Wait for this thread's turn to talk to the ranks, and read what they still owe from the previous chunk.

        A conversation that is broken off ends all processes, because unread answers would be left in the channels. One in
        which the ranks refuse a request is complete, and ends nothing.

        Raises:
            EngineClosedError: the ranks have ended.
            ForkError: another process started them.
        """
        self.check_owner()  # before the lock, which a thread of the owner may have held at the fork
        with self.deferred_interrupts(), self._lock:
            try:
                self.ranks.check_open()
                self._finish_pending()
                yield
            except (CapacityError, RequestError):
                raise
            except BaseException:
                self.ranks.close(kill=True)
                if self.decoder is not None:
                    self.decoder.kill()
                raise

    def _finish_pending(self) -> None:
        if self._pending is not None:
            replies, on_reply = self._pending
            for rank, reply in replies:
                on_reply(rank, reply)
            self._pending = None

    def run(self, command: Command) -> Done:
        """Run a command on every rank and return rank 0's answer."""
        return self.run_all(command)[0]

    def run_all(self, command: Command, *, at_least_s: float = 0.0) -> list[Done]:
        """Run a command on every rank and return each rank's answer, by rank.

        Args:
            command: what to do.
            at_least_s: seconds that the ranks have to answer, even if the engine's `timeout_s` is shorter.

        Raises:
            CausalRTError: a rank has refused; the type is the rank's.
            RankError: a rank died, hung or raised.
        """
        self.ranks.send(command)
        return self.answers(at_least_s=at_least_s)

    def answers(self, *, at_least_s: float = 0.0) -> list[Done]:
        """The answers to the command that `ranks.send` has sent; see `run_all`."""
        answers: dict[int, Done] = {}
        refused: Refused | None = None
        for rank, reply in self.ranks.replies(at_least_s=at_least_s):
            if isinstance(reply, Refused):
                refused = refused or reply
            elif isinstance(reply, Done):
                answers[rank] = reply
        if refused is not None:
            raise refused.error()
        return [answers[rank] for rank in sorted(answers)]

    def generate(self, command: ChunkCommand, on_reply: Callable[[int, Reply], None]) -> Latents:
        """Generate a chunk, and return its latents while the ranks go on with its context pass.

        Args:
            command: the chunk.
            on_reply: called with (rank, reply) for every other answer, at the latest when the next conversation begins.
        """
        self.ranks.send(command)
        replies = self.ranks.replies()
        self._pending = replies, on_reply
        for rank, reply in replies:
            if isinstance(reply, Latents):
                return reply
            on_reply(rank, reply)
        raise AssertionError("rank 0 sends the latents before any rank has finished")

    # ---- sessions

    @property
    def open_sessions(self) -> int:
        """Number of open sessions, without those that were garbage collected or abandoned."""
        return len(self._open) - len(self._abandoned)

    def open_session(self, *, text: torch.Tensor, noise: Noise, max_sessions: int) -> int:
        """Open a session on every rank and return its number; abandoned sessions are freed first.

        Raises:
            CapacityError: `max_sessions` are open, or a rank has no memory for another one.
        """
        while self._abandoned:
            self.close_session(self._abandoned[0])
            self._abandoned.popleft()
        if len(self._open) >= max_sessions:
            raise CapacityError(
                f"{len(self._open)} sessions are open, and there is room for no more (max_sessions, by default what fits "
                "in memory); end one with session.close(), or wait for one to end"
            )
        number = next(self._numbers)
        try:
            self.run(OpenCommand(session=number, text=text, noise=noise))
        except CapacityError:  # other ranks may have opened it
            self.run(CloseCommand(session=number, opened=False))
            raise
        self._open.add(number)
        return number

    def close_session(self, number: int) -> None:
        """Free a session's memory in every process."""
        self.run(CloseCommand(session=number))
        if self.decoder is not None:
            self.decoder.close_session(number)
        self._open.discard(number)

    def abandon_session(self, number: int) -> None:
        """Have a session freed before the next one is opened. May be called from any thread, or by the garbage collector."""
        if number in self._open:
            self._abandoned.append(number)

    # ---- the decoder

    def decode(self, session: int, latents: torch.Tensor) -> Decoded:
        """The next frames of a session's video; a decoder that fails ends the ranks, too. See `VaeDecoder.decode`."""
        assert self.decoder is not None
        with self._talking_to_decoder():
            return self.decoder.decode(session, latents)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Latents of frames; see `VaeDecoder.encode`."""
        assert self.decoder is not None
        with self._talking_to_decoder():
            return self.decoder.encode(frames)

    @contextlib.contextmanager
    def _talking_to_decoder(self) -> Iterator[None]:
        self.check_owner()
        with self.deferred_interrupts():
            try:
                yield
            except (CapacityError, RequestError):
                raise
            except BaseException:
                self.kill()
                raise
