"""Predicts the memory of ranks and decoder from the config, and checks it against what is free."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from causalrt.config import Config
from causalrt.control_groups import memory_limits
from causalrt.engines.base import TORCH_DTYPES
from causalrt.engines.bundle import VAE_WEIGHTS, Bundle
from causalrt.engines.kinds import executor_kind
from causalrt.engines.network_record import read_networks, working_bytes
from causalrt.errors import BundleError, OutOfMemoryError
from causalrt.layout import layout_from_config
from causalrt.model.codecs.protocol import CodecConfig
from causalrt.model.codecs.registry import cache_bytes
from causalrt.model.wan.transformer import num_parameters

UNLIMITED = sys.maxsize
"""Number of sessions on a host that does not report its free memory."""
_COMMON_POOL = (0, 0)
"""The common pool of torch's allocator. Memory in the pool of CUDA graphs is never used for other tensors."""
_RAN_OUT = (
    "out of memory",  # CUDA
    "outofmemory",  # TensorRT
    "alloc_failed",  # cuBLAS
    "can't allocate memory",  # torch on a CPU
    "failed to allocate memory",  # ONNX Runtime, and the next one
    "is smaller than requested bytes",
)
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Memory of one rank with one session, in bytes.

    Attributes:
        weights_bytes: parameters of the model.
        kv_bytes: KV slots of the session.
        cross_kv_bytes: keys and values of the session's prompt.
        activation_bytes: the largest set of activations alive at once, exchange buffers included (an estimate).
        attention_bytes: scratch of self-attention in ONNX Runtime: a transposed copy of queries, keys and values in float32,
            all scores in other types, for which it has only the standard Attention.
    """

    weights_bytes: int
    kv_bytes: int
    cross_kv_bytes: int
    activation_bytes: int
    attention_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(asdict(self).values())

    @property
    def session_bytes(self) -> int:
        """Memory that each further session adds."""
        return self.kv_bytes + self.cross_kv_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderMemory:
    """Memory of the decoder's process with one session, in bytes.

    Attributes:
        weights_bytes: weights of the VAE.
        cache_bytes: caches of a session; graphs hold them twice.
        activation_bytes: activations alive at once (an estimate from measurements of eager).
    """

    weights_bytes: int
    cache_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(asdict(self).values())


def decoder_memory(bundle: Bundle, executor: str) -> DecoderMemory:
    """Bytes that the decoder of a bundle with a VAE will hold, with one session open."""
    assert bundle.vae is not None
    weights = 2 * bundle.sizes[VAE_WEIGHTS]  # graphs, or the encoder, hold a second copy
    return predict_decoder_memory(bundle.vae, bundle.config, executor, weights_bytes=weights)


def predict_decoder_memory(vae: CodecConfig, config: Config, executor: str, *, weights_bytes: int) -> DecoderMemory:
    """Bytes that a decoder will hold, with one session open; graphs keep a second set of caches."""
    video, dtype, kind = config.video, TORCH_DTYPES[config.build.precision], executor_kind(executor)
    caches = cache_bytes(vae, latent_height=video.latent_height, latent_width=video.latent_width, dtype=dtype)
    widest = vae.decoder_dim * video.codec.frames_per_latent * video.pixel_height * video.pixel_width
    return DecoderMemory(
        weights_bytes=weights_bytes,
        cache_bytes=(2 if kind.compiled else 1) * caches,
        activation_bytes=kind.decoder_activations * widest * dtype.itemsize,
    )


def rank_memory(bundle: Bundle, executor: str, *, device: str = "cpu") -> MemoryEstimate:
    """Bytes that one rank will hold, with one session open.

    Activations of TensorRT engines are taken from their builder's report, for the target that needs most; they are estimated if
    the bundle lacks it.
    """
    targets = bundle.engines[executor].targets.values() if executor in bundle.engines else ()
    found: list[int | None] = []
    with contextlib.suppress(BundleError):  # an estimate will do where the record is damaged
        found = [working_bytes(read_networks(bundle, files), files, bundle) for files in targets]
    known = max((size for size in found if size is not None), default=None)
    return predict_memory(bundle.config, executor, device=device, activation_bytes=known)


def predict_memory(
    config: Config, executor: str, *, device: str = "cpu", activation_bytes: int | None = None
) -> MemoryEstimate:
    """Bytes that one rank of `config` will hold under `executor` on a kind of device, with one session open.

    The kinds of step share their weights, but engines hold a copy for each kind, and so does ONNX Runtime on a GPU.

    Args:
        config: config of the bundle.
        executor: name of the executor.
        device: `cpu` or `cuda`.
        activation_bytes: bytes of the activations, if known; estimated otherwise.
    """
    kind = executor_kind(executor)
    weight_sets = len(config.video.step_frames) if device in kind.copies_weights else 1
    layout, model = layout_from_config(config), config.model
    size = ELEMENT_BYTES[config.build.precision]
    slots = config.slot_rows
    widest = max(6 * model.dim, model.ffn_dim + 2 * model.dim)
    exchange = 2 * layout.world_size * layout.scatter_rows * model.head_dim if layout.world_size > 1 else 0
    heads_and_rows = [(shard.num_heads, layout.world_size * shard.query_rows) for shard in layout.shards]
    if config.build.precision == "float32":
        scratch = max(heads * (rows + 2 * slots) * model.head_dim for heads, rows in heads_and_rows)
    else:
        scratch = max(heads * rows * slots for heads, rows in heads_and_rows)
    if activation_bytes is None:
        activation_bytes = (layout.local_tokens * widest + exchange) * size
    return MemoryEstimate(
        weights_bytes=num_parameters(model) * size * weight_sets,
        kv_bytes=2 * model.num_layers * layout.kv_heads * slots * model.head_dim * size,
        cross_kv_bytes=2 * model.num_layers * model.text_len * model.dim * size,
        activation_bytes=activation_bytes,
        attention_bytes=scratch * size if kind.attention_scratch else 0,
    )


def available_bytes() -> int | None:
    """Free memory of this host, or of the control groups that limit this process; None if it is unknown."""
    limits = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limits += [free for _, free in memory_limits()]
    return min(limits, default=None)


def check_memory(
    memory: MemoryEstimate, *, ranks: int, shared_weights: bool, decoder: DecoderMemory | None = None
) -> int:
    """Check that ranks and decoder fit on this host, and return the number of sessions that do.

    Args:
        memory: memory of one rank.
        ranks: number of ranks on this host.
        shared_weights: whether ranks map the weight file and share its pages, or each hold a copy.
        decoder: memory of the decoder on this host, if there is one.

    Raises:
        OutOfMemoryError: they do not fit; the message lists the parts and says what to do.
    """
    available = available_bytes()
    needed = memory.total_bytes * ranks - (memory.weights_bytes * (ranks - 1) if shared_weights else 0)
    session = memory.session_bytes * ranks
    if decoder is not None:
        needed, session = needed + decoder.total_bytes, session + decoder.cache_bytes
    if available is None:
        return UNLIMITED
    if needed > available:
        who = f"{ranks} rank(s){'' if decoder is None else ' and the decoder'} need"
        raise OutOfMemoryError(_does_not_fit(memory, who, needed, available, "host", decoder))
    return 1 + (available - needed) // session


def device_free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None for the host, whose memory is shared (`available_bytes`)."""
    if device.type != "cuda":
        return None
    held_back = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) == _COMMON_POOL
    )
    return torch.cuda.mem_get_info(device)[0] + held_back


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, ONNX Runtime, TensorRT or a CUDA library means that memory has run out."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in _RAN_OUT)


