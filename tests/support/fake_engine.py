"""An engine without a model, for tests of the server: its chunks come when a test lets them, and it can be made to fail."""

import threading
import time
from types import SimpleNamespace

import torch

from causalrt.config import override
from causalrt.errors import CapacityError, EngineClosedError, PromptError, RankError
from causalrt.model.text.umt5 import PromptTokens, clean_prompt
from causalrt.recipes import recipe


def fake_config(changes=None):
    return override(recipe("tiny"), {"video.horizon_frames": "21", **(changes or {})})


class FakeEngine:
    """What the server uses of `causalrt.Engine`.

    Attributes:
        chunk_s: how long a chunk takes.
        begun: chunks that were begun.
        made: chunks that were made, by session.
        closed_sessions: numbers of the sessions that were closed.
        most_open: the most sessions that were open at once.
        dead: names of processes that have ended.
        silent: seconds for which an answer has been owed.
    """

    def __init__(self, *, max_sessions=4, chunk_s=0.0, changes=None):
        self.config = fake_config(changes)
        self.has_vae = True
        self.max_sessions = max_sessions
        self.memory = SimpleNamespace(kv_bytes=1000)
        self.dead = []
        self.silent = 0.0
        self.chunk_s = chunk_s
        self.begun = 0
        self.made = {}
        self.switches = []
        self.sessions = []
        self.closed_sessions = []
        self.most_open = 0
        self.closed = False
        self.error = None
        self._gate = None
        self._lock = threading.Lock()

    @property
    def open_sessions(self):
        return len(self.sessions) - len(self.closed_sessions)

    def dead_processes(self):
        return self.dead

    def silent_s(self):
        return self.silent

    def hold(self):
        """From now on each chunk waits for `let`."""
        self._gate = threading.Semaphore(0)

    def let(self, chunks=1):
        self._gate.release(chunks)

    def die(self):
        """The ranks are gone: whoever waits for a chunk hears of it."""
        self.error = RankError("rank 0 has died; all ranks were ended, load the bundle again")
        if self._gate:
            self._gate.release(1000)

    def session(self, prompt_embeds, *, seed=0, num_chunks=None):
        if self.error:
            raise self.error
        with self._lock:
            if self.open_sessions >= self.max_sessions:
                raise CapacityError(f"{self.open_sessions} sessions are open, and there is room for no more")
            session = FakeSession(self, len(self.sessions), seed, num_chunks)
            self.sessions.append(session)
            self.most_open = max(self.most_open, self.open_sessions)
        return session

    def close(self):
        self.closed = True
        self.error = self.error or EngineClosedError("the rank processes have ended; load the bundle again")
        if self._gate:
            self._gate.release(1000)

    def wait(self):
        self.begun += 1
        if self._gate:
            self._gate.acquire()
        time.sleep(self.chunk_s)
        if self.error:
            raise self.error


class FakeSession:
    def __init__(self, engine, number, seed, num_chunks):
        self._engine, self.number, self._seed, self._left = engine, number, seed, num_chunks
        self._next = 0
        self._cancelled = False

    @property
    def next_chunk(self):
        return self._next

    def __iter__(self):
        return self

    def __next__(self):
        if self._cancelled or self._next == self._left:
            raise StopIteration
        begun = time.perf_counter()
        self._engine.wait()
        video, index = self._engine.config.video, self._next
        self._next += 1
        self._engine.made[self.number] = self._next
        count = 4 * video.frames_at(index) - 3 * (index == 0)
        shape = (count, video.pixel_height, video.pixel_width, 3)
        noise = torch.Generator().manual_seed((self._seed + index) % 2**63)
        return SimpleNamespace(
            index=index,
            frames=torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8),
            latency_ms=1e3 * (time.perf_counter() - begun),
            queue_ms=0.5,
            times=SimpleNamespace(denoise_ms=[1.0, 2.0], exchange_ms=None, gather_ms=0.1),
            decode_ms=0.2,
            hand_over_ms=0.3,
        )

    def switch_prompt(self, embeds, *, policy="keep"):
        self._engine.switches.append((self.number, self._next, policy))
        return 1.0

    def cancel(self):
        self._cancelled = True

    def close(self):
        if self.number not in self._engine.closed_sessions:
            self._engine.closed_sessions.append(self.number)


MAX_TOKENS = 64


def fake_tokenize(prompt):
    """A token for each word."""
    words = clean_prompt(prompt).split()
    return PromptTokens(ids=tuple(range(len(words[:MAX_TOKENS]))), truncated=len(words) > MAX_TOKENS)


def fake_encode(prompt):
    if "unencodable" in prompt:
        raise PromptError("the prompt cannot be encoded")
    return torch.zeros(4, 8)
