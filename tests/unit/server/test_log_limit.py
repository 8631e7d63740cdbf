"""A log that strangers cannot fill."""

import logging
from types import SimpleNamespace

from causalrt.server.log_limit import LogLimit, limited_logs


def test_a_message_is_logged_ten_times_a_minute_and_the_rest_is_counted(caplog):
    clock = SimpleNamespace(now=0.0)
    logger = logging.getLogger("test_log_limit.counted")
    logger.addFilter(LogLimit(clock=lambda: clock.now))
    for number in range(1000):
        logger.warning("refused %d", number)
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == [
        *(f"refused {n}" for n in range(10)),
        "something else",
    ]
    caplog.clear()
    clock.now = 61.0
    for number in range(20):
        logger.warning("refused %d", number)
    assert len(caplog.records) == 10
    assert caplog.records[0].getMessage() == "refused 0 (and 990 times more in the last 61 s)"
    assert caplog.records[1].getMessage() == "refused 1"


def test_the_limit_ends_with_the_block(caplog):
    logger = logging.getLogger("test_log_limit.block")
    with limited_logs(logger.name):
        for _ in range(50):
            logger.warning("refused")
    assert len(caplog.records) == 10
    logger.warning("refused")
    assert len(caplog.records) == 11
