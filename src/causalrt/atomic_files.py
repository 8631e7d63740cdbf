"""Files and folders that appear whole or not at all: written beside their place under hidden names, and renamed at the end."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Where to write what `path` is to hold: renamed to it if the block ends well, and removed if not.

    Args:
        path: the file; what is there until then stays as it is.
        private: readable by its owner alone, rather than by whom the umask lets.

    Raises:
        OSError: it cannot be made or renamed; its folder is not there, say.
    """
    path = path.absolute()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield partial
        if not private:
            partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(target: Path, *, replaces: str | None = None, private: bool = False) -> Iterator[Path]:
    """A new folder to fill: renamed to `target` if the block ends well, and removed if not.

    Args:
        target: where it goes; the folder above must be there.
        replaces: a folder that is at `target` by then gives way if it holds a file of this name; no other does.
        private: open to its owner alone, rather than to whom the umask lets.

    Raises:
        OSError: it cannot be made or renamed, something else being at `target`, say; what is there stays.
    """
    target = target.absolute()
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield work
        if not private:
            work.chmod(0o777 & ~_umask())
        if replaces is not None and (target / replaces).is_file():
            _replace_folder(target, work)
        else:
            os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace_folder(target: Path, work: Path) -> None:
    """Put `work` where `target` is; what was there is put back if that fails."""
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        os.rename(target, retired / "old")
        try:
            os.rename(work, target)
        except BaseException:
            if not target.exists():
                os.rename(retired / "old", target)
            raise
        shutil.rmtree(retired / "old", ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # not empty: what was there could not be put back, so it stays here
            retired.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
