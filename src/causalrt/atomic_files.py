"""Files and folders that are written atomically: under hidden names beside their place, and renamed at the end.

What a killed writer leaves behind is removed by the next writer to the same place (see `owned_paths.py`).
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
    """Yield a temporary path to write to. It is renamed to `path` if the block succeeds, and removed otherwise.

    Args:
        path: the file; an existing file stays as it is until then.
        private: make it readable by its owner only, instead of applying the umask.
        sweeps: first remove what killed writers of this file have left, which lists the folder. A folder of many files is
            better swept once, by the code that opens it.

    Raises:
        OSError: it cannot be created or renamed, for example because its folder is missing.
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
    """Yield a new folder to fill. It is renamed to `target` if the block succeeds, and removed otherwise.

    It replaces an old folder in one step, and the old one is removed afterwards, so a reader of `target` finds one or the
    other. Files of the old folder that are open or mapped stay readable.

    Args:
        target: where it goes; its parent folder must exist. A link is followed, and what it points to is replaced.
        replaces: a folder at `target` is replaced if it holds a file of this name, and no other folder is.
        private: make it accessible to its owner only, instead of applying the umask.

    Raises:
        OSError: it cannot be created or renamed, for example because something else is at `target`, which then stays.
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
            _exchange(old, target)  # another process has put something else there meanwhile; put it back
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
