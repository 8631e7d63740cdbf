"""Temporary files and folders with an owner: the process that made one holds a lock on it, which ends with the process.

A path whose lock is free was left behind by a process that was killed, and is removed by the next process that works in the
same place. Only paths that are named as `own` names them, belong to this user and can be locked are ever removed. The locks
are `flock`s on the files and folders themselves, which systemd-tmpfiles respects, too: it does not clean up what is in use.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_TOKEN = "[0-9a-f]{12}"
_KINDS = "[a-z]+"


@contextlib.contextmanager
def own(parent: Path, *, prefix: str, suffix: str = "", folder: bool) -> Iterator[Path]:
    """A new file or folder `<prefix><token><suffix>` in `parent` for this user alone, locked until the block ends.

    The block renames it or removes it: whatever is still there afterwards is removed by a later `sweep`.

    Raises:
        OSError: it cannot be made.
    """
    path, lock = _make(parent, prefix, suffix, folder=folder)
    try:
        yield path
    finally:
        os.close(lock)


def sweep(parent: Path, *, prefix: str, suffix: str, keep: Callable[[Path], bool] = lambda path: False) -> None:
    """Remove what `own` made in `parent` and whose owner has ended; what cannot be removed stays.

    Args:
        parent: the folder to look into.
        prefix: regular expression of what comes before the token.
        suffix: regular expression of what comes after it.
        keep: paths for which this returns True stay.
    """
    pattern = re.compile(prefix + _TOKEN + suffix)
    try:
        with os.scandir(parent) as entries:
            named = [entry for entry in entries if pattern.fullmatch(entry.name)]
        # Devices and pipes are left alone, since merely opening one can have an effect.
        plain = [each for each in named if each.is_dir(follow_symlinks=False) or each.is_file(follow_symlinks=False)]
    except OSError:
        return
    for path in (parent / entry.name for entry in plain):
        with contextlib.suppress(OSError), _claimed(path):
            if keep(path):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


class TemporaryFolder:
    """A temporary folder `causalrt-<kind>-<token>`, which `remove` or the end of the `with` block removes.

    Attributes:
        path: the folder, readable by this user alone.
    """

    def __init__(self, kind: str) -> None:
        """Make it, and remove the folders of other owners that have ended.

        Args:
            kind: what it is for, in lower-case letters.

        Raises:
            OSError: it cannot be made.
        """
        assert re.fullmatch(_KINDS, kind)
        parent = Path(tempfile.gettempdir())
        sweep(parent, prefix=f"causalrt-{_KINDS}-", suffix="")
        self._owned = contextlib.ExitStack()
        self.path = self._owned.enter_context(own(parent, prefix=f"causalrt-{kind}-", folder=True))

    def remove(self) -> None:
        """Remove the folder with everything in it. Harmless when called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._owned.close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


def _make(parent: Path, prefix: str, suffix: str, *, folder: bool) -> tuple[Path, int]:
    while True:
        path = parent / f"{prefix}{secrets.token_hex(6)}{suffix}"
        if folder:
            path.mkdir(mode=0o700)
        else:
            path.touch(mode=0o600, exist_ok=False)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:  # a sweep has removed it already
            continue
        except OSError:
            (path.rmdir if folder else path.unlink)()
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a sweep is about to remove it
            os.close(lock)
            continue
        except OSError:  # the file system has no locks, so that no sweep can take one either
            return path, lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return path, lock
        os.close(lock)


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold the lock of a path of this user.

    Raises:
        OSError: another process holds it, or the path is another user's.
    """
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid != os.geteuid():
            raise PermissionError(path)
        yield
    finally:
        os.close(lock)
