"""Starting an engine: its processes load the bundle while this process loads the text encoder."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from causalrt.config import Config
from causalrt.control_groups import available_cpus
from causalrt.engines.bundle import Bundle, unchanged
from causalrt.engines.kinds import executor_kind, warms_up
from causalrt.model.text.protocol import PromptEncoder
from causalrt.model.text.words import WORDS_FILE, WordEncoder
from causalrt.runtime.engine import Engine
from causalrt.runtime.memory import (
    UNLIMITED,
    DecoderMemory,
    MemoryEstimate,
    check_memory,
    decoder_memory,
    device_sessions,
    rank_memory,
)
from causalrt.runtime.messages import Done, LoadCommand, LoadVaeCommand
from causalrt.runtime.ranks import START_S, WARM_START_S
from causalrt.runtime.workers import Workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """The arguments of `load`, checked and with the defaults of the bundle and of this machine filled in.

    Attributes:
        decoder_executor: name of the executor that decodes, or None to make latents only.
    """

    executor: str
    device: str
    fused_ops: bool
    cuda_graphs: bool
    decoder_executor: str | None
    text_encoder: Path | None
    text_device: str
    max_sessions: int | None
    num_threads: int | None
    timeout_s: float


def open_text_encoder(folder: Path, device: str, config: Config) -> PromptEncoder:
    """The text encoder in a folder, for the prompts of a model: a table of words if the folder has one, otherwise umT5.

    Raises:
        CheckpointError: it cannot be read, or is not the model's.
        ConfigError, ExecutorError: umT5 cannot compute on `device`, or lacks a library; a table of words needs neither.
    """
    model = config.model
    if (folder / WORDS_FILE).is_file():
        return WordEncoder.from_folder(folder, text_dim=model.text_dim, max_tokens=model.text_len)
    from causalrt.model.text.umt5 import TextEncoder

    return TextEncoder.from_folder(folder, device=device, text_dim=model.text_dim, max_tokens=model.text_len)


def start_engine(bundle: Bundle, options: EngineOptions) -> Engine:
    """Start the processes of an engine and wait until they have loaded the bundle.

    Raises:
        BundleError: the bundle was changed meanwhile.
        CheckpointError: the text encoder cannot be read, or does not fit the model.
        OutOfMemoryError: the ranks would not fit in memory.
        RankError: a process failed to start or to load.
    """
    config, device = bundle.config, options.device
    world_size, cores = config.build.world_size, available_cpus()
    memory = rank_memory(bundle, options.executor, device=device)
    decoder_bytes = decoder_memory(bundle, options.decoder_executor) if options.decoder_executor else None
    fitting = UNLIMITED
    if device == "cpu":
        shared_weights = not executor_kind(options.executor).compiled
        fitting = check_memory(memory, ranks=world_size, shared_weights=shared_weights, decoder=decoder_bytes)
    num_threads = options.num_threads or max(1, cores // world_size)
    start_s = WARM_START_S if warms_up(options.executor, device) else START_S
    own_gpu = device == "cuda" and torch.cuda.device_count() > world_size
    text_encoder = None
    if options.text_encoder is not None and options.text_device != "cpu":  # before the ranks measure their free memory
        text_encoder = open_text_encoder(options.text_encoder, options.text_device, config)
    with contextlib.ExitStack() as if_loading_fails:
        workers = Workers(world_size, timeout_s=options.timeout_s, decodes=options.decoder_executor is not None)
        if_loading_fails.callback(workers.end)
        with unchanged(bundle):
            _send_load_commands(workers, bundle, options, num_threads=num_threads, start_s=start_s, own_gpu=own_gpu)
            if options.text_encoder is not None and text_encoder is None:  # while the ranks load
                text_encoder = open_text_encoder(options.text_encoder, options.text_device, config)
            answers = workers.answers(at_least_s=start_s)
            if workers.decoder is not None:
                workers.decoder.wait_started(at_least_s=start_s)
        if device == "cuda":
            fitting = _sessions_on_gpus(workers, answers, memory, decoder_bytes, decoder_shares_gpu=not own_gpu)
        if_loading_fails.pop_all()
    if options.max_sessions is not None and fitting < options.max_sessions:
        logger.warning("%d sessions fit in memory, of %d that were requested", fitting, options.max_sessions)
    return Engine(
        bundle,
        options.executor,
        device=device,
        num_threads=num_threads,
        memory=memory,
        decoder_memory=decoder_bytes,
        max_sessions=min(fitting, options.max_sessions or fitting),
        makes_ahead=options.decoder_executor is not None and own_gpu,
        workers=workers,
        text_encoder=text_encoder,
    )


def _send_load_commands(
    workers: Workers, bundle: Bundle, options: EngineOptions, *, num_threads: int, start_s: float, own_gpu: bool
) -> None:
    if workers.decoder is not None and options.decoder_executor is not None:
        gpu = f"cuda:{bundle.config.build.world_size if own_gpu else 0}"
        workers.decoder.start(
            LoadVaeCommand(
                bundle=bundle.path,
                digest=bundle.digest,
                executor=options.decoder_executor,
                device=gpu if options.device == "cuda" else "cpu",
                num_threads=options.num_threads or available_cpus(),
            )
        )
    workers.ranks.send(
        LoadCommand(
            bundle=bundle.path,
            digest=bundle.digest,
            executor=options.executor,
            device=options.device,
            fused_ops=options.fused_ops,
            cuda_graphs=options.cuda_graphs,
            num_threads=num_threads,
            timeout_s=max(options.timeout_s, start_s),
        )
    )


def _sessions_on_gpus(
    workers: Workers,
    answers: Sequence[Done],
    memory: MemoryEstimate,
    decoder: DecoderMemory | None,
    *,
    decoder_shares_gpu: bool,
) -> int:
    """The number of sessions that fit into the memory that the ranks and the decoder have left on their GPUs."""
    graph_bytes = max(answer.graph_bytes for answer in answers)
    fitting = device_sessions(
        memory,
        [answer.free_bytes or 0 for answer in answers],
        decoder,
        workers.decoder.free_bytes if workers.decoder is not None else None,
        graph_bytes=graph_bytes,
        shared=decoder_shares_gpu,
    )
    logger.info(
        "%d sessions fit, each of %.2f GiB a rank and %.1f MiB of CUDA graphs",
        fitting,
        memory.session_bytes / 2**30,
        graph_bytes / 2**20,
    )
    return fitting
