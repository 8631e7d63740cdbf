"""The engine that the server runs on, watched, and loaded again when its processes have died or hang.

    ready -> reloading -> ready
                       -> failing -> ready     after `PATIENT_TRIES` tries, or when the bundle is another one
    any   -> closed

The tries to load it never end. While it is `reloading`, generations wait for it; while it is `failing`, they are refused.
Every method may be called from any thread.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from causalrt.config import Config
from causalrt.errors import BundleError, EngineClosedError
from causalrt.runtime.memory import MemoryEstimate

log = logging.getLogger(__name__)

State = Literal["ready", "reloading", "failing", "closed"]
BACKOFF = 4
PATIENT_TRIES = 3
SLOW_S, SLOW_CHUNKS = 10.0, 10
"""An answer that takes longer than this time, and than so many times the slowest chunk, makes the server not ready."""
HUNG_S, HUNG_CHUNKS = 60.0, 30
"""After this time, and after so many times the slowest chunk, the processes are ended and started again."""
MOST_BETWEEN_LOOKS_S = 2.0


class BundleReplacedError(BundleError):
    """The bundle that was loaded has been replaced by another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """The state of the engine, in words that clients may see.

    Attributes:
        state: see the module.
        since: Unix time at which that state began, in seconds.
        detail: what is wrong; None while requests are served.
        tries: failed attempts to load it again since its processes died.
        next_try_s: seconds until the next attempt; None if there will be none, or if one is under way.
    """

    state: State
    since: float
    detail: str | None = None
    tries: int = 0
    next_try_s: float | None = None


class SessionLike(Protocol):
    """What the server uses of a `Session`, whose docs hold."""

    def __next__(self) -> Any:
        """The next chunk."""

    @property
    def next_chunk(self) -> int:
        """The first chunk that has not been begun."""

    def switch_prompt(self, prompt_embeds: torch.Tensor, *, policy: Any) -> float:
        """Another prompt from the next chunk on; milliseconds."""

    def cancel(self) -> None:
        """End the iteration before the next chunk."""

    def close(self) -> None:
        """Free the session."""


class EngineLike(Protocol):
    """What the server uses of an `Engine`, whose docs hold."""

    config: Config

    @property
    def has_vae(self) -> bool:
        """Whether chunks have frames."""

    @property
    def max_sessions(self) -> int:
        """How many fit in memory."""

    @property
    def open_sessions(self) -> int:
        """How many there are."""

    @property
    def memory(self) -> MemoryEstimate:
        """Predicted, a rank and session."""

    def dead_processes(self) -> list[str]:
        """Names of the processes that have ended."""

    def silent_s(self) -> float:
        """See `Engine.silent_s`."""

    def session(self, prompt_embeds: torch.Tensor, *, seed: int, num_chunks: int | None) -> Any:
        """Begin one."""

    def close(self) -> None:
        """End the ranks."""


