"""Training of the demo model: its forward is the step's, its clips are what their captions say, its loop falls and goes on."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from causalrt.config import override, recipe
from causalrt.errors import ConfigError
from causalrt.export.checkpoint import open_checkpoint, write_weights
from causalrt.layout import layout_from_config
from causalrt.model.block_dct import BlockDct, BlockDctConfig, block_basis, encode_blocks
from causalrt.model.decode_state import pixels_from_signal
from causalrt.model.schedule import schedule_from_config
from causalrt.model.step import ChunkStep, StepOps
from causalrt.model.wan import PromptGraph, TimeGraph, Wan, sinusoid
from causalrt.plugins.attention import attend, kv_attention_in_place
from causalrt.plugins.rotate import rotate_pairs
from causalrt.runtime.kv_slots import KVSlots
from causalrt.runtime.requests import latents_from_tokens
from causalrt.tools.demo_train.clips import CHUNKS, draw_clips
from causalrt.tools.demo_train.command import as_tokens, normal_values, released_layout
from causalrt.tools.demo_train.command import main as train_command
from causalrt.tools.demo_train.forward import Inputs, TrainingForward, initialise
from causalrt.tools.demo_train.judge import border_jump, centres, look
from causalrt.tools.demo_train.train import Settings, Trainer
from causalrt.tools.demo_train.vocabulary import word_encoder
from causalrt.tools.demo_train.world import (
    SIZE,
    TURN_RADIUS,
    WALLS,
    Caption,
    Mover,
    captions,
    draw,
    split_captions,
    track,
)

CONFIG = recipe("demo")


@torch.no_grad()
def test_the_training_forward_is_the_chunk_step_of_the_executors():
    torch.manual_seed(0)
    wan = Wan(CONFIG.model)
    for name, parameter in wan.named_parameters():
        parameter.normal_(std=0.15 if parameter.dim() > 1 else 0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    schedule = schedule_from_config(CONFIG.sampler)
    timesteps = (*schedule.timesteps, schedule.context_timestep)
    tokens = torch.randn(2, 1, CHUNKS, CONFIG.tokens_per_chunk, 64)
    text = torch.randn(2, CONFIG.model.text_len, CONFIG.model.text_dim)
    prompts = torch.tensor([[0, 0, 0, 1, 1, 1]])
    levels = torch.tensor([[[4] * CHUNKS], [[0, 1, 2, 3, 0, 1]]])
    starts = 3 * torch.arange(CHUNKS)[None]
    forward = TrainingForward(wan, CONFIG, timesteps=timesteps, num_chunks=CHUNKS, device=torch.device("cpu"))
    flows = forward(Inputs(tokens=tokens, times=levels, text=text, prompts=prompts, starts=starts))

    config = override(CONFIG, {"build.world_size": "1"})
    one = layout_from_config(config)
    ops = StepOps(all_to_all=torch.clone, rotate=rotate_pairs, attention=attend, kv_attention=kv_attention_in_place)
    step, slots = ChunkStep(wan, config, one, ops), KVSlots(config, one, torch.float32)
    cross = [PromptGraph(wan)(rows) for rows in text]
    times = [TimeGraph(wan)(sinusoid(t, CONFIG.model.freq_dim).float()) for t in timesteps]
    rank = torch.zeros(1, dtype=torch.int64)
    for chunk in range(CHUNKS):
        frame = 3 * chunk
        for stream in (1, 0):  # the clean one last: it is what history takes
            time = times[levels[stream, 0, chunk]]
            flow, _ = step(
                tokens[stream, 0, chunk],
                *time,
                rank,
                torch.tensor([frame]),
                slots.filled(frame),
                cross[prompts[0, chunk]],
            )
            torch.testing.assert_close(flows[stream, 0, chunk], flow, rtol=2e-5, atol=2e-5)
        slots.commit(frame)


def decoded(latents: torch.Tensor) -> torch.Tensor:
    as_it_is = BlockDctConfig(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
    transform = BlockDct(as_it_is, block_basis())
    blocks = [transform.decode(latent[None])[0].transpose(0, 1) for latent in latents]
    return torch.cat([blocks[0][:1], *blocks[1:]])


@pytest.mark.parametrize("codec", [False, True])
def test_the_judge_tells_every_held_back_caption_from_its_clip(codec):
    rng = random.Random(1)
    _, held_back = split_captions()
    for caption in held_back:
        mover = Mover.start(rng, caption)
        mover.step(caption)
        frames = draw(caption, track([caption] * 81, mover))
        if codec:
            frames = decoded(encode_blocks(frames))
        pixels = pixels_from_signal(frames.clamp(-1, 1))
        seen = look(pixels)
        assert seen.agrees(caption), f"{caption}: {seen}"
        at, elsewhere = border_jump(pixels, [9, 21, 33, 45, 57, 69])
        assert at <= elsewhere + 0.75


def test_the_judge_refuses_what_moves_otherwise_or_has_another_colour():
    rng = random.Random(2)
    red = next(c for c in captions() if str(c) == "a red circle moves right slowly")
    pixels = pixels_from_signal(draw(red, track([red] * 81, Mover.start(rng, red))))
    assert look(pixels).agrees(red)
    assert not any(look(pixels).agrees(other) for other in captions() if other.shape == "circle" and other != red)
    noise = torch.randint(0, 255, pixels.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert look(noise).motion is None
    still = pixels[:1].expand_as(pixels)
    assert look(still).motion is None
    gone = pixels.clone()
    gone[40:50] = pixels[0, 0, 0] if pixels[0, 0, 0].max() < 60 else 25
    assert not look(gone).agrees(red)


def test_captions_are_split_without_overlap_and_their_words_are_known():
    train, held_back = split_captions()
    assert len(held_back) == 100
    assert not set(map(str, train)) & set(map(str, held_back))
    encoder = word_encoder(text_dim=32, text_len=12)
    rows = {tuple(encoder.encode(str(c)).flatten().tolist()) for c in captions()}
    assert len(rows) == len(captions())  # no two captions mean the same to the model


def test_clips_lie_where_they_say_in_time():
    clips = draw_clips(CONFIG, captions(), count=40, rng=random.Random(0))
    gaps = clips.starts[:, 1] - 3
    assert (gaps >= 0).all()
    assert (gaps > 0).any()
    assert (gaps == 0).any()
    assert (clips.starts.diff(dim=1)[:, 1:] == 3).all()
    assert int(clips.starts.max()) + 3 <= CONFIG.video.horizon_frames
    assert (~clips.counts[gaps > 0][:, 1:3]).all()
    assert clips.counts[gaps == 0].all()


def first_latents(caption: Caption, wish: torch.Tensor | None) -> torch.Tensor:
    clips = draw_clips(CONFIG, [caption], count=1, rng=random.Random(5), wishes=[wish])
    return latents_from_tokens(clips.tokens[0, 0], CONFIG)


@pytest.mark.parametrize(
    ("motion", "down_and_right"), [("moves up", (3, 5)), ("bounces sideways", (2, 0)), ("turns clockwise", (0, 0))]
)
def test_clips_begin_where_their_noise_says(motion, down_and_right):
    caption = next(c for c in captions() if c.motion == motion)
    wish = first_latents(caption, None).roll(down_and_right, (2, 3))
    assert torch.equal(first_latents(caption, wish), wish)


@pytest.mark.parametrize("motion", ["bounces sideways", "bounces up and down", "turns clockwise"])
def test_clips_begin_nearer_to_what_was_wished_and_where_they_may(motion):
    caption = next(c for c in captions() if c.motion == motion)
    without = first_latents(caption, None)
    wish = without.roll((4, 4), (2, 3))  # where no clip of this kind may be
    moved = first_latents(caption, wish)
    assert (moved * wish).sum() > (without * wish).sum() + 1
    x, y = centres(pixels_from_signal(decoded(moved).clamp(-1, 1)))[0].tolist()
    if motion == "turns clockwise":
        assert math.hypot(x - SIZE / 2, y - SIZE / 2) == pytest.approx(TURN_RADIUS, abs=1)
    else:
        assert WALLS[0] - 1 < (x if motion == "bounces sideways" else y) < WALLS[1] + 1


# ---- the loop


def small_trainer(settings: Settings) -> Trainer:
    config = override(CONFIG, {"model.num_layers": "1", "model.dim": "48", "model.ffn_dim": "64"})
    words = word_encoder(text_dim=config.model.text_dim, text_len=config.model.text_len)
    normal = tuple(as_tokens(value, config) for value in normal_values(config))
    return Trainer(config, captions(), words.encode, settings, device=torch.device("cpu"), normal=normal)


def test_a_run_that_is_taken_up_goes_on_as_if_it_had_not_stopped(tmp_path):
    settings = Settings(steps=6, own_from=3, batch=2)
    whole = small_trainer(settings)
    losses = [whole.one_step() for _ in range(6)]
    assert len(set(losses)) == 6
    first = small_trainer(settings)
    assert [first.one_step() for _ in range(4)] == losses[:4]
    first.save(tmp_path / "state.pt")
    second = small_trainer(settings)
    second.resume(tmp_path / "state.pt")
    assert [second.one_step() for _ in range(2)] == losses[4:]
    for name, value in whole.average.items():
        assert torch.equal(second.average[name], value), name
    with pytest.raises(ConfigError, match="another --out"):
        small_trainer(Settings(steps=7, own_from=3, batch=2)).resume(tmp_path / "state.pt")


def test_own_history_leaves_the_first_chunk_and_what_does_not_count(monkeypatch):
    trainer = small_trainer(Settings(batch=6))
    clips = draw_clips(trainer.config, captions(), count=6, rng=random.Random(3))
    target = torch.randn(clips.tokens.shape)
    levels = torch.randint(4, clips.starts.shape, generator=torch.Generator().manual_seed(0))
    history, seen = trainer._own(clips, target, levels, torch.Generator().manual_seed(1))
    changed = (history != target).any(-1).any(-1)
    assert not changed[:, 0].any()
    assert not changed[~clips.counts].any()
    assert torch.equal(changed[:3], clips.counts[:3] & (torch.arange(CHUNKS) > 0))
    assert not changed[3:].any()
    # At the first level a chunk is noise alone: nothing of the model's can be in it.
    assert torch.equal(seen[levels == 0], target[levels == 0])


def test_what_is_written_is_a_checkpoint_in_the_released_layout(tmp_path):
    config = override(CONFIG, {"build.world_size": "1"})
    wan = Wan(config.model)
    initialise(wan, seed=1)
    with torch.no_grad():
        wan.head.head.weight.normal_()
    save_file(released_layout(config, dict(wan.named_parameters())), tmp_path / "checkpoint.safetensors")
    write_weights(
        open_checkpoint(tmp_path / "checkpoint.safetensors"),
        config.model,
        dtype=torch.float32,
        out=tmp_path / "weights.safetensors",
    )
    written = load_file(tmp_path / "weights.safetensors")
    assert set(written) == set(dict(wan.named_parameters()))
    for name, parameter in wan.named_parameters():
        assert torch.equal(written[name], parameter), name


@pytest.mark.slow
def test_a_short_training_brings_the_loss_down(tmp_path):
    short = ["--out", str(tmp_path), "--device", "cpu", "--steps", "150", "--batch", "4"]  # about two minutes
    assert train_command(short) == 0
    losses = json.loads((tmp_path / "losses.json").read_text())["losses"]
    assert len(losses) == 150
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    stored = load_file(tmp_path / "checkpoint.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) < 6_000_000
    assert train_command(short) == 0  # there is nothing left to do, and nothing is lost
    assert json.loads((tmp_path / "losses.json").read_text())["losses"] == losses
    assert train_command([*short, "--seed", "1"]) == 1
