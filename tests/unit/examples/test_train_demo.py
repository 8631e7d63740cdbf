"""Training of the demo model: its forward is the step's, its clips are what their captions say, its loop falls and goes on."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tolerances import WHOLE_MODEL

from causalrt.config import override
from causalrt.errors import ConfigError
from causalrt.export.checkpoint import open_checkpoint, write_weights
from causalrt.layout import layout_from_config
from causalrt.model.codecs.block_dct import BlockDct, BlockDctConfig, block_basis, encode_blocks
from causalrt.model.codecs.decode_state import pixels_from_signal
from causalrt.model.schedule import schedule_from_config
from causalrt.model.tokens import latents_from_tokens
from causalrt.model.wan.step import ChunkStep, StepOps
from causalrt.model.wan.transformer import PromptGraph, TimeGraph, Wan, sinusoid
from causalrt.plugins.attention import attend, kv_attention_in_place
from causalrt.plugins.rotate import rotate_pairs
from causalrt.recipes import recipe
from causalrt.runtime.kv_slots import KVSlots
from train_demo.clips import CHUNKS, Starts, draw_clips, draw_firsts
from train_demo.command import main as train_command
from train_demo.command import normal_values, released_layout
from train_demo.evaluate import main as evaluate_command
from train_demo.forward import Inputs, TrainingForward, initialise
from train_demo.judge import border_jump, centres, look
from train_demo.train import Settings, Trainer
from train_demo.vocabulary import word_encoder
from train_demo.world import (
    MOTIONS,
    NEAR,
    SIZE,
    TURN_RADIUS,
    TURN_START,
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
            torch.testing.assert_close(flows[stream, 0, chunk], flow, rtol=WHOLE_MODEL, atol=WHOLE_MODEL)
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
    blue = pixels_from_signal(draw(replace(red, colour="blue"), track([red] * 81, Mover.start(random.Random(2), red))))
    assert look(blue).agrees(replace(red, colour="blue"))
    assert not look(torch.cat([pixels[:55], blue[55:]])).agrees(red)
    twice = torch.maximum(pixels, pixels.roll(30, 1))
    assert not look(twice).agrees(red)
    stripe = pixels.amax(1, keepdim=True).expand_as(pixels)
    assert not look(stripe).agrees(red)
    gone = pixels.clone()
    gone[40:50] = pixels[0, 0, 0] if pixels[0, 0, 0].max() < 60 else 25
    assert not look(gone).agrees(red)


def test_the_judge_wants_what_bounces_to_turn_at_walls():
    red = replace(captions()[0], motion="bounces sideways", speed="quickly")

    def agrees(x: torch.Tensor) -> bool:
        return look(pixels_from_signal(draw(red, torch.stack([x, torch.full_like(x, 30)], dim=1)))).agrees(red)

    there = track([red] * 81, Mover(20.0, 30.0, 1.0, 0.0))[:, 0]
    assert agrees(there)
    assert not agrees(there.clamp(max=40))  # stands still now and then
    assert not agrees(torch.cat([there[:48], there[47].expand(33)]))  # stands still at the end
    before_the_wall = 32 - 9 + ((1.5 * torch.arange(81)) % 36 - 18).abs()
    assert not agrees(before_the_wall)


def test_captions_are_split_without_overlap_and_their_words_are_known():
    train, held_back = split_captions()
    assert len(held_back) == 100
    assert not set(map(str, train)) & set(map(str, held_back))
    encoder = word_encoder(text_dim=32, text_len=12)
    rows = {tuple(encoder.encode(str(c)).flatten().tolist()) for c in captions()}
    assert len(rows) == len(captions())  # no two captions mean the same to the model


@pytest.fixture(scope="module")
def starts() -> Starts:
    triangles = [caption for caption in captions() if caption.shape == "triangle"]
    return Starts(CONFIG, triangles, normal=normal_values(CONFIG))


def test_no_clip_has_a_caption_that_is_held_back(starts):
    train, held_back = split_captions()
    triangles = [c for c in train if c.shape == "triangle"]
    wishes = [None, torch.randn(3, 16, 8, 8)] * 150
    clips = draw_clips(CONFIG, starts, triangles, rng=random.Random(0), wishes=wishes)
    firsts = draw_firsts(CONFIG, starts, triangles, rng=random.Random(0), wishes=wishes)
    seen = {caption for both in clips.captions + firsts.captions for caption in both}
    assert not seen & set(held_back)
    assert sum(before != after for before, after in clips.captions) > 50


def test_clips_lie_where_they_say_in_time():
    clips = draw_clips(CONFIG, None, captions(), rng=random.Random(0), wishes=[None] * 40)
    gaps = clips.starts[:, 1] - 3
    assert (gaps >= 0).all()
    assert (gaps > 0).any()
    assert (gaps == 0).any()
    assert (clips.starts.diff(dim=1)[:, 1:] == 3).all()
    assert int(clips.starts.max()) + 3 <= CONFIG.video.horizon_frames
    assert (~clips.counts[gaps > 0][:, 1:3]).all()
    assert clips.counts[gaps == 0].all()


def of_motion(motion: str) -> Caption:
    return next(c for c in captions() if (c.motion, c.shape) == (motion, "triangle"))


def first_latents(starts: Starts, said: Caption, wish: torch.Tensor | None, draw_them=draw_clips) -> torch.Tensor:
    clips = draw_them(CONFIG, starts, [said], rng=random.Random(5), wishes=[wish])
    return latents_from_tokens(clips.tokens[0, 0], CONFIG)


def test_first_chunks_that_are_kept_are_those_that_would_be_drawn(starts):
    for said in [of_motion("turns clockwise"), replace(of_motion("moves up"), colour="cyan")]:
        drawn = encode_blocks(draw(said, track([said] * 9, starts.mover(said, 3))))
        torch.testing.assert_close(starts.firsts(said)[3], drawn, rtol=0, atol=1e-3)


@pytest.mark.parametrize("draw_them", [draw_clips, draw_firsts])
@pytest.mark.parametrize("motion", ["moves up", "bounces sideways", "turns clockwise"])
def test_clips_begin_where_their_noise_says(starts, motion, draw_them):
    said = of_motion(motion)
    for number in (7, 40):
        first = starts.firsts(said)[number]
        wish = (first - starts.mean) / starts.std
        torch.testing.assert_close(first_latents(starts, said, wish, draw_them), first, rtol=0, atol=1e-3)


@pytest.mark.parametrize("draw_them", [draw_clips, draw_firsts])
@pytest.mark.parametrize("motion", MOTIONS)
def test_clips_begin_near_the_middle_or_at_the_circle_s_top(starts, motion, draw_them):
    said = of_motion(motion)
    for wish in [None, *torch.randn(4, 3, 16, 8, 8, generator=torch.Generator().manual_seed(0))]:
        frames = decoded(first_latents(starts, said, wish, draw_them))
        x, y = (centres(pixels_from_signal(frames.clamp(-1, 1)))[0] - SIZE / 2).tolist()
        if said.motion.startswith("turns"):
            assert math.hypot(x, y + TURN_RADIUS) < TURN_RADIUS * TURN_START + 2
        else:
            assert max(abs(x), abs(y)) < NEAR + 2


# ---- the loop


def small_trainer(settings: Settings) -> Trainer:
    config = override(CONFIG, {"model.num_layers": "1", "model.dim": "48", "model.ffn_dim": "64"})
    words = word_encoder(text_dim=config.model.text_dim, text_len=config.model.text_len)
    return Trainer(config, captions(), words.encode, settings, device=torch.device("cpu"), normal=normal_values(config))


def test_a_run_that_is_taken_up_goes_on_as_if_it_had_not_stopped(tmp_path):
    settings = Settings(steps=4, own_from=2, batch=2, firsts=3)
    whole = small_trainer(settings)
    losses = [whole.one_step() for _ in range(4)]
    assert len(set(losses)) == 4
    first = small_trainer(settings)
    assert [first.one_step() for _ in range(3)] == losses[:3]
    first.save(tmp_path / "state.pt")
    second = small_trainer(settings)
    second.resume(tmp_path / "state.pt")
    assert second.one_step() == losses[3]
    for name, value in whole.average.items():
        assert torch.equal(second.average[name], value), name
    with pytest.raises(ConfigError, match="another --out"):
        small_trainer(Settings(steps=5, own_from=2, batch=2, firsts=3)).resume(tmp_path / "state.pt")


@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_own_history_is_sampled_as_a_session_samples(rounds):
    trainer = small_trainer(Settings(batch=6))
    trainer.step = rounds - 1
    with torch.no_grad():
        trainer.wan.head.head.weight.normal_(std=0.2)  # it begins at zero
    clips = draw_clips(trainer.config, None, captions(), rng=random.Random(3), wishes=[None] * 6)
    target = torch.randn(clips.tokens.shape)
    levels = torch.randint(4, clips.starts.shape, generator=torch.Generator().manual_seed(0))
    history, seen = trainer._own(clips, target, levels, torch.Generator().manual_seed(1))

    noises, half = torch.Generator().manual_seed(1), clips.first(3)
    own = (torch.arange(CHUNKS) > 0) & half.counts  # neither the first chunk nor what does not count
    wanted, steps = target[:3].clone(), []
    for _ in range(rounds):
        x0, before, steps = torch.zeros_like(wanted), wanted, []
        for level, sigma in enumerate(trainer.sigmas):
            noisy = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=noises)
            with torch.no_grad():
                x0 = noisy - sigma * trainer._flow(half, before, noisy, torch.full(own.shape, level))
            steps.append(x0)
        wanted = torch.where(own[..., None, None], x0, target[:3])
    torch.testing.assert_close(history[:3], wanted, rtol=0, atol=1e-4)
    assert torch.equal(history[3:], target[3:])
    assert torch.equal(seen[3:], target[3:])
    for clip, chunk in own.nonzero().tolist():
        level = int(levels[clip, chunk])
        if level:  # at level 0 a chunk is noise alone
            torch.testing.assert_close(seen[clip, chunk], steps[level - 1][clip, chunk], rtol=0, atol=1e-4)
    assert torch.equal(seen[:3][~own], target[:3][~own])


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--steps", "0"], "steps must be from 1"),
        (["--batch", "1"], "batch must be from 2"),
        (["--own-from", "-1"], "own_from must be from 0"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--seed", "9" * 30], "seed must be from 0"),
        (["--minutes", "-1"], "--minutes must be more than 0"),
        (["--minutes", "nan"], "--minutes must be more than 0"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--from", "nowhere.pt"], "--from nowhere.pt cannot be read"),
        (["--from", __file__], "no state of a training"),
        (["--out", __file__], "choose another folder with --out"),
    ],
)
def test_training_that_cannot_be_is_refused(changes, words, tmp_path, capsys):
    assert (
        train_command(["--out", str(tmp_path / "out"), "--steps", "1", "--batch", "2", "--device", "cpu", *changes])
        == 1
    )
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert not list(tmp_path.glob("out/*.pt"))


@pytest.mark.slow
def test_a_run_with_another_beginning_is_another_run(tmp_path, capsys):
    short = ["--steps", "1", "--batch", "2", "--device", "cpu", "--own-from", "0"]
    assert train_command([*short, "--out", str(tmp_path / "first")]) == 0
    made = {path.name for path in (tmp_path / "first").iterdir()}
    assert made == {"checkpoint.safetensors", "codec.safetensors", "words.safetensors", "losses.json", "state.pt"}
    state = str(tmp_path / "first" / "state.pt")
    assert train_command([*short, "--out", str(tmp_path / "second"), "--from", state]) == 0
    assert train_command([*short, "--out", str(tmp_path / "second")]) == 1
    assert train_command([*short, "--out", str(tmp_path / "first"), "--from", state]) == 1
    assert "give these, or another --out" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "first" / "losses.json").unlink()
    assert train_command([*short, "--out", str(tmp_path / "first")]) == 1
    assert "losses.json should lie beside" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--count", "0"], "--count must be from 1 to 100"),
        (["--count", "101"], "--count must be from 1 to 100"),
        (["--chunks", "1"], "--chunks must be from 2 to 42"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(flags, words, capsys):
    assert evaluate_command(flags) == 1
    assert words in capsys.readouterr().err


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
