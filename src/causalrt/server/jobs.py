"""Video jobs: accepted, queued, generated into a file, kept for a time, and removed.

    submit -> queued -> in_progress -> completed, its file in the spool
           or -> failed, with a reason, at any time
    delete: at any time; a running job stops before its next chunk

Everything but `_JobOutput`, which a generation's thread calls, runs on the event loop.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch

from causalrt.errors import CausalRTError
from causalrt.media.video_file import Mp4Writer
from causalrt.server.admission import Admission, LeftError, Ticket
from causalrt.server.api_errors import ApiError, not_found, not_ready
from causalrt.server.generation import Control, GenerationRequest, Generator, Switch
from causalrt.server.job_store import STATUSES, Job, JobStore
from causalrt.server.metrics import Metrics
from causalrt.server.model_limits import ModelLimits
from causalrt.server.settings import ServerSettings

log = logging.getLogger(__name__)

EXPIRE_AT_ONCE = 100  # the event loop blocks on the disk meanwhile
ENDINGS = {
    "draining": ("server_shutdown", "the server was shut down before the video was complete; send the request again"),
    "cancelled": ("server_shutdown", "the server was shut down before the video was complete; send the request again"),
}


class _JobOutput:
    """Writes the file of a job, cut to the requested number of frames."""

    def __init__(self, job: Job, path: Path, limits: ModelLimits, metrics: Metrics, *, asked: float) -> None:
        self._job = job
        self._path = path
        self._limits = limits
        self._metrics = metrics
        self._asked = asked
        self._writer: Mp4Writer | None = None
        self._left = job.num_frames

    def started(self, *, text_ms: float) -> None:
        limits = self._limits
        self._writer = Mp4Writer(
            self._path, height=limits.height, width=limits.width, fps=limits.fps, private=True, sweeps=False
        )

    def write(self, frames: torch.Tensor) -> float:
        assert self._writer is not None
        begun = time.perf_counter()
        self._writer.write(frames[: self._left])
        self._left -= min(self._left, len(frames))
        return 1e3 * (time.perf_counter() - begun)

    def chunk_done(self, *, index: int, frames: int, latency_ms: float, stages: dict[str, float | None]) -> None:
        if index == 0:
            self._metrics.first_frame_after("job", time.perf_counter() - self._asked)
        self._job.progress = min(99, 100 * (index + 1) // self._job.num_chunks)

    def paused(self, yes: bool) -> None:
        raise AssertionError("jobs are not paused")

    def switched(self, switch: Switch, *, ms: float, from_chunk: int) -> None:
        raise AssertionError("jobs are not switched")

    def refused(self, error: ApiError) -> None:
        raise AssertionError("jobs are not switched")

    def finish(self) -> bool:
        assert self._writer is not None
        if self._left:  # stopped early; an incomplete video is not kept
            self._writer.discard()
        else:
            self._writer.close()
        return not self._left

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.discard()


class Jobs:
    """All jobs by id, oldest first."""

    def __init__(
        self,
        store: JobStore,
        limits: ModelLimits,
        admission: Admission,
        generator: Generator,
        metrics: Metrics,
        settings: ServerSettings,
    ) -> None:
        """Load the jobs of `store`; those that were not finished have failed."""
        self._store = store
        self._limits = limits
        self._admission = admission
        self._generator = generator
        self._metrics = metrics
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, tuple[asyncio.Task[None], Ticket, Control]] = {}
        for job in store.load():
            self._jobs[job.id] = job
            if not job.ended:
                self._end(job, "failed", *ENDINGS["draining"])

    def counts(self) -> Mapping[str, float]:
        """Return the number of jobs by status."""
        return {**dict.fromkeys(STATUSES, 0), **Counter(job.status for job in list(self._jobs.values()))}

    def submit(
        self, *, owner: str, prompt: str, prompt_cut_to: int | None, seed: int, seconds: str, asked: float
    ) -> Job:
        """Accept a job and put it into the queue.

        Args:
            owner: name of the client, who alone may see the job.
            prompt: the prompt, checked.
            prompt_cut_to: tokens to which the prompt is cut, as `ModelLimits.check_prompt` returns it.
            seed: seed of the noise.
            seconds: length of the video, as the text of a number.
            asked: `time.perf_counter()` at the arrival of the request.

        Raises:
            ApiError: 429 if the queue or the spool is full; 503 if the server is shutting down or the disk is full.
        """
        self._check_room()
        frames, chunks = self._limits.frames_and_chunks(float(seconds))
        job = Job(
            id=f"video_{secrets.token_hex(16)}",
            owner=owner,
            model=self._limits.model_name,
            prompt=prompt,
            prompt_cut_to=prompt_cut_to,
            seed=seed,
            size=self._limits.size,
            seconds=seconds,
            num_frames=frames,
            num_chunks=chunks,
            created_at=int(time.time()),
        )
        ticket = self._admission.enter()
        try:
            self._store.save(job)
        except OSError as error:
            ticket.leave()
            log.error("the spool cannot be written: %s", error)
            raise not_ready("the server's disk is full or cannot be written", retry_after_s=60) from None
        self._jobs[job.id] = job
        control = Control()
        task = asyncio.create_task(self._run(job, ticket, control, asked))
        self._running[job.id] = task, ticket, control
        return job

    def get(self, job_id: str, owner: str) -> Job:
        """Return the job of this id.

        Raises:
            ApiError: 404, the job does not exist or belongs to another client.
        """
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise not_found(f"there is no video {job_id[:64]!r}")
        return job

    def owned(self, owner: str) -> list[Job]:
        """Return the jobs of a client, oldest first."""
        return [job for job in self._jobs.values() if job.owner == owner]

    def video(self, job: Job) -> Path:
        """Return the path of the video of a completed job."""
        return self._store.video(job.id)

    def delete(self, job: Job) -> None:
        """Remove a job and its file; a running job stops before its next chunk."""
        del self._jobs[job.id]
        if job.id in self._running:
            _, ticket, control = self._running[job.id]
            control.stop("deleted")
            ticket.give_up("deleted")
        self._store.remove(job.id)

    def expire(self) -> bool:
        """Remove some of the expired jobs; return whether there may be more."""
        now = time.time()
        expired = (job for job in self._jobs.values() if job.expires_at is not None and job.expires_at <= now)
        some = list(islice(expired, EXPIRE_AT_ONCE))
        for job in some:
            self.delete(job)
        return len(some) == EXPIRE_AT_ONCE

    async def finished(self) -> None:
        """Wait until no job is running or queued."""
        while self._running:
            await asyncio.wait([task for task, _, _ in self._running.values()])

    def _check_room(self) -> None:
        used = sum(job.num_bytes for job in self._jobs.values())
        if len(self._jobs) < self._settings.max_jobs and used < self._settings.max_spool_bytes:
            return
        ends = min((job.expires_at for job in self._jobs.values() if job.expires_at), default=time.time() + 60)
        raise ApiError(
            429,
            "spool_full",
            "the server's storage for videos is full; delete some, or wait until some expire",
            retry_after_s=max(1.0, ends - time.time()),
        )

    async def _run(self, job: Job, ticket: Ticket, control: Control, asked: float) -> None:
        try:
            await ticket.admitted()
            if control.reason is None:
                job.status = "in_progress"
                request = GenerationRequest(
                    prompt=job.prompt, prompt_cut_to=job.prompt_cut_to, seed=job.seed, num_chunks=job.num_chunks
                )
                output = _JobOutput(job, self._store.video(job.id), self._limits, self._metrics, asked=asked)
                reason, _ = await self._generator.run("job", request, control, output)
            else:
                reason = control.reason
            if job.id not in self._jobs:  # deleted meanwhile
                return
            if reason == "done":
                job.num_bytes = self._store.video(job.id).stat().st_size
                job.progress = 100
                self._end(job, "completed")
            else:
                self._end(job, "failed", *ENDINGS.get(reason, (reason, f"the job was ended: {reason}")))
        except LeftError as left:
            self._end(job, "failed", *ENDINGS.get(left.reason, (left.reason, f"the job was ended: {left.reason}")))
        except ApiError as error:
            self._end(job, "failed", error.code, error.message)
        except Exception:
            log.exception("job %s failed", job.id)
            self._end(job, "failed", "internal", "the generation failed; the server's log says why")
        finally:
            ticket.leave()
            self._running.pop(job.id, None)
            if job.id not in self._jobs:
                self._store.remove(job.id)

    def _end(self, job: Job, status: str, code: str | None = None, message: str | None = None) -> None:
        job.status = "completed" if status == "completed" else "failed"
        job.error_code, job.error_message = code, message
        now = int(time.time())
        job.completed_at = now if status == "completed" else None
        job.expires_at = now + int(self._settings.job_ttl_s)
        if job.id not in self._jobs:
            return
        try:
            self._store.save(job)
        except (OSError, CausalRTError) as error:
            log.error("the record of job %s cannot be written: %s", job.id, error)
