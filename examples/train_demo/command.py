"""`python -m train_demo`: trains, shows progress and loss, saves the state, and writes the files that are shipped."""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save

from causalrt.config import Config
from causalrt.demo_model import CHECKPOINT, CODEC
from causalrt.errors import CausalRTError, ConfigError
from causalrt.model.codecs.block_dct import write_block_dct
from causalrt.model.tokens import latents_from_tokens
from causalrt.recipes import recipe
from causalrt.terminal import PrintableConsole
from causalrt.tools.files import make_folder, write_whole
from train_demo.clips import draw_clips
from train_demo.train import Settings, Trainer
from train_demo.vocabulary import word_encoder
from train_demo.world import split_captions

STATE, LOSSES = "state.pt", "losses.json"
MEASURED_CLIPS = 200
FIRSTS_PER_CLIP = 4
SAVE_EVERY_S = 120.0
SHOWN = 50
"""Number of steps whose mean loss is shown."""


def normal_values(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, spread) `[16]` of the latent channels, over clips of the training captions."""
    train, _ = split_captions()
    clips = draw_clips(config, None, train, rng=random.Random(0), wishes=[None] * MEASURED_CLIPS)
    latents = torch.cat([latents_from_tokens(chunk, config) for clip in clips.tokens for chunk in clip])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


def released_layout(config: Config, average: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters with the names and shapes of a Self-Forcing checkpoint, which `write_weights` reads."""
    model = config.model
    found = {}
    for name, tensor in average.items():
        value = tensor.cpu()
        if name == "patch_embedding.weight":
            value = value.view(-1, model.latent_channels, 1, model.patch_height, model.patch_width)
        elif name.startswith("head.head"):
            rows = value.view(model.latent_channels, model.patch_height, model.patch_width, *value.shape[1:])
            value = rows.movedim(0, 2).flatten(0, 2)
        found[f"model.{name}"] = value.float().contiguous()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="folder of the state and of what is made")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of the optimiser")
    parser.add_argument(
        "--own-from", type=int, help="step from which on history is the model's own (default: 11/14 of them)"
    )
    parser.add_argument(
        "--batch", type=int, default=Settings.batch, help="clips of a step; beside them four first chunks each"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="STATE", help="begin with the weights of another run"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so many; the same command goes on"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="by torch.compile: a third less time, after two minutes")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16, for processors that multiply in it")
    try:
        return _train(parser.parse_args(arguments))
    except CausalRTError as error:
        PrintableConsole(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 1


def _train(arguments: argparse.Namespace) -> int:
    if not arguments.minutes > 0:
        raise ConfigError(f"--minutes must be more than 0, got {arguments.minutes}")
    config, device, out = recipe("demo"), _device(arguments.device), arguments.out
    make_folder(out)
    own_from = arguments.steps * 11 // 14 if arguments.own_from is None else arguments.own_from
    settings = Settings(
        steps=arguments.steps,
        own_from=own_from,
        batch=arguments.batch,
        firsts=FIRSTS_PER_CLIP * arguments.batch,
        bf16=arguments.bf16,
        seed=arguments.seed,
        start="" if arguments.start is None else _digest(arguments.start),
    )
    train, _ = split_captions()
    words = word_encoder(text_dim=config.model.text_dim, text_len=config.model.text_len)
    mean, std = normal_values(config)
    trainer = Trainer(
        config,
        train,
        words.encode,
        settings,
        device=device,
        normal=(mean, std),
    )
    words.save(out)
    write_block_dct(out / CODEC, mean=mean.tolist(), std=std.tolist())
    if arguments.start is not None:
        trainer.start_from(arguments.start)
    losses = _resume(trainer, out)
    if arguments.compile:
        trainer.forward_pass = torch.compile(trainer.forward)
        trainer.first_pass = torch.compile(trainer.first_forward)
    started = saved = time.perf_counter()
    console = PrintableConsole(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as progress:
        task = progress.add_task("training", total=settings.steps, completed=trainer.step, loss=float("nan"))
        while trainer.step < settings.steps and time.perf_counter() - started < 60 * arguments.minutes:
            losses.append(trainer.one_step())
            recent = losses[-SHOWN:]
            progress.update(task, completed=trainer.step, loss=sum(recent) / len(recent))
            if not console.is_terminal and trainer.step % SHOWN == 0:
                console.print(f"step {trainer.step} of {settings.steps}, loss {sum(recent) / len(recent):.4f}")
            if time.perf_counter() - saved > SAVE_EVERY_S:
                _save(trainer, out, losses)
                saved = time.perf_counter()
    _save(trainer, out, losses)
    console.print(
        f"{trainer.step} of {settings.steps} steps; written: {out / CHECKPOINT}, {out / STATE}, {out / LOSSES}"
    )
    return 0


def _resume(trainer: Trainer, out: Path) -> list[float]:
    """Resume where an earlier run stopped, and return the losses so far."""
    if not (out / STATE).exists():
        return []
    trainer.resume(out / STATE)
    try:
        losses: list[float] = json.loads((out / LOSSES).read_text())["losses"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{out / LOSSES} should lie beside {STATE}: {error}; give another --out") from None
    return losses[: trainer.step]


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--from {path} cannot be read: {error.strerror}") from None


def _save(trainer: Trainer, out: Path, losses: list[float]) -> None:
    write_whole(out / LOSSES, json.dumps({"losses": losses}).encode())
    trainer.save(out / STATE)
    write_whole(out / CHECKPOINT, save(released_layout(trainer.config, trainer.average)))
