"""Recorded rollouts of the reference: a safetensors file with weights, inputs, outputs, and sizes in its metadata.

Tensor names: `model.*` (weights), `in.noise` `[B, T, 16, H, W]`, `in.prompt_embeds` `[B, L, E]`, `in.renoise.c{c}.s{s}`
`[B * F, 16, H, W]`, `out.c{c}.s{s}.{flow,x0}`, `out.c{c}.ctx.flow`, `out.latents`. Metadata key `config`: JSON. Where the video
begins with given frames, `in.initial_latent` `[B, G, 16, H, W]` and `out.g{i}.ctx.flow`; where the prompt changes,
`in.prompt_embeds.p1`. F is one for the first chunk, generated or given, with `independent_first_frame`.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from causalrt.config import BuildConfig, Config, HeadPlanName, ModelConfig, SamplerConfig, VideoConfig
from causalrt.errors import ConfigError, RecordingError
from causalrt.model.tokens import tokens_from_latents
from causalrt.regular_files import regular_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A recorded rollout; a batch element is a session of its own.

    Attributes:
        path: the file.
        config: the sizes, window and schedule it was recorded with.
        num_chunks: chunks of the rollout.
        batch_size: elements.
        num_given: chunks that the video begins with; they come before the others.
        switch_chunk: the chunk from which on the second prompt is attended to, or None.
        tensors: everything but the weights.
    """

    path: Path
    config: Config
    num_chunks: int
    batch_size: int
    num_given: int
    switch_chunk: int | None
    tensors: dict[str, torch.Tensor]

    @property
    def given_frames(self) -> list[int]:
        """Frames of each given chunk."""
        return self.config.video.frames_of_chunks(self.num_given)

    @property
    def chunk_frames(self) -> list[int]:
        """Frames of each generated chunk."""
        return self.config.video.frames_of_chunks(self.num_chunks, first_chunk=self.num_given)

    def misshapen_outputs(self) -> list[str]:
        """Names of recorded outputs that a comparison needs and that are missing or of a wrong shape."""
        video, steps = self.config.video, range(len(self.config.sampler.steps))
        frame = (self.config.model.latent_channels, video.latent_height, video.latent_width)
        names = [f"s{step}.{kind}" for step in steps for kind in ("flow", "x0")] + ["ctx.flow"]
        wanted = {f"out.c{chunk}.{name}": frames for chunk, frames in enumerate(self.chunk_frames) for name in names}
        wanted |= {f"out.g{chunk}.ctx.flow": frames for chunk, frames in enumerate(self.given_frames)}
        wanted["out.latents"] = sum(self.given_frames) + sum(self.chunk_frames)
        return [
            name
            for name, frames in wanted.items()
            if name not in self.tensors or tuple(self.tensors[name].shape) != (self.batch_size, frames, *frame)
        ]

    def write_checkpoint(self, out: Path) -> Path:
        """Write the recorded weights alone, as a checkpoint that `build` reads."""
        with safe_open(self.path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
            save_file({name: file.get_tensor(name) for name in names}, out)
        return out

    def prompt(self, element: int) -> torch.Tensor:
        """`[L, text_dim]`."""
        return self.tensors["in.prompt_embeds"][element]

    def second_prompt(self, element: int) -> torch.Tensor:
        """`[L, text_dim]`, from `switch_chunk` on."""
        return self.tensors["in.prompt_embeds.p1"][element]

    def given(self, element: int) -> torch.Tensor | None:
        """`[G, 16, H, W]`, or None."""
        return self.tensors["in.initial_latent"][element] if self.num_given else None

    def noise(self, element: int) -> list[torch.Tensor]:
        """For each chunk `[steps, N, 64]` in token order."""
        draws = []
        for chunk, (first, frames) in enumerate(_spans(self.chunk_frames)):
            start = self.tensors["in.noise"][element, first : first + frames]
            again = [
                self.tensors[f"in.renoise.c{chunk}.s{step}"][element * frames : (element + 1) * frames]
                for step in range(len(self.config.sampler.steps) - 1)
            ]
            draws.append(torch.stack([tokens_from_latents(latents, self.config) for latents in (start, *again)]))
        return draws

    def latents(self, element: int) -> list[torch.Tensor]:
        """What was generated, for each chunk `[F, 16, H, W]`."""
        generated = self.tensors["out.latents"][element, sum(self.given_frames) :]
        return list(torch.split(generated, self.chunk_frames))


def _spans(sizes: list[int]) -> list[tuple[int, int]]:
    """(first, size) of pieces that lie one after another."""
    return [(end - size, size) for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]


def open_recording(path: Path, *, world_size: int, head_plan: HeadPlanName = "balanced") -> Recording:
    """Read a recording and check that it can be replayed.

    Raises:
        RecordingError: unreadable, incomplete, or of a kind that this version does not know.
    """
    build = BuildConfig(world_size=world_size, head_plan=head_plan)
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            metadata = file.metadata() or {}
            names = [name for name in file.keys() if not name.startswith("model.")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        recorded: dict[str, Any] = json.loads(metadata["config"])
        given_frames = recorded.get("given_chunk_frames", [])
        window = recorded["local_attn_size"]
        patch_frames, patch_height, patch_width = recorded["patch_size"]
        if patch_frames != 1:
            raise RecordingError(f"{path}: a patch of {patch_frames} latent frames is not known, only of one")
        config = Config(
            model=ModelConfig(
                **{key: recorded[key] for key in ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim")},
                **{key: recorded[key] for key in ("text_dim", "text_len", "eps")},
                latent_channels=recorded["in_dim"],
                patch_height=patch_height,
                patch_width=patch_width,
            ),
            video=VideoConfig(
                latent_height=recorded["latent_h"],
                latent_width=recorded["latent_w"],
                chunk_frames=recorded["num_frame_per_block"],
                window_frames=None if window == -1 else window,
                sink_frames=recorded["sink_size"],
                horizon_frames=recorded["num_frames"] + sum(given_frames),
                independent_first_frame=recorded.get("independent_first_frame", False),
            ),
            sampler=SamplerConfig(
                steps=tuple(recorded["denoising_step_list"]),
                shift=recorded["timestep_shift"],
                warp=recorded["warp_denoising_step"],
                context_timestep=recorded["context_noise"],
            ),
            build=build,
        )
        recording = Recording(
            path=path,
            config=config,
            num_chunks=recorded["num_chunks"],
            batch_size=recorded.get("batch_size", 1),
            num_given=len(given_frames),
            switch_chunk=recorded.get("prompt_switch_chunk"),
            tensors=tensors,
        )
        for element in range(recording.batch_size):
            recording.noise(element), recording.prompt(element), recording.given(element)
            if recording.switch_chunk is not None:
                recording.second_prompt(element)
        wrong = recording.misshapen_outputs()
        if wrong:
            raise RecordingError(f"{path}: outputs that are missing or of another shape: {', '.join(wrong)}")
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ConfigError, RuntimeError, ValueError) as error:
        if isinstance(error, RecordingError):
            raise
        raise RecordingError(
            f"{path} is no recorded rollout that can be replayed: {type(error).__name__}: {error}"
        ) from error
    return recording
