"""What has been worked out once and can be spared the next time, in the user's cache (`$XDG_CACHE_HOME/causalrt`).

Files, such as TensorRT's measured times, are written whole or not at all. Of folders at most so many of a kind are kept; one
that a process uses is locked, and stays.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from causalrt.atomic_files import whole_file
from causalrt.owned_paths import sweep
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


@contextlib.contextmanager
def kept_folder(kind: str, key: str, *, complete: Callable[[Path], None], most: int) -> Iterator[Path]:
    """A folder of the cache, which stays while the block runs. Other processes that want one of the kind wait for `complete`.

    Args:
        kind: a part of the cache that holds nothing but what this makes.
        key: the folder's name, of everything that its contents depend on.
        complete: makes the folder at a path, or checks the one that is there, and makes it anew if that is damaged.
        most: folders of the kind that are kept, those that were used last.

    Raises:
        OSError: there can be no cache, or it is somebody else's.
    """
    path = cache_file(kind, key)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (path.parent, path.parent.parent):
        if folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to somebody else")
    with contextlib.ExitStack() as use:
        with _locked(path.parent, fcntl.LOCK_EX):
            complete(path)
            use.enter_context(_locked(path, fcntl.LOCK_SH))
            os.utime(path)
            _remove_oldest(path.parent, most)
        yield path


def _remove_oldest(folder: Path, most: int) -> None:
    """Remove all folders but the last used ones, those that are in use, and what their builders still write."""
    sweep(folder, prefix=r"\..*\.", suffix=r"\.(partial|old)")
    kept = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime_ns, reverse=True)[most:]:
        with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, operation)
        yield
    finally:
        os.close(lock)