class EngineHost:
    """Holds the engine, or says why there is none."""

    def __init__(
        self,
        engine: EngineLike,
        load: Callable[[], EngineLike],
        *,
        first_wait_s: float,
        max_wait_s: float,
        on_reload: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over `engine`. `load` makes another like it: after `first_wait_s`, then at intervals up to `max_wait_s`."""
        self.config = engine.config
        self._engine = engine
        self._load = load
        self._first_wait_s = first_wait_s
        self._max_wait_s = max_wait_s
        self._on_reload = on_reload
        self._state: State = "ready"
        self._since = time.time()
        self._error: object = None
        self._tries = 0
        self._next_try: float | None = None
        self._num_chunks, self._slowest_chunk_s = 0, 0.0
        self._looked, self._waited_s = time.monotonic(), 0.0
        self._changed = threading.Condition()

    @property
    def current(self) -> EngineLike:
        """The engine of now, or the last there was: for its numbers."""
        return self._engine

    @property
    def status(self) -> EngineStatus:
        """The state of the engine as it was last seen."""
        with self._changed:
            next_try_s = None if self._next_try is None else max(0.0, self._next_try - time.monotonic())
            return EngineStatus(
                state=self._state,
                since=self._since,
                detail=self._detail(next_try_s),
                tries=self._tries,
                next_try_s=next_try_s,
            )

    def _detail(self, next_try_s: float | None) -> str | None:
        if self._state == "ready":
            slow = self._waited_s > self._most_s(SLOW_S, SLOW_CHUNKS)
            return f"a generating process has given no answer for {self._waited_s:.0f} s" if slow else None
        if self._state == "closed":
            return "the server is shutting down"
        if self._state == "reloading":
            return "the generating processes have died and are being started again"
        trying = "being tried again now" if next_try_s is None else f"tried again in {next_try_s:.0f} s"
        if isinstance(self._error, BundleReplacedError):
            return (
                "the generating processes have died, and the bundle has been replaced by another one since the server was "
                f"started: restart the server to serve the new one, or put the former one back, which is {trying}"
            )
        return (
            f"the generating processes have died and could not be started again ({self._tries} tries); it is {trying}"
        )

    def engine(self) -> EngineLike:
        """The engine; waits while one is loaded.

        Raises:
            EngineClosedError: there is none, and it is not known when there will be one.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state != "reloading")
            if self._state == "ready":
                return self._engine
        raise EngineClosedError(self.status.detail)

    def look(self) -> EngineStatus:
        """Look at the processes, which are started again if they have ended or hang; return the state of the engine."""
        engine = self._engine
        if self._state == "ready":
            self._count_silence(engine)
            if dead := engine.dead_processes():
                self.report(engine, f"processes have ended: {', '.join(dead)}")
            elif self._waited_s > self._most_s(HUNG_S, HUNG_CHUNKS):
                waited, slowest = f"{self._waited_s:.0f} s", f"{self._slowest_chunk_s:.2g} s"
                self.report(engine, f"no answer has come for {waited}; the slowest chunk so far took {slowest}")
        return self.status

    def chunk_took(self, engine: EngineLike, seconds: float) -> None:
        """Learn how long a chunk takes; an engine's first one does not count, since it includes work that is done once."""
        with self._changed:
            if engine is self._engine:
                self._num_chunks += 1
                if self._num_chunks > 1:
                    self._slowest_chunk_s = max(self._slowest_chunk_s, seconds)

    def report(self, engine: EngineLike, error: object) -> None:
        """Note that `engine` has failed, and load it again in the background."""
        with self._changed:
            if engine is not self._engine or self._state != "ready":
                return
            self._enter("reloading")
        log.error("the engine has failed: %s", error)
        threading.Thread(target=self._reload, name="causalrt-reload", daemon=True).start()

    def close(self) -> None:
        """End the engine; whoever waits for one gets an error."""
        with self._changed:
            self._enter("closed")
        self._engine.close()

    def _enter(self, state: State) -> None:
        self._state, self._since = state, time.time()
        self._changed.notify_all()

    def _most_s(self, least_s: float, chunks: int) -> float:
        """How long an answer may take; only the engine's own limit holds until it is known how long a chunk takes."""
        return max(least_s, chunks * self._slowest_chunk_s) if self._slowest_chunk_s else float("inf")

    def _count_silence(self, engine: EngineLike) -> None:
        """A long time between two looks counts little: the whole machine may have stood still."""
        now = time.monotonic()
        passed_s = min(now - self._looked, MOST_BETWEEN_LOOKS_S)
        self._looked, self._waited_s = now, min(engine.silent_s(), self._waited_s + passed_s)

    def _reload(self) -> None:
        try:
            self._engine.close()
        except Exception:
            log.exception("the failed engine could not be closed")
        wait_s = self._first_wait_s
        while self._wait(wait_s):
            wait_s = min(self._max_wait_s, BACKOFF * wait_s)
            try:
                engine = self._load()
            except Exception as error:
                with self._changed:
                    self._error, self._tries = error, self._tries + 1
                    given_up = self._tries >= PATIENT_TRIES or isinstance(error, BundleReplacedError)
                    if self._state == "reloading" and given_up:
                        self._enter("failing")
                log.error(
                    "the engine could not be loaded again, next try in %g s: %s",
                    wait_s,
                    error,
                    exc_info=self._tries == 1 and not isinstance(error, BundleReplacedError),
                )
                continue
            if self._take(engine):
                log.warning("the engine was loaded again")
                self._on_reload()
            else:
                engine.close()
            return

    def _wait(self, seconds: float) -> bool:
        """Wait before a try; False if the server has been closed meanwhile."""
        with self._changed:
            self._next_try = time.monotonic() + seconds
            closed = self._changed.wait_for(lambda: self._state == "closed", timeout=seconds)
            self._next_try = None
            return not closed

    def _take(self, engine: EngineLike) -> bool:
        """Serve with a new engine, unless the server has been closed meanwhile."""
        with self._changed:
            if self._state == "closed":
                return False
            self._engine, self._error, self._tries = engine, None, 0
            self._num_chunks, self._slowest_chunk_s, self._waited_s = 0, 0.0, 0.0
            self._enter("ready")
            return True
