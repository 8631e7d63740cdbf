"""Results that are kept in the user's cache (`$XDG_CACHE_HOME/causalrt`), so that they need not be computed again.

Files, such as TensorRT's timings of kernels, are written atomically. A limited number of folders of each kind is kept; a folder
in use is locked and is not removed.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from causalrt.atomic_files import atomic_file
from causalrt.owned_paths import sweep
from causalrt.regular_files import regular_file

logger = logging.getLogger(__name__)


def cache_folder(kind: str) -> Path:
    """`$XDG_CACHE_HOME/causalrt/<kind>`; `~/.cache` and then the temporary folder stand in for an unset `$XDG_CACHE_HOME`."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "causalrt"
    except RuntimeError:
        base = Path(tempfile.gettempdir()) / f"causalrt-{os.getuid()}"
    return base / kind


def cache_file(kind: str, name: str) -> Path:
    """The path of `name` in the cache folder of its kind."""
    return cache_folder(kind) / name


def read_cache(path: Path) -> bytes:
    """The contents of a cached file; empty if it does not exist or cannot be read."""
    try:
        return regular_file(path).read_bytes()
    except OSError:
        return b""


def keep_in_cache(path: Path, data: bytes | memoryview) -> bool:
    """Write a file to the cache. A failure is logged and returned as False."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)
        return False
    return True


@contextlib.contextmanager
def kept_folder(kind: str, key: str, *, complete: Callable[[Path], None], most: int) -> Iterator[Path]:
    """Use a folder of the cache, which is not removed while the block runs.

    Args:
        kind: the part of the cache that holds the folders of this kind, and nothing else.
        key: the folder's name, which must differ wherever its contents would.
        complete: makes the folder at a path; checks one that is there, and replaces it if it is damaged. Meanwhile other
            processes that want a folder of the kind wait.
        most: how many folders of the kind are kept: those that were used last.

    Raises:
        OSError: the cache cannot be written, or belongs to another user.
    """
    path = cache_file(kind, key)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (path.parent, path.parent.parent):
        if folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user")
    with contextlib.ExitStack() as use:
        with _locked(path.parent, fcntl.LOCK_EX):
            complete(path)
            use.enter_context(_locked(path, fcntl.LOCK_SH))
            os.utime(path)
            _remove_oldest(path.parent, most)
        yield path


def remove_unused(path: Path) -> None:
    """Remove a folder of the cache that no process uses.

    Raises:
        OSError: a process uses it, or it is no folder, or cannot be removed.
    """
    with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
        shutil.rmtree(path)


def _remove_oldest(folder: Path, most: int) -> None:
    """Remove all folders but those that were used last or are in use, and what killed builders have left."""
    sweep(folder, prefix=r"\..*\.", suffix=r"\.(partial|old)")
    kept = [path for path in folder.iterdir() if not path.name.startswith(".")]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime_ns, reverse=True)[most:]:
        with contextlib.suppress(OSError):
            remove_unused(path)


@contextlib.contextmanager
def _locked(folder: Path, operation: int) -> Iterator[None]:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, operation)
        yield
    finally:
        os.close(lock)
