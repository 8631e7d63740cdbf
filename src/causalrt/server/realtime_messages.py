"""Messages of `/v1/realtime`: those of clients, and the output of a generation."""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from causalrt.media.video_file import FragmentWriter
from causalrt.server.api_errors import ApiError, bad_request
from causalrt.server.generation import GenerationRequest, Switch
from causalrt.server.model_limits import MAX_SEED, ModelLimits, prompt_warnings

Outgoing = dict[str, Any] | bytes | list[bytes]
"""A JSON message, the initialisation segment, or the fragments of frames, each sent as a message of its own."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value is not None}


class Auth(_Message):
    """Authenticate; the first message of a client."""

    type: Literal["auth"]
    token: str = Field(max_length=1024)


class Start(_Message):
    """Start a generation."""

    type: Literal["start"]
    prompt: str
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    chunks: int | None = None


class SwitchPrompt(_Message):
    """Change the prompt of the running generation."""

    type: Literal["switch"]
    prompt: str
    policy: Literal["keep", "recache", "flush"] = "keep"


class Plain(_Message):
    """A message without fields."""

    type: Literal["pause", "resume", "stop"]


MOST_ECHOED = 300
"""Most characters of the error about an invalid message, which may quote what the client has sent."""
Incoming = Auth | Start | SwitchPrompt | Plain
_incoming: TypeAdapter[Incoming] = TypeAdapter(Annotated[Incoming, Field(discriminator="type")])


def parse(text: str) -> Incoming:
    """Parse the message of a client.

    Raises:
        ApiError: 400, it is not a valid message.
    """
    try:
        return _incoming.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise bad_request((f"{where}: {first['msg']}" if where else first["msg"])[:MOST_ECHOED]) from None


class RealtimeOutput:
    """Encodes chunks and puts them into the connection's queue; called from a generation's thread."""

    def __init__(
        self,
        post: Callable[[Outgoing], None],
        limits: ModelLimits,
        number: str,
        request: GenerationRequest,
        chunks: int | None,
    ) -> None:
        self._post = post
        self._limits = limits
        self._number = number
        self._request = request
        self._chunks = chunks
        self._writer: FragmentWriter | None = None

    def started(self, *, text_ms: float) -> None:
        """Send the `started` message and the initialisation segment."""
        limits = self._limits
        self._writer = FragmentWriter(height=limits.height, width=limits.width, fps=limits.fps)
        self._post(
            {
                "type": "started",
                "id": self._number,
                "seed": self._request.seed,
                "chunks": self._chunks,
                "text_ms": round(text_ms, 3),
                "warnings": prompt_warnings(self._request.prompt_cut_to),
            }
        )
        self._post(self._writer.header)

    def write(self, frames: torch.Tensor) -> float:
        """Encode frames `[T, h, w, 3]`, send their fragments, and return the milliseconds of encoding."""
        assert self._writer is not None
        begun = time.perf_counter()
        fragments = self._writer.write(frames)
        encode_ms = 1e3 * (time.perf_counter() - begun)
        self._post(fragments)
        return encode_ms

    def chunk_done(self, *, index: int, frames: int, latency_ms: float, stages: dict[str, float | None]) -> None:
        """Send the timings of the chunk."""
        rounded = {stage: None if ms is None else round(ms, 3) for stage, ms in stages.items()}
        self._post(
            {
                "type": "chunk",
                "index": index,
                "frames": frames,
                "latency_ms": round(latency_ms, 3),
                "stages": rounded,
            }
        )

    def paused(self, yes: bool) -> None:
        """Send that the generation has paused or resumed."""
        self._post({"type": "paused" if yes else "resumed"})

    def switched(self, switch: Switch, *, ms: float, from_chunk: int) -> None:
        """Send the chunk from which the new prompt takes effect."""
        self._post(
            {
                "type": "switched",
                "ms": round(ms, 3),
                "from_chunk": from_chunk,
                "policy": switch.policy,
                "warnings": prompt_warnings(switch.prompt_cut_to),
            }
        )

    def refused(self, error: ApiError) -> None:
        """Send why a prompt switch failed."""
        self._post(error.realtime())

    def finish(self) -> bool:
        """Send the last fragments. Return False, so that a stop during the last chunk is reported to the viewer."""
        assert self._writer is not None
        if last := self._writer.close():
            self._post(last)
        return False

    def discard(self) -> None:
        """Send nothing more."""
        if self._writer is not None:
            self._writer.close()
