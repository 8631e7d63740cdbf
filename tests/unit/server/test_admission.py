"""Slots, queue and rate, without a server."""

import asyncio

import pytest

from causalrt.server.admission import Admission, LeftError, RateLimit
from causalrt.server.api_errors import ApiError


def run(test):
    asyncio.run(test())


def test_first_come_first_served():
    async def test():
        admission = Admission(slots=2, max_queue=2)
        first, second, third, fourth = (admission.enter() for _ in range(4))
        assert (admission.running, admission.waiting) == (2, 2)
        await first.admitted()
        await second.admitted()
        assert [await third.moved(), await fourth.moved()] == [1, 2]
        with pytest.raises(ApiError) as refused:
            admission.enter()
        assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "busy", 5)
        second.leave()
        second.leave()  # harmless
        await third.admitted()
        assert await fourth.moved() == 1
        for ticket in (first, third, fourth):
            ticket.leave()
        await admission.empty()
        assert (admission.running, admission.waiting) == (0, 0)

    run(test)


def test_without_a_queue_one_is_served_or_refused():
    async def test():
        admission = Admission(slots=1, max_queue=0)
        ticket = admission.enter()
        with pytest.raises(ApiError):
            admission.enter()
        ticket.leave()
        await admission.enter().admitted()

    run(test)


def test_who_gives_up_lets_the_others_move():
    async def test():
        admission = Admission(slots=1, max_queue=3)
        running, first, second = (admission.enter() for _ in range(3))
        first.give_up("stopped")
        with pytest.raises(LeftError, match="stopped"):
            await first.admitted()
        assert await second.moved() == 1
        running.give_up("stopped")  # has its slot: without effect
        assert admission.running == 1

    run(test)


def test_closing_sends_those_away_that_wait():
    async def test():
        admission = Admission(slots=1, max_queue=3)
        running, waiting = admission.enter(), admission.enter()
        admission.close("going", reason="draining")
        with pytest.raises(LeftError, match="draining"):
            await waiting.admitted()
        with pytest.raises(ApiError, match="going") as refused:
            admission.enter()
        assert refused.value.status == 503
        empty = asyncio.create_task(admission.empty())
        await asyncio.sleep(0)
        assert not empty.done()
        running.leave()
        await empty

    run(test)


def test_more_or_fewer_slots_act_at_once():
    async def test():
        admission = Admission(slots=1, max_queue=3)
        first, second, third = (admission.enter() for _ in range(3))
        admission.resize(2)
        assert (admission.running, admission.waiting) == (2, 1)
        admission.resize(1)
        first.leave()
        assert (admission.running, admission.waiting) == (1, 1)
        second.leave()
        await third.admitted()

    run(test)


def test_the_rate_is_saved_up_to_a_minutes_worth():
    now = [0.0]
    rate = RateLimit(60, clock=lambda: now[0])
    for _ in range(60):
        rate.take("alice")
    with pytest.raises(ApiError) as refused:
        rate.take("alice")
    assert (refused.value.code, refused.value.retry_after_s) == ("rate_limited", 1)
    rate.take("bob")
    now[0] += 2.0
    rate.take("alice")
    rate.take("alice")
    with pytest.raises(ApiError):
        rate.take("alice")
    now[0] += 3600.0
    for _ in range(60):
        rate.take("alice")
    with pytest.raises(ApiError):
        rate.take("alice")


def test_a_slow_rate_says_how_long_to_wait():
    now = [0.0]
    rate = RateLimit(2, clock=lambda: now[0])
    rate.take("alice")
    rate.take("alice")
    now[0] += 10.0
    with pytest.raises(ApiError) as refused:
        rate.take("alice")
    assert refused.value.retry_after_s == 20


def test_strangers_do_not_fill_the_memory():
    rate = RateLimit(1)
    for number in range(10_100):
        rate.take(str(number))
    assert len(rate._buckets) <= 10_000
