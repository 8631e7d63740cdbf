"""The same rollout through the real rank processes, and the canary through the collectives that they use."""

from collections.abc import Mapping
from pathlib import Path

import torch

from causalrt.model.tokens import tokens_from_latents
from causalrt.proof.rollouts import RolloutPlan, outputs_of_chunk
from causalrt.runtime.canary import ExchangeCheck
from causalrt.runtime.load import load


def play_in_processes(
    bundle: Path,
    executor: str,
    plan: RolloutPlan,
    prompts: Mapping[str, torch.Tensor],
    *,
    device: str | None,
    cuda_graphs: bool,
) -> tuple[dict[str, torch.Tensor], list[ExchangeCheck]]:
    """What leaves the ranks, named as `rollouts.play` names it, and what the canary found on each rank.

    Raises:
        CausalRTError: whatever `load` and sessions raise.
    """
    first, second = prompts.values()
    latents: list[torch.Tensor] = []
    with load(bundle, executor=executor, device=device, cuda_graphs=cuda_graphs, vae=False) as engine:
        checks = engine.check_exchanges()
        with engine.session(first, seed=plan.seed, num_chunks=plan.num_chunks, record=True) as session:
            for chunk in range(plan.num_chunks):
                if chunk == plan.switch_chunk:
                    session.switch_prompt(second, policy="keep")
                latents.append(tokens_from_latents(next(session).latents, engine.config))
        outputs: dict[str, torch.Tensor] = {}
        for chunk, (rows, records) in enumerate(zip(latents, session.records, strict=True)):
            outputs |= outputs_of_chunk(chunk, rows, records)
    return outputs, checks
