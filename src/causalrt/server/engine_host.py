"""The engine of the server: it is watched, and loaded again when its processes have died or hang.

    ready -> reloading -> ready
                       -> failing -> ready     after `PATIENT_TRIES` attempts, or when the bundle has been replaced
    any   -> closed

Attempts to load it never stop. While it is `reloading`, generations wait for it; while it is `failing`, they are refused.
Every method may be called from any thread.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from causalrt.errors import BundleError, EngineClosedError
from causalrt.runtime.engine import Engine

log = logging.getLogger(__name__)

State = Literal["ready", "reloading", "failing", "closed"]
BACKOFF = 4
PATIENT_TRIES = 3
SLOW_S, SLOW_CHUNKS = 10.0, 10
"""The server is not ready while an answer takes longer than both this time and this many times the slowest chunk."""
HUNG_S, HUNG_CHUNKS = 60.0, 30
"""The processes are restarted once an answer takes longer than both this time and this many times the slowest chunk."""
MOST_BETWEEN_LOOKS_S = 2.0


class BundleReplacedError(BundleError):
    """The bundle that was loaded has been replaced by another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStatus:
    """State of the engine; nothing in it is secret from clients.

    Attributes:
        state: one of the states in the docstring of this module.
        since: Unix time at which that state began, in seconds.
        detail: reason why requests are not served; None while they are.
        tries: failed attempts to reload it since its processes died.
        next_try_s: seconds until the next attempt; None if none is planned or one is in progress.
    """

    state: State
    since: float
    detail: str | None = None
    tries: int = 0
    next_try_s: float | None = None


class EngineHost:
    """Holds the engine, or the reason why there is none."""

    def __init__(
        self,
        engine: Engine,
        load: Callable[[], Engine],
        *,
        first_wait_s: float,
        max_wait_s: float,
        on_reload: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over `engine`; `load` replaces it after `first_wait_s`, and retries at intervals that grow to `max_wait_s`."""
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
    def current(self) -> Engine:
        """The current engine, or the last one if there is none: for metrics."""
        return self._engine

    @property
    def status(self) -> EngineStatus:
        """State of the engine at the last check."""
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

    def engine(self) -> Engine:
        """Return the engine; wait while one is being loaded.

        Raises:
            EngineClosedError: there is no engine, and it is unknown when there will be one.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state != "reloading")
            if self._state == "ready":
                return self._engine
        raise EngineClosedError(self.status.detail)

    def look(self) -> EngineStatus:
        """Check the processes, restart them if they have ended or hang, and return the state of the engine."""
        engine = self._engine
        if self._state == "ready":
            self._count_silence(engine)
            if dead := engine.dead_processes():
                self.report(engine, f"processes have ended: {', '.join(dead)}")
            elif self._waited_s > self._most_s(HUNG_S, HUNG_CHUNKS):
                waited, slowest = f"{self._waited_s:.0f} s", f"{self._slowest_chunk_s:.2g} s"
                self.report(engine, f"no answer has come for {waited}; the slowest chunk so far took {slowest}")
        return self.status

    def chunk_took(self, engine: Engine, seconds: float) -> None:
        """Record how long a chunk took; the first of an engine does not count, since it includes one-time work."""
        with self._changed:
            if engine is self._engine:
                self._num_chunks += 1
                if self._num_chunks > 1:
                    self._slowest_chunk_s = max(self._slowest_chunk_s, seconds)

    def report(self, engine: Engine, error: object) -> None:
        """Record that `engine` has failed, and reload it in the background."""
        with self._changed:
            if engine is not self._engine or self._state != "ready":
                return
            self._enter("reloading")
        log.error("the engine has failed: %s", error)
        threading.Thread(target=self._reload, name="causalrt-reload", daemon=True).start()

    def close(self) -> None:
        """Close the engine; callers that wait for one get an error."""
        with self._changed:
            self._enter("closed")
        self._engine.close()

    def _enter(self, state: State) -> None:
        self._state, self._since = state, time.time()
        self._changed.notify_all()

    def _most_s(self, least_s: float, chunks: int) -> float:
        """Return how long an answer may take: unlimited here until the duration of a chunk is known."""
        return max(least_s, chunks * self._slowest_chunk_s) if self._slowest_chunk_s else float("inf")

    def _count_silence(self, engine: Engine) -> None:
        """Add the time since the last check, but only a little of a long one: the whole machine may have been suspended."""
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
        """Wait before an attempt; return False if the server was closed meanwhile."""
        with self._changed:
            self._next_try = time.monotonic() + seconds
            closed = self._changed.wait_for(lambda: self._state == "closed", timeout=seconds)
            self._next_try = None
            return not closed

    def _take(self, engine: Engine) -> bool:
        """Install a new engine, unless the server was closed meanwhile; return whether it was installed."""
        with self._changed:
            if self._state == "closed":
                return False
            self._engine, self._error, self._tries = engine, None, 0
            self._num_chunks, self._slowest_chunk_s, self._waited_s = 0, 0.0, 0.0
            self._enter("ready")
            return True
