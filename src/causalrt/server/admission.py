"""Admission control for generations: a number of slots, a bounded queue in front of them, and a rate limit per client.

    enter() -> Ticket: waits in the queue -> holds a slot -> leave()

Everything here is called on the event loop's thread.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from causalrt.server.api_errors import busy, not_ready, rate_limited

RETRY_S = 5.0
MOST_KEYS = 10_000


class LeftError(Exception):
    """A ticket left the queue before it got a slot; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Ticket:
    """A place in the queue and later a slot. Its holder must call `leave` at the end."""

    def __init__(self, admission: "Admission") -> None:
        self._admission = admission
        self._changed = asyncio.Event()
        self._left: str | None = None
        self.position = 0

    async def moved(self) -> int:
        """Wait for the place in the queue to change and return it, counted from 1; 0 once the ticket has a slot.

        Raises:
            LeftError: the ticket left the queue.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._left is not None:
            raise LeftError(self._left)
        return self.position

    async def admitted(self) -> None:
        """Wait until the ticket has a slot.

        Raises:
            LeftError: the ticket left the queue.
        """
        while await self.moved():
            pass

    def give_up(self, reason: str) -> None:
        """Leave the queue; this has no effect once the ticket has a slot."""
        if self.position:
            self._left = reason
            self.leave()
            self._changed.set()

    def leave(self) -> None:
        """Free the slot or the place in the queue. Further calls have no effect."""
        self._admission.free(self)

    def move(self, position: int) -> None:
        """Set the place in the queue; `Admission` calls this."""
        self.position = position
        self._changed.set()


class Admission:
    """The slots and the queue in front of them; first come, first served."""

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
        """Number of tickets that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of tickets in the queue."""
        return len(self._queue)

    @property
    def slots(self) -> int:
        """Number of generations that may run at once."""
        return self._slots

    def resize(self, slots: int) -> None:
        """Change the number of slots; running generations continue."""
        self._slots = slots
        self._advance()

    def enter(self) -> Ticket:
        """Return a ticket, which may get a slot at once.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server accepts no more generations.
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
        """Refuse new tickets with `message`, and remove the waiting ones from the queue with `reason`."""
        self._closed = message
        for ticket in list(self._queue):
            ticket.give_up(reason)

    async def empty(self) -> None:
        """Wait until no ticket is running or waiting."""
        await self._empty.wait()

    def free(self, ticket: Ticket) -> None:
        """Release the slot or place of a ticket."""
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
    """A token bucket per key: `per_minute` events a minute, or as many at once after a quiet minute."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = float(per_minute)
        self._per_s = per_minute / 60
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str) -> None:
        """Count one event for `key`.

        Raises:
            ApiError: 429, with the time after which the next event is allowed.
        """
        now = self._clock()
        left, then = self._buckets.pop(key, (self._most, now))
        left = min(self._most, left + (now - then) * self._per_s)
        allowed = left >= 1
        self._buckets[key] = left - allowed, now
        if len(self._buckets) > MOST_KEYS:
            self._buckets.popitem(last=False)
        if not allowed:
            raise rate_limited(round((1 - left) / self._per_s, 3))
