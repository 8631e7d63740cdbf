"""Files and folders that appear whole or not at all: written beside their place under hidden names, and renamed at the end.

What a killed writer leaves behind is removed by the next one that writes to the same place (see `owned_paths.py`), unless
that leaves it to somebody else.
"""

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from causalrt.owned_paths import own, sweep

logger = logging.getLogger(__name__)

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""Error numbers of a file system, a kernel or a system call filter that cannot exchange two names."""
_CHANGED = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
"""Error numbers of a rename that fails because another writer was faster."""


@contextlib.contextmanager
def atomic_file(path: Path, *, private: bool = False, sweeps: bool = True) -> Iterator[Path]:
    """Where to write what `path` is to hold: renamed to it if the block ends well, and removed if not.

    Args:
        path: the file; what is there until then stays as it is.
        private: readable by its owner alone, rather than by whom the umask lets.
        sweeps: remove what killed writers of this file have left, which lists the folder. A folder of many files is better
            swept once, by whoever opens it.

    Raises:
        OSError: it cannot be made or renamed; its folder is not there, say.
    """
    path = path.absolute()
    prefix = f".{path.name}."
    if sweeps:
        sweep(path.parent, prefix=re.escape(prefix), suffix=r"\.partial")
    with own(path.parent, prefix=prefix, suffix=".partial", folder=False) as partial:
        try:
            yield partial
            if not private:
                partial.chmod(0o666 & ~_umask())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, *, replaces: str | None = None, private: bool = False) -> Iterator[Path]:
    """A new folder to fill: renamed to `target` if the block ends well, and removed if not.

    It takes the place of an old folder in one step, and the old one is removed afterwards, so whoever opens `target` finds one
    or the other. Files of the old folder that are open or mapped stay readable.

    Args:
        target: where it goes; its parent folder must exist. A link is followed, and what it points to is replaced.
        replaces: a folder that is at `target` by then gives way if it holds a file of this name; no other does.
        private: open to its owner alone, rather than to whom the umask lets.

    Raises:
        OSError: it cannot be made or renamed, something else being at `target`, say; what is there stays.
    """
    target = Path(os.path.realpath(target))
    _sweep_beside(target, replaces)
    with own(target.parent, prefix=f".{target.name}.", suffix=".partial", folder=True) as work:
        try:
            yield work
            if not private:
                work.chmod(0o777 & ~_umask())
            _place_folder(work, target, replaces)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    _sweep_beside(target, replaces)


def _sweep_beside(target: Path, replaces: str | None) -> None:
    """Remove the incomplete folders of killed writers, and the folders that they had replaced but not yet removed."""
    prefix = re.escape(f".{target.name}.")
    sweep(target.parent, prefix=prefix, suffix=r"\.partial")
    if replaces is not None and (target / replaces).is_file():
        sweep(target.parent, prefix=prefix, suffix=r"\.old", keep=lambda old: not (old / replaces).is_file())


def _place_folder(work: Path, target: Path, replaces: str | None) -> None:
    """Rename `work` to `target`; a folder that was there is at `work` afterwards."""
    old = work.with_suffix(".old")  # a sweep keeps it unless `replaces` is in it
    while True:
        try:
            os.rename(work, target)
            return
        except OSError as error:
            taken = error.errno in (errno.EEXIST, errno.ENOTEMPTY)
            if not taken or replaces is None or not (target / replaces).is_file():
                raise
        os.rename(work, old)
        try:
            _exchange(old, target)
            if (old / replaces).is_file():
                return
            _exchange(old, target)  # another process has put something else there meanwhile: give it back
        except OSError as error:
            if error.errno not in _CHANGED:
                raise
        finally:
            with contextlib.suppress(OSError):
                os.rename(old, work)


def _exchange(old: Path, target: Path) -> None:
    """Exchange the folders at two paths, in one step where the system can (Linux's renameat2, which Python does not offer)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        code = errno.ENOSYS
    else:
        names = _AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(target)
        code = ctypes.get_errno() if renameat2(*names, _RENAME_EXCHANGE) else 0
    if not code:
        return
    if code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(target))
    logger.warning("nothing is at %s for a moment: folders cannot be exchanged there (%s)", target, os.strerror(code))
    work = old.with_suffix(".partial")
    os.rename(old, work)
    os.rename(target, old)
    try:
        os.rename(work, target)
    except BaseException:
        if not target.exists():
            os.rename(old, target)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
