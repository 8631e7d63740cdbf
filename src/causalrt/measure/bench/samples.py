"""What is seen of a side: chunks, first chunks, memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSample:
    """One chunk of one side; milliseconds.

    Attributes:
        repeat: from 0, warm-up left out.
        chunk: its index.
        kv_frames: latent frames attended to.
        latency_ms: request to latents and frames.
        period_ms: request to idle ranks, refresh included; None where no refresh follows (the last chunk).
        denoise_ms: each denoising step, exchange included.
        exchange_ms: of all of them; None where the host does not see it.
        gather_ms: see `ChunkTimes`, like the two that follow the next three.
        decode_ms: by the VAE.
        hand_over_ms: the rest of the latency.
        queue_ms: waiting for earlier work.
        refresh_ms: 0 where none follows.
        all_to_all_calls: of the denoising steps, as the host counted them.
        rows_sent: rows of one head in them, those to itself included.
    """

    repeat: int
    chunk: int
    kv_frames: int
    latency_ms: float
    period_ms: float | None
    denoise_ms: tuple[float, ...]
    exchange_ms: float | None
    gather_ms: float
    decode_ms: float
    hand_over_ms: float
    queue_ms: float
    refresh_ms: float
    all_to_all_calls: int
    rows_sent: int

    @property
    def step_ms(self) -> float:
        """Mean of the denoising steps."""
        return sum(self.denoise_ms) / len(self.denoise_ms)

    def stages_ms(self) -> dict[str, float]:
        """Parts of the latency; the exchange is inside `denoise` where nobody can tell it."""
        exchange = {} if self.exchange_ms is None else {"exchange": self.exchange_ms}
        return {
            "queue": self.queue_ms,
            "denoise": sum(self.denoise_ms) - sum(exchange.values()),
            **exchange,
            "gather": self.gather_ms,
            "decode": self.decode_ms,
            "hand_over": self.hand_over_ms,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstSample:
    """The way to a first chunk: its total and stages, in milliseconds."""

    total_ms: float
    stages_ms: Mapping[str, float]


@dataclass(kw_only=True, slots=True)
class Measured:
    """What was seen of one side.

    Attributes:
        cold: from the start of a process.
        first_session_ms: latency of chunk 0 right after loading, and in the warm-up.
        warm: a new session of a warm engine, by repeat.
        chunks: counted ones.
        largest_difference: of latents from those of the first side, relative.
        frames: shown of each chunk.
        peak_rank_bytes: VmHWM of each rank.
        peak_decoder_bytes: of the decoder, if there is one.
        peak_device_bytes: of each rank; None on a CPU.
        device_waits: of rank 0's host in one chunk, refresh included; None on a CPU.
    """

    cold: FirstSample
    first_session_ms: list[float]
    warm: list[FirstSample] = field(default_factory=list)
    chunks: list[ChunkSample] = field(default_factory=list)
    largest_difference: float = 0.0
    frames: tuple[int, ...] = ()
    peak_rank_bytes: tuple[int | None, ...] = ()
    peak_decoder_bytes: int | None = None
    peak_device_bytes: tuple[int | None, ...] = ()
    device_waits: int | None = None
