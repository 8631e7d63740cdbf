"""What clients of `/v1/realtime` say, and what a generation says to them."""

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
    """The token, first of all."""

    type: Literal["auth"]
    token: str = Field(max_length=1024)


class Start(_Message):
    """Begin a generation."""

    type: Literal["start"]
    prompt: str
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    chunks: int | None = None


class SwitchPrompt(_Message):
    """Change its prompt."""

    type: Literal["switch"]
    prompt: str
    policy: Literal["keep", "recache", "flush"] = "keep"


class Plain(_Message):
    """Messages without fields."""

    type: Literal["pause", "resume", "stop"]


MOST_ECHOED = 300
"""Characters of what is said about a message that is none of ours: it may name what the client has sent."""
Incoming = Auth | Start | SwitchPrompt | Plain
_incoming: TypeAdapter[Incoming] = TypeAdapter(Annotated[Incoming, Field(discriminator="type")])


def parse(text: str) -> Incoming:
    """A client's message.

    Raises:
        ApiError: 400, it is none of ours.
    """
    try:
        return _incoming.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise bad_request((f"{where}: {first['msg']}" if where else first["msg"])[:MOST_ECHOED]) from None


class RealtimeOutput:
    """Encodes chunks, and hands them to the connection's queue; called from a generation's thread."""

    def __init__(
        self,
        post: Callable[[Outgoing], None],
        offer: ModelLimits,
        number: str,
        wish: GenerationRequest,
        chunks: int | None,
    ) -> None:
        self._post = post
        self._offer = offer
        self._number = number
        self._wish = wish
        self._chunks = chunks
        self._writer: FragmentWriter | None = None

    def started(self, *, text_ms: float) -> None:
        """Tell, and send the initialisation segment."""
        offer = self._offer
        self._writer = FragmentWriter(height=offer.height, width=offer.width, fps=offer.fps)
        self._post(
            {
                "type": "started",
                "id": self._number,
                "seed": self._wish.seed,
                "chunks": self._chunks,
                "text_ms": round(text_ms, 3),
                "warnings": prompt_warnings(self._wish.prompt_cut_to),
            }
        )
        self._post(self._writer.header)

    def write(self, frames: torch.Tensor) -> float:
        """Encode frames `[T, h, w, 3]` and send their fragments; milliseconds of encoding."""
        assert self._writer is not None
        begun = time.perf_counter()
        fragments = self._writer.write(frames)
        encode_ms = 1e3 * (time.perf_counter() - begun)
        self._post(fragments)
        return encode_ms

    def chunk_done(self, *, index: int, frames: int, latency_ms: float, stages: dict[str, float | None]) -> None:
        """Tell the chunk's figures."""
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
        """Tell it."""
        self._post({"type": "paused" if yes else "resumed"})

    def switched(self, switch: Switch, *, ms: float, from_chunk: int) -> None:
        """Say from which chunk on the new prompt is in effect."""
        self._post(
            {
                "type": "switched",
                "ms": round(ms, 3),
                "from_chunk": from_chunk,
                "policy": switch.policy,
                "warnings": prompt_warnings(switch.prompt_cut_to),
            }
        )

    def refused(self, problem: ApiError) -> None:
        """Tell why a switch was not made."""
        self._post(problem.realtime())

    def finish(self) -> bool:
        """Send the last fragment. Who watches is told how it was ended, if it was, even in its last chunk."""
        assert self._writer is not None
        if last := self._writer.close():
            self._post(last)
        return False

    def discard(self) -> None:
        """Send nothing more."""
        if self._writer is not None:
            self._writer.close()
