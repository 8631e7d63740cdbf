"""Files that can be read to an end: no pipe, which would be waited for, and no device, which may have none."""

import stat
from pathlib import Path

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
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise OSError(f"it is {_OTHERS.get(kind, 'something else')}, not a regular file")
    return path
