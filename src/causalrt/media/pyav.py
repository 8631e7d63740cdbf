"""Imports PyAV when it is needed."""

from typing import Any

from causalrt.errors import ExecutorError
from causalrt.install_hint import install_package


def pyav() -> Any:
    """Import PyAV and return it.

    Raises:
        ExecutorError: PyAV is not installed.
    """
    try:
        import av
        import av.filter
        import av.video.reformatter
    except ImportError as error:
        raise ExecutorError(
            f"video files need PyAV, which cannot be imported ({error}); {install_package('av')}"
        ) from error
    return av
