"""The engine that the server runs on, watched, and loaded again when its ranks have died.

    ready -> (ranks die) -> reloading -> ready
                                      -> lost     after `attempts` tries in a row
    any   -> closed

Every method may be called from any thread.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch

from causalrt.config import Config
from causalrt.errors import CausalRTError, EngineClosedError
from causalrt.runtime.memory import Memory

log = logging.getLogger(__name__)

State = Literal["ready", "reloading", "lost", "closed"]
BACKOFF = 4


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
    decoder: Any

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
    def memory(self) -> Memory:
        """Predicted, a rank and session."""

    @property
    def rank_pids(self) -> list[int]:
        """Process numbers."""

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
        attempts: int,
        first_wait_s: float,
        on_reload: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over `engine`; `load` makes another like it."""
        self.config = engine.config
        self._engine = engine
        self._load = load
        self._attempts = attempts
        self._first_wait_s = first_wait_s
        self._on_reload = on_reload
        self._state: State = "ready"
        self._why = ""
        self._changed = threading.Condition()

    @property
    def state(self) -> State:
        """How it stands."""
        return self._state

    @property
    def why(self) -> str:
        """The error that ended the ranks, in one line; empty while all is well."""
        return self._why

    @property
    def current(self) -> EngineLike:
        """The engine of now, or the last there was: for its numbers."""
        return self._engine

    def engine(self) -> EngineLike:
        """The engine; waits while one is loaded.

        Raises:
            EngineClosedError: there is none, and there will be none.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state != "reloading")
            if self._state != "ready":
                raise EngineClosedError(self._why or "the server is shutting down")
            return self._engine

    def ranks_alive(self) -> bool:
        """Whether every rank's process is there, and the decoder's. If not, that is reported, as if a session had failed."""
        if self._state != "ready":
            return False
        engine = self._engine
        try:
            for pid in (*engine.rank_pids, *([engine.decoder.pid] if engine.decoder else ())):
                os.kill(pid, 0)
        except (OSError, CausalRTError) as error:
            self.report(engine, f"a rank process or the decoder has died ({error})")
            return False
        return True

    def report(self, engine: EngineLike, error: object) -> None:
        """The ranks of `engine` are gone: load it again in the background."""
        with self._changed:
            if engine is not self._engine or self._state != "ready":
                return
            self._state, self._why = "reloading", str(error).splitlines()[0]
            self._changed.notify_all()
        log.error("the engine has failed: %s", error)
        threading.Thread(target=self._reload, name="causalrt-reload", daemon=True).start()

    def close(self) -> None:
        """End the engine; whoever waits for one gets an error."""
        with self._changed:
            self._state = "closed"
            self._changed.notify_all()
        self._engine.close()

    def _reload(self) -> None:
        try:
            self._engine.close()
        except Exception:
            log.exception("the failed engine could not be closed")
        for wait_s in self._waits():
            with self._changed:
                if self._changed.wait_for(lambda: self._state == "closed", timeout=wait_s):
                    return
            try:
                engine = self._load()
            except Exception as error:
                log.exception("the engine could not be loaded again")
                self._why = str(error).splitlines()[0] if str(error) else type(error).__name__
                continue
            with self._changed:
                closed = self._state == "closed"
                if not closed:
                    self._engine, self._state, self._why = engine, "ready", ""
                    self._changed.notify_all()
            if closed:
                engine.close()
            else:
                log.warning("the engine was loaded again")
                self._on_reload()
            return
        with self._changed:
            if self._state == "reloading":
                self._state = "lost"
                self._changed.notify_all()
        log.error("the engine stays lost after %d tries: %s", self._attempts, self._why)

    def _waits(self) -> Iterator[float]:
        for attempt in range(self._attempts):
            yield self._first_wait_s * BACKOFF**attempt
