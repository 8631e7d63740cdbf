"""What TensorRT has worked out once and can be spared the next time: files in the user's cache, written whole or not at all."""

import logging
import os
import tempfile
from pathlib import Path

from causalrt.atomic_files import whole_file
from causalrt.regular_files import regular_file

logger = logging.getLogger(__name__)


def cache_file(kind: str, name: str) -> Path:
    """Where `name` is kept, under `$XDG_CACHE_HOME/causalrt/<kind>`; without a home folder, beside temporary files."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "causalrt"
    except RuntimeError:
        base = Path(tempfile.gettempdir()) / f"causalrt-{os.getuid()}"
    return base / kind / name


def read_cache(path: Path) -> bytes:
    """What is kept there; nothing if there is nothing, or it cannot be read."""
    try:
        return regular_file(path).read_bytes()
    except OSError:
        return b""


def keep_in_cache(path: Path, data: bytes | memoryview) -> bool:
    """Keep it for the next time; nothing fails for want of a cache."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)
        return False
    return True