def check_device_memory(memory: MemoryEstimate, device: torch.device) -> None:
    """Check that a rank fits on its GPU.

    Raises:
        OutOfMemoryError: it does not; the message lists the parts and says what to do.
    """
    available, _ = torch.cuda.mem_get_info(device)
    if memory.total_bytes > available:
        raise OutOfMemoryError(_does_not_fit(memory, f"{device} needs", memory.total_bytes, available, "GPU"))


def device_sessions(
    memory: MemoryEstimate,
    free_bytes: Sequence[int],
    decoder: DecoderMemory | None,
    decoder_free_bytes: int | None,
    *,
    graph_bytes: int,
    shared: bool,
) -> int:
    """Number of sessions that fit on GPUs whose ranks have loaded.

    Args:
        memory: memory of one rank.
        free_bytes: free memory of each rank's GPU after the rank had loaded.
        decoder: memory of the decoder, if there is one.
        decoder_free_bytes: free memory of the decoder's GPU after the decoder had loaded.
        graph_bytes: memory of one session's CUDA graphs, on the rank where they take most.
        shared: whether the decoder's GPU is that of rank 0.

    Raises:
        OutOfMemoryError: no session fits.
    """
    working, session = memory.activation_bytes + memory.attention_bytes, memory.session_bytes + graph_bytes
    fitting = [(free - working) // session for free in free_bytes]
    if decoder is not None and decoder_free_bytes is not None:
        if shared:  # the last of the two to load has seen the memory of both
            free = min(free_bytes[0], decoder_free_bytes) - working - decoder.activation_bytes
            fitting[0] = free // (session + decoder.cache_bytes)
        elif decoder.cache_bytes:
            fitting.append((decoder_free_bytes - decoder.activation_bytes) // decoder.cache_bytes)
    if min(fitting) < 1:
        needed = working + session
        raise OutOfMemoryError(_does_not_fit(memory, "a session needs", needed, min(free_bytes), "GPU", decoder))
    return min(fitting)


def _does_not_fit(
    memory: MemoryEstimate, who: str, needed: int, available: int, place: str, decoder: DecoderMemory | None = None
) -> str:
    def parts(of: MemoryEstimate | DecoderMemory) -> str:
        return ", ".join(f"{name.removesuffix('_bytes')} {value / 2**30:.2f}" for name, value in asdict(of).items())

    beside = "" if decoder is None else f"; the decoder: {parts(decoder)}"
    return (
        f"{who} {needed / 2**30:.2f} GiB here and {available / 2**30:.2f} are free (GiB a rank: {parts(memory)}{beside}); "
        f"use fewer latent frames (`--set video.window_frames=...`), a smaller precision, or a larger {place}"
    )
