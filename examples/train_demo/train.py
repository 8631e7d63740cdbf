"""The training loop: flow matching at the noise levels that the sampler uses, on clean history, then on the model's own.

    clean phase   history is the clip itself; the noisy chunk is (1 - sigma) x0 + sigma noise
    own phase     history, and what the noise is added to, are the model's: chunks 1 and later are sampled in as many steps as a
                  session takes, after clean history or after chunks made so, and the target stays the clip. So the wrong that
                  the model does is what it learns to put right in the next chunk, and rollouts hold for longer than any clip

    firsts        in either phase, first chunks alone as well: nothing but the caption says how these move, which makes them
                  the hardest, and without history they cost little

Only the noise levels of the recipe's schedule are trained, for no others are ever asked for; there is nothing to distil. All is
a function of the seed and the step, so a run that is taken up again goes on as if it had not stopped.
"""

import io
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from causalrt.config import Config
from causalrt.errors import ConfigError
from causalrt.model.schedule import schedule_from_config
from causalrt.model.tokens import latents_from_tokens, tokens_from_latents
from causalrt.model.wan.transformer import Wan
from causalrt.tools.files import write_whole
from train_demo.clips import CHUNKS, Clips, Starts, draw_clips, draw_firsts
from train_demo.forward import Inputs, TrainingForward, initialise
from train_demo.world import Caption


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is made of; a run can only be taken up with the same.

    Attributes:
        steps: of the optimiser.
        own_from: step from which on history is the model's own in half of the clips of a batch.
        batch: clips of a step.
        firsts: first chunks alone, in the same step.
        rate: the highest learning rate.
        bf16: products in bfloat16.
        seed: of everything.
        start: digest of the weights that it began with; empty where these were drawn.
    """

    steps: int = 5000
    own_from: int = 3928
    batch: int = 16
    firsts: int = 64
    rate: float = 2e-3
    bf16: bool = False
    seed: int = 0
    start: str = ""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("steps", 1, 10**7),
            ("own_from", 0, 10**7),
            ("batch", 2, 10**4),  # half of a batch has history of its own
            ("firsts", 0, 10**5),
            ("seed", 0, 2**40),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be from {least} to {most}, got {getattr(self, name)}")


class Trainer:
    """A run: the model, its running average, and the optimiser.

    Attributes:
        step: steps done.
        average: the running average of the parameters, which is what is shipped.
    """

    def __init__(
        self,
        config: Config,
        captions: Sequence[Caption],
        embed: Callable[[str], torch.Tensor],
        settings: Settings,
        *,
        device: torch.device,
        normal: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.config, self.captions, self.embed, self.settings, self.device = config, captions, embed, settings, device
        schedule = schedule_from_config(config.sampler)
        self.sigmas = torch.tensor(schedule.sigmas, device=device)
        self.clean_time = len(schedule.timesteps)
        self.wan = Wan(config.model)
        initialise(self.wan, seed=settings.seed)
        self.wan.to(device)
        timesteps = (*schedule.timesteps, schedule.context_timestep)
        self.forward = TrainingForward(self.wan, config, timesteps=timesteps, num_chunks=CHUNKS, device=device)
        self.first_forward = TrainingForward(self.wan, config, timesteps=timesteps, num_chunks=1, device=device)
        self.forward_pass: Callable[[Inputs], torch.Tensor] = self.forward
        self.first_pass: Callable[[Inputs], torch.Tensor] = self.first_forward
        matrices = [p for name, p in self.wan.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
        chosen = set(map(id, matrices))
        others = [p for p in self.wan.parameters() if id(p) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.average = {name: parameter.detach().clone() for name, parameter in self.wan.named_parameters()}
        self.mean, self.std = (as_tokens(value, config) for value in normal)
        self.starts = Starts(config, captions, normal=normal, seed=settings.seed)
        self.step = 0

    def one_step(self) -> float:
        """One step of the optimiser; its loss."""
        s = self.settings
        seed = 1_000_003 * s.seed + self.step
        generator = torch.Generator().manual_seed(seed)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._rate()
        self.wan.zero_grad(set_to_none=True)
        loss = self._loss(random.Random(seed), generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.wan.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        keep = min(0.995, 1 - 1 / (1 + 0.1 * self.step))
        with torch.no_grad():
            for name, parameter in self.wan.named_parameters():
                self.average[name].lerp_(parameter, 1 - keep)
        return loss.item()

    def save(self, path: Path) -> None:
        """Everything that `resume` needs, whole or not at all."""
        state = {"model": self.wan.state_dict(), "average": self.average, "step": self.step}
        state |= {"settings": asdict(self.settings)}
        buffer = io.BytesIO()
        torch.save({**state, "optimisers": [each.state_dict() for each in self.optimisers]}, buffer)
        write_whole(path, buffer.getvalue())

    def resume(self, path: Path) -> None:
        """Go to where `save` was called.

        Raises:
            ConfigError: it was with other settings, or there is nothing of the kind.
        """
        state = self._read(path)
        if state["settings"] != asdict(self.settings):
            raise ConfigError(
                f"{path} is of a run with {state['settings']}, not {asdict(self.settings)}; give these, or another --out"
            )
        self.wan.load_state_dict(state["model"])
        self.average = state["average"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step = state["step"]

    def start_from(self, path: Path) -> None:
        """Begin with the running average of another run; steps are counted from 0.

        Raises:
            ConfigError: there is none.
        """
        average = self._read(path)["average"]
        self.wan.load_state_dict(average)
        self.average = average

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            shapes = {name: value.shape for name, value in state["average"].items()}
            state["settings"], state["step"], state["optimisers"], state["model"]  # are there
        except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no state of a training: {error}") from None
        if shapes != {name: parameter.shape for name, parameter in self.wan.named_parameters()}:
            raise ConfigError(f"{path} is the state of another model")
        return state

    def _rate(self) -> float:
        """A linear start, then half a cosine down to a fiftieth."""
        s = self.settings
        warm = min(1.0, (self.step + 1) / 100)
        return s.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / s.steps)))

    def _loss(self, rng: random.Random, generator: torch.Generator) -> torch.Tensor:
        s = self.settings
        noise, levels, wishes = self._draw_noise(s.batch, CHUNKS, generator)
        clips = draw_clips(self.config, self.starts, self.captions, rng=rng, wishes=wishes)
        loss = self._errors(clips, noise, levels, generator if self.step >= s.own_from else None)
        if s.firsts:
            noise, levels, wishes = self._draw_noise(s.firsts, 1, generator)
            firsts = draw_firsts(self.config, self.starts, self.captions, rng=rng, wishes=wishes)
            loss = loss + self._errors(firsts, noise, levels, None)
        return loss

    def _draw_noise(
        self, count: int, chunks: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """Noise `[count, chunks, N, 64]`, its level for each chunk, and what clips' first chunks shall be like for it."""
        noise = torch.randn(count, chunks, self.config.tokens_per_chunk, len(self.mean), generator=generator)
        levels = torch.randint(len(self.sigmas), (count, chunks), generator=generator)
        # First chunks are noise alone more often than not: what is made of that decides about the whole video.
        levels[:, 0] = (torch.randint(2 * len(self.sigmas), (count,), generator=generator) - len(self.sigmas)).clamp(
            min=0
        )
        wishes = [
            latents_from_tokens(first, self.config) if level == 0 else None
            for first, level in zip(noise[:, 0], levels[:, 0].tolist(), strict=True)
        ]
        return noise, levels, wishes

    def _errors(
        self, clips: Clips, noise: torch.Tensor, levels: torch.Tensor, own: torch.Generator | None
    ) -> torch.Tensor:
        """Mean square of the flow's errors; with a generator, on history of the model's own."""
        target = (clips.tokens - self.mean) / self.std
        target, noise, levels = (each.to(self.device) for each in (target, noise, levels))
        sigma = self.sigmas[levels][..., None, None]
        history, seen = (target, target) if own is None else self._own(clips, target, levels, own)
        noisy = (1 - sigma) * seen + sigma * noise
        flow = self._flow(clips, history, noisy, levels)
        # x0 = noisy - sigma flow shall be the target: noise - target, where the noise was added to that.
        wanted = (noisy - target) / sigma
        errors = (flow - wanted).square().mean((2, 3))
        counts = clips.counts.to(self.device)
        return (errors * counts).sum() / counts.sum()

    def _flow(self, clips: Clips, history: torch.Tensor, noisy: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        text, prompts = self._text(clips)
        alone = noisy.shape[1] == 1  # a first chunk has no history
        inputs = Inputs(
            tokens=noisy[None] if alone else torch.stack([history, noisy]),
            times=levels[None] if alone else torch.stack([torch.full_like(levels, self.clean_time), levels]),
            text=text,
            prompts=prompts,
            starts=clips.starts.to(self.device),
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return (self.first_pass if alone else self.forward_pass)(inputs)[-1].float()

    @torch.no_grad()
    def _own(
        self, clips: Clips, target: torch.Tensor, levels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(history, what noise is added to): the model's own in the first half of the clips, the clip in the others.

        All chunks are sampled at once, in a session's steps, each after the clip's own history; in every other step of the
        optimiser once more, each after what came of that. What the noise of a level is added to is x0 of the level before.
        """
        half = len(target) // 2
        clips, clean, levels = clips.first(half), target[:half], levels[:half]
        later = torch.arange(CHUNKS, device=self.device) > 0
        usable = (later & clips.counts.to(self.device))[..., None, None]
        history, seen = clean, clean
        for _ in range(1 + self.step % 2):
            x0 = before = clean
            for level, sigma in enumerate(self.sigmas):
                noise = torch.randn(clean.shape, generator=generator).to(self.device)
                noisy = (1 - sigma) * x0 + sigma * noise
                x0 = noisy - sigma * self._flow(clips, history, noisy, torch.full_like(levels, level))
                before = torch.where((levels == level + 1)[..., None, None], x0, before)
            history, seen = torch.where(usable, x0, clean), torch.where(usable, before, clean)
        return torch.cat([history, target[half:]]), torch.cat([seen, target[half:]])

    def _text(self, clips: Clips) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[2 B, text_len, text_dim]`, and the number of each chunk's among them."""
        model = self.config.model
        text = torch.zeros(2 * len(clips.captions), model.text_len, model.text_dim)
        for row, both in enumerate(clips.captions):
            for place, caption in enumerate(both):
                rows = self.embed(str(caption))
                text[2 * row + place, : len(rows)] = rows
        prompts = 2 * torch.arange(len(clips.captions))[:, None] + clips.switched
        return text.to(self.device), prompts.to(self.device)


def as_tokens(values: torch.Tensor, config: Config) -> torch.Tensor:
    """A value for each latent channel, `[16]`, at the features of a token, `[64]`."""
    video = config.video
    latent = values.view(1, -1, 1, 1).expand(1, -1, video.latent_height, video.latent_width)
    return tokens_from_latents(latent, config)[0]
