"""Files that can be read to their end. Opening a pipe would wait for a writer, and a device may have no end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_OTHERS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_file(path: Path) -> Path:
    """Check that `path` is a regular file, or a link to one as in the cache of the Hugging Face hub, and return it.

    Raises:
        OSError: it is something else, or missing.
    """
    _check_mode(path.stat().st_mode)
    return path


def open_regular_file(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading. The file object's `name` is a descriptor, not a path.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    descriptor = os.open(regular_file(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(os.fstat(descriptor).st_mode)  # another file may have taken its place
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_mode(mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        raise OSError(f"it is {_OTHERS.get(kind, 'something else')}, not a regular file")
