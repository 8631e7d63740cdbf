"""Who may begin a generation, and when: a number of slots, a bounded queue before them, and a rate for each client.

    enter() -> Ticket: waits in the queue -> has a slot -> leave()

Belongs to the event loop's thread.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from causalrt.server.api_errors import ApiError, busy, not_ready, rate_limited

RETRY_S = 5.0
MOST_KEYS = 10_000


class LeftError(Exception):
    """A ticket gave up its place before its turn came; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Ticket:
    """A place in the queue, then a slot. Whoever holds it calls `leave` in the end."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self._changed = asyncio.Event()
        self._left: str | None = None
        self.position = 0

    async def moved(self) -> int:
        """The place in the queue, from 1, whenever it has changed; 0 once there is a slot.

        Raises:
            LeftError: the place was given up.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._left is not None:
            raise LeftError(self._left)
        return self.position

    async def admitted(self) -> None:
        """Return when there is a slot.

        Raises:
            LeftError: the place was given up.
        """
        while await self.moved():
            pass

    def give_up(self, reason: str) -> None:
        """Leave the queue; without effect on one that has its slot."""
        if self.position:
            self._left = reason
            self.leave()
            self._changed.set()

    def leave(self) -> None:
        """Free the slot or the place. Harmless when called again."""
        self._admission.free(self)

    def move(self, position: int) -> None:
        """The admission says where the ticket stands now."""
        self.position = position
        self._changed.set()


class Admission:
    """The slots and the queue before them; first come, first served."""

    def __init__(self, *, slots: int, max_queue: int) -> None:
        self._slots = slots
        self._max_queue = max_queue
        self._running: set[Ticket] = set()
        self._queue: deque[Ticket] = deque()
        self._closed: str | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def running(self) -> int:
        """Tickets with a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return len(self._queue)

    @property
    def slots(self) -> int:
        """How many may run at once."""
        return self._slots

    def resize(self, slots: int) -> None:
        """Another number of slots; those that run go on."""
        self._slots = slots
        self._advance()

    def enter(self) -> Ticket:
        """A ticket, which may have its slot at once.

        Raises:
            ApiError: 429, the queue is full; 503, nobody is taken any more.
        """
        if self._closed:
            raise not_ready(self._closed)
        free = len(self._running) < self._slots and not self._queue
        if not free and len(self._queue) >= self._max_queue:
            raise busy(
                f"all {self._slots} sessions and the {self._max_queue} places of the queue are taken",
                retry_after_s=RETRY_S,
            )
        ticket = Ticket(self)
        self._queue.append(ticket)
        self._empty.clear()
        self._advance()
        return ticket

    def close(self, message: str, *, reason: str) -> None:
        """Take nobody any more (`message` says why), and send those away that wait."""
        self._closed = message
        for ticket in list(self._queue):
            ticket.give_up(reason)

    async def empty(self) -> None:
        """Return when nobody runs or waits."""
        await self._empty.wait()

    def free(self, ticket: Ticket) -> None:
        """Take a ticket's slot or place back."""
        self._running.discard(ticket)
        if ticket in self._queue:
            self._queue.remove(ticket)
        self._advance()
        if not self._running and not self._queue:
            self._empty.set()

    def _advance(self) -> None:
        while self._queue and len(self._running) < self._slots:
            ticket = self._queue.popleft()
            self._running.add(ticket)
            ticket.move(0)
        for place, ticket in enumerate(self._queue, 1):
            if ticket.position != place:
                ticket.move(place)


class RateLimit:
    """So many a minute for each key, all of them at once if they were saved up (a token bucket)."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_minute)
        self._per_s = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> None:
        """Count one.

        Raises:
            ApiError: 429, with the time after which there is one again.
        """
        now = self._clock()
        left, then = self._buckets.pop(key, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_s)
        problem: ApiError | None = None
        if left >= 1:
            left -= 1
        else:
            problem = rate_limited(round((1 - left) / self._per_s, 3))
        self._buckets[key] = left, now
        if len(self._buckets) > MOST_KEYS:
            self._buckets.popitem(last=False)
        if problem:
            raise problem
