"""Work on a bundle that may be damaged in any way: what fails is a finding."""

import logging
from collections.abc import Callable
from typing import TypeVar

from causalrt.errors import CausalRTError, RankError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def attempt(what: str, work: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result, or what went wrong: of a damaged bundle anything may be expected, and is a finding.

    Raises:
        CausalRTError: something that is no damage, such as a library that is missing.
    """
    try:
        return work(), ""
    except CausalRTError as error:
        if isinstance(error, RankError):
            return None, f"{what} failed: {error}"
        raise
    except Exception as error:
        logger.exception("%s failed", what)
        return None, f"{what} failed: {type(error).__name__}: {error}"
