"""Files that can be read to an end: no pipe, which would be waited for, and no device, which may have none."""

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
    """`path` as it is given, checked to be a regular file, or a link to one, as the cache of the Hugging Face hub has them.

    Raises:
        OSError: it is something else, or there is nothing.
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
