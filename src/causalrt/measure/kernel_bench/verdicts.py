"""Verdicts: whether a claim about two sides is met, by the ratio of their times in the same round."""

import math
import sys
from collections.abc import Collection

from causalrt.measure.kernel_bench.timing import Spread


def judge(share_of_limit: Spread) -> str:
    """Of a claim that a ratio to its limit is at most 1: `met`, `not met`, or `none`, where the spread is larger.

    Ratios are compared as such: 2 is as far from 1 as 1/2 is.
    """
    if abs(math.log(share_of_limit.median)) <= math.log(share_of_limit.p90 / share_of_limit.p10):
        return "none"
    return "met" if share_of_limit.median < 1 else "not met"


def judge_all(verdicts: Collection[str]) -> str:
    """Of a claim about several cases: met where each is."""
    return next((verdict for verdict in ("not met", "none") if verdict in verdicts), "met")


def progress(line: str) -> None:
    """On stderr."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
