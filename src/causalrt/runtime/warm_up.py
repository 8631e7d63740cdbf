"""Run every kind of step once before the first session, so that none pays for compilation or for the capture of CUDA graphs."""

import torch

from causalrt.config import Config
from causalrt.engines.base import Executor
from causalrt.layout import Layout, chunk_starts
from causalrt.runtime.session_memory import SessionMemories


def warm_up(executor: Executor, config: Config, layout: Layout, memories: SessionMemories) -> None:
    """One step over each number of KV rows that occurs, in the memory that the first session will take.

    Collective: every rank calls it once it has made its executor.
    """
    model, device = config.model, executor.device
    memory = memories.take()
    memory.begin(executor.encode_prompt(torch.zeros(model.text_len, model.text_dim)))
    e, e0 = executor.embed_time(0.0)
    met: set[int] = set()
    chunks = [(False, first_frame) for first_frame in chunk_starts(config)]
    if config.video.lone_first_frame:
        chunks.insert(0, (True, 0))
    for lone, first_frame in chunks:
        rows = memory.slots.filled_rows(first_frame, lone=lone)
        if rows not in met:
            met.add(rows)
            slots = memory.slots.filled(first_frame, lone=lone)
            executor.bind(slots, memory.cross_kv, kv_rows=rows, memory=memory.number, lone=lone)
            tokens = (layout.with_tokens(config.tokens_per_frame) if lone else layout).local_tokens
            executor.step(torch.zeros(tokens, model.patch_features, device=device), e, e0, first_frame)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    memories.give_back(memory)
    executor.warmed_up()
