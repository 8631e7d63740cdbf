"""The files of jobs: a record `ID.json` and a video `ID.mp4` each, in a folder that only the server's user reads.

A record and a video appear whole or not at all. What a stopped server left is taken up again: finished jobs as they are,
unfinished ones as failed, halves removed.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from causalrt.atomic_files import whole_file
from causalrt.errors import RequestError
from causalrt.owned_paths import TemporaryFolder

log = logging.getLogger(__name__)

Status = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: tuple[Status, ...] = ("queued", "in_progress", "completed", "failed")
JOB_ID = re.compile(r"video_[0-9a-f]{32}")


@dataclass(kw_only=True, slots=True)
class Job:
    """A video that was asked for. Times are Unix times in seconds; `seconds` is as it was given."""

    id: str
    owner: str
    model: str
    prompt: str
    seed: int
    size: str
    seconds: str
    num_frames: int
    num_chunks: int
    created_at: int
    status: Status = "queued"
    progress: int = 0
    completed_at: int | None = None
    expires_at: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    num_bytes: int = 0
    prompt_cut_to: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will become of it any more."""
        return self.status in ("completed", "failed")


class Spool:
    """The folder."""

    def __init__(self, folder: Path | None) -> None:
        """Use `folder`, made if it is missing; None makes one that goes with `close`.

        Raises:
            RequestError: it cannot be used, or another server uses it.
        """
        self._temporary: TemporaryFolder | None = None
        try:
            if folder is None:
                self._temporary = TemporaryFolder("spool")
                folder = self._temporary.path
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RequestError(f"the spool {folder} cannot be used: {error}; give another with --spool") from None
        self.folder = folder.absolute()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RequestError(f"another server uses the spool {folder}; give another with --spool") from None

    def load(self) -> Iterator[Job]:
        """The jobs that are there, oldest first; everything that belongs to none is removed."""
        jobs = []
        for path in self.folder.glob("video_*.json"):
            try:
                job = Job(**json.loads(path.read_text()))
                if JOB_ID.fullmatch(job.id) is None or path.stem != job.id or job.status not in STATUSES:
                    raise ValueError(f"its id is {job.id!r} and its status {job.status!r}")
            except (OSError, ValueError, TypeError) as error:
                log.warning("the job record %s is unusable and removed: %s", path, error)
                path.unlink(missing_ok=True)
                continue
            if job.status == "completed" and not self.video(job.id).is_file():
                path.unlink()
                continue
            jobs.append(job)
        known = {job.id for job in jobs if job.status == "completed"}
        for path in self.folder.iterdir():
            if path.suffix == ".partial" or (path.suffix == ".mp4" and path.stem not in known):
                path.unlink(missing_ok=True)
        yield from sorted(jobs, key=lambda job: (job.created_at, job.id))

    def video(self, job_id: str) -> Path:
        """Where the video of a job is, or will be."""
        assert JOB_ID.fullmatch(job_id)
        return self.folder / f"{job_id}.mp4"

    def save(self, job: Job) -> None:
        """Write a job's record.

        Raises:
            OSError: a full disk, say.
        """
        path = self.folder / f"{job.id}.json"
        with whole_file(path, private=True) as partial:
            partial.write_text(json.dumps(asdict(job)))

    def remove(self, job_id: str) -> None:
        """Remove a job's record and video."""
        with contextlib.suppress(OSError):
            (self.folder / f"{job_id}.json").unlink(missing_ok=True)
            self.video(job_id).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another server have the folder; one that was made for this server goes."""
        os.close(self._lock)
        if self._temporary is not None:
            self._temporary.remove()
