"""Training of the demo model: its forward is the step's, its clips are what their captions say, its loop falls and goes on."""

import random

import pytest
import torch

from causalrt.config import override, recipe
from causalrt.layout import layout_from_config
from causalrt.model.block_dct import block_basis, decode_block, encode_blocks
from causalrt.model.decode_state import pixels_from_signal
from causalrt.model.schedule import schedule_from_config
from causalrt.model.step import ChunkStep, StepOps
from causalrt.model.wan import PromptGraph, TimeGraph, Wan, sinusoid
from causalrt.plugins.attention import attend, kv_attention_in_place
from causalrt.plugins.rotate import rotate_pairs
from causalrt.runtime.kv_slots import KVSlots
from causalrt.tools.demo_train.clips import CHUNKS, draw_clips
from causalrt.tools.demo_train.forward import Inputs, TrainingForward
from causalrt.tools.demo_train.judge import border_jump, look
from causalrt.tools.demo_train.vocabulary import word_encoder
from causalrt.tools.demo_train.world import Mover, captions, draw, split_captions, track

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


@pytest.mark.parametrize("codec", [False, True])
def test_the_judge_tells_every_held_back_caption_from_its_clip(codec):
    rng = random.Random(1)
    _, held_back = split_captions()
    for caption in held_back:
        mover = Mover.start(rng)
        mover.step(caption)
        frames = draw(caption, track([caption] * 81, mover))
        if codec:
            latents = encode_blocks(frames)
            blocks = [decode_block(latent, block_basis()) for latent in latents]
            frames = torch.cat([blocks[0][:1], *blocks[1:]])
        pixels = pixels_from_signal(frames.clamp(-1, 1))
        seen = look(pixels)
        assert seen.agrees(caption), f"{caption}: {seen}"
        at, elsewhere = border_jump(pixels, [9, 21, 33, 45, 57, 69])
        assert at <= elsewhere + 0.5


def test_the_judge_refuses_what_moves_otherwise_or_has_another_colour():
    rng = random.Random(2)
    red = next(c for c in captions() if str(c) == "a red circle moves right slowly")
    pixels = pixels_from_signal(draw(red, track([red] * 81, Mover.start(rng))))
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
