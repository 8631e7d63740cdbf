"""The files of jobs: a record `ID.json` and a video `ID.mp4` each, in a folder that is marked as a spool.

Records and videos are written atomically, and only the server's user can read them. After a restart finished jobs are
unchanged, unfinished ones have failed, and incomplete files are removed. Only files whose names have the form that a
spool uses are ever removed, and none that belong to a record that this version cannot read.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from causalrt.atomic_files import atomic_file
from causalrt.errors import RequestError
from causalrt.owned_paths import TemporaryFolder

log = logging.getLogger(__name__)

Status = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: tuple[Status, ...] = ("queued", "in_progress", "completed", "failed")
JOB_ID = re.compile(r"video_[0-9a-f]{32}")
SCHEMA = 1
"""Version of the records; files of another version are left alone."""
LOCK = ".lock"
MARK = b"causalrt spool\n"
"""Content of the lock file, which marks a folder as a spool."""
FILE = re.compile(rf"({JOB_ID.pattern})\.(json|mp4)|\.{JOB_ID.pattern}\.(json|mp4)\..+\.partial")
Natural = Annotated[int, Field(ge=0, lt=2**64)]


@dataclass(kw_only=True, slots=True)
class Job:
    """A requested video. Times are Unix times in seconds; `seconds` is the text that the client sent."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    id: str
    owner: str
    model: str
    prompt: str
    seed: Natural
    size: str
    seconds: str
    num_frames: Natural
    num_chunks: Natural
    created_at: Natural
    status: Status = "queued"
    progress: Natural = 0
    completed_at: Natural | None = None
    expires_at: Natural | None = None
    error_code: str | None = None
    error_message: str | None = None
    num_bytes: Natural = 0
    prompt_cut_to: Natural | None = None

    @property
    def ended(self) -> bool:
        """Whether the job has completed or failed."""
        return self.status in ("completed", "failed")


_job = TypeAdapter(Job)


class JobStore:
    """The spool folder, locked for one server."""

    def __init__(self, folder: Path | None) -> None:
        """Use `folder`, which is created if it is missing; None creates a temporary one, which `close` removes.

        An existing folder keeps its permissions.

        Raises:
            RequestError: the folder cannot be used, is not a spool and not empty, or is used by another server.
        """
        self._temporary: TemporaryFolder | None = None
        try:
            if folder is None:
                self._temporary = TemporaryFolder("spool")
                folder = self._temporary.path
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _claim(folder)
        except BlockingIOError:
            raise RequestError(f"another server uses the spool {folder}; give another with --spool") from None
        except OSError as error:
            raise RequestError(f"the spool {folder} cannot be used: {error}; give another with --spool") from None
        self.folder = folder.absolute()
        if self.folder.stat().st_mode & stat.S_IWOTH:
            log.warning("every user of this machine may write to the spool %s and replace its videos", folder)

    def load(self) -> Iterator[Job]:
        """Read the stored jobs, oldest first.

        Files that belong to no job are removed if their names have the form that a spool uses. Records that cannot be read and
        their videos are kept, and logged.
        """
        jobs = []
        with_video = set()
        for path in self._files(".json"):
            try:
                job = _read(path)
                if job.status == "completed":
                    _check_regular(self.video(job.id))
                    with_video.add(job.id)
                jobs.append(job)
            except FileNotFoundError:
                log.warning("the video of job %s is gone, so its record is removed", path.stem)
                self.remove(path.stem)
            except (OSError, ValueError, RecursionError) as error:
                log.warning("the job record %s is left alone, with its video: %.300s", path, error)
                with_video.add(path.stem)
        for path in [*self._files(".partial"), *(path for path in self._files(".mp4") if path.stem not in with_video)]:
            with contextlib.suppress(OSError):
                path.unlink()
        yield from sorted(jobs, key=lambda job: (job.created_at, job.id))

    def _files(self, suffix: str) -> list[Path]:
        return [path for path in self.folder.iterdir() if FILE.fullmatch(path.name) and path.suffix == suffix]

    def video(self, job_id: str) -> Path:
        """Return the path of the video of a job, which need not exist yet."""
        assert JOB_ID.fullmatch(job_id)
        return self.folder / f"{job_id}.mp4"

    def save(self, job: Job) -> None:
        """Write a job's record.

        Raises:
            OSError: the record cannot be written, for example because the disk is full.
        """
        path = self.folder / f"{job.id}.json"
        with atomic_file(path, private=True, sweeps=False) as partial:  # `load` sweeps
            partial.write_text(json.dumps({"schema": SCHEMA, **asdict(job)}))

    def remove(self, job_id: str) -> None:
        """Remove a job's record and video."""
        with contextlib.suppress(OSError):
            (self.folder / f"{job_id}.json").unlink(missing_ok=True)
            self.video(job_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Unlock the folder, and remove it if it is temporary."""
        os.close(self._lock)
        if self._temporary is not None:
            self._temporary.remove()


def check_spool(folder: Path) -> list[str]:
    """Refuse a folder that is used for something else; nothing in it is changed.

    Returns:
        Names of the files in it that do not belong to a spool; empty if the folder does not exist.

    Raises:
        RequestError: the folder is not a spool and not empty, or cannot be read.
    """
    try:
        strange = [name for name in os.listdir(folder) if name != LOCK and not FILE.fullmatch(name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RequestError(f"the spool {folder} cannot be used: {error}; give another with --spool") from None
    if strange and not (folder / LOCK).exists():
        raise _not_a_spool(folder, strange)
    return strange


def _not_a_spool(folder: Path, strange: Sequence[str]) -> RequestError:
    return RequestError(
        f"{folder} is not a spool and not empty: it holds {min(strange, default=LOCK)!r}; give a new or an empty folder with "
        "--spool"
    )


def _claim(folder: Path) -> int:
    """Lock a folder that is a spool or empty for this server; return the file descriptor that holds the lock.

    Raises:
        RequestError: the folder is not a spool and not empty.
        BlockingIOError: another server has locked it.
        OSError: the folder cannot be read or written.
    """
    strange = check_spool(folder)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark = os.pread(lock, len(MARK) + 1, 0)
        if mark != MARK and (mark or strange):
            raise _not_a_spool(folder, strange)
        os.pwrite(lock, MARK, 0)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _read(path: Path) -> Job:
    """Read the job of a record.

    Raises:
        OSError: the record cannot be read.
        ValueError: the file is not a record, or one of another version.
        RecursionError: the JSON is nested too deeply.
    """
    _check_regular(path)
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    schema = record.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema!r}, and this version reads {SCHEMA}")
    try:
        job = _job.validate_json(json.dumps(record))  # strict validation takes dataclasses from JSON alone
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ValueError(": ".join([*map(str, first["loc"]), first["msg"]])) from None
    if job.id != path.stem:
        raise ValueError(f"its id is {job.id!r}")
    return job


def _check_regular(path: Path) -> None:
    """Refuse links, which may lead out of the spool, and pipes, which would block.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is not a regular file.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(f"{path.name} is not a regular file")
