"""PyAV, imported when it is needed."""

from typing import Any

from causalrt.errors import ExecutorError


def pyav() -> Any:
    """Import PyAV and return it.

    Raises:
        ExecutorError: it is not installed.
    """
    try:
        import av
        import av.filter
        import av.video.reformatter
    except ImportError as error:
        raise ExecutorError(
            f"video files need PyAV, which cannot be imported ({error}); pip install 'av>=18.1,<19'"
        ) from error
    return av
