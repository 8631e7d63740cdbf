"""Sessions with frames: latents through the decoder's process, against diffusers' own decode of the whole video."""

import asyncio
import os
import signal
import threading
import time

import pytest
import torch
from support.memory_faults import run_out_of_memory
from support.small_bundles import bundle_factory, prompt, tiny_config
from support.small_encoders import write_text_encoder, write_vae
from support.tolerances import MODULE

import causalrt
from causalrt.engines.bundle import VAE_WEIGHTS
from causalrt.errors import (
    BundleError,
    CapacityError,
    EngineClosedError,
    ExecutorError,
    PromptError,
    RankError,
    RequestError,
)
from causalrt.model.codecs.decode_state import pixels_from_signal
from causalrt.model.codecs.registry import encode, load_vae

pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")
PARTS = ("eager", "onnxruntime")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, vae_folder):
    made = {name: bundle_factory(tmp_path_factory.mktemp(name), executor=name, vae=vae_folder) for name in PARTS}
    return lambda name="eager", world_size=1, changes=None: made[name](world_size, changes)


@pytest.fixture(scope="module")
def engine(bundles):
    with causalrt.load(bundles(), executor="eager", device="cpu", max_sessions=2) as engine:
        yield engine


def decoded_whole(bundle, latents):
    """What diffusers makes of a whole video's latents, as pixels."""
    vae = load_vae(bundle / VAE_WEIGHTS)
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        video = vae.decode((latents * std + mean).transpose(0, 1).unsqueeze(0)).sample[0].transpose(0, 1)
    return pixels_from_signal(video)


def assert_same_pixels(frames, wanted):
    """All but a rounding here and there."""
    assert frames.shape == wanted.shape
    assert frames.dtype == wanted.dtype == torch.uint8
    difference = (frames.int() - wanted.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
    assert wanted.float().std() > 10  # there is something to see


@pytest.mark.parametrize(
    ("name", "world_size"), [("eager", 1), ("onnxruntime", 2), pytest.param("eager", 3, marks=pytest.mark.slow)]
)
def test_frames_are_those_of_the_whole_video(bundles, name, world_size):
    path = bundles(name, world_size)
    with causalrt.load(path, executor=name, vae_executor=name, device="cpu") as engine:
        assert engine.has_vae
        chunks = list(engine.session(prompt(), seed=1))
    video = engine.config.video
    assert [chunk.frames.shape for chunk in chunks] == [
        (frames, video.pixel_height, video.pixel_width, 3) for frames in (9, 12, 12, 12)
    ]
    assert_same_pixels(
        torch.cat([chunk.frames for chunk in chunks]), decoded_whole(path, torch.cat([c.latents for c in chunks]))
    )
    for chunk in chunks:
        parts = chunk.queue_ms + sum(chunk.times.denoise_ms) + chunk.times.gather_ms + chunk.decode_ms
        assert chunk.decode_ms > 0
        assert chunk.latency_ms == pytest.approx(parts + chunk.hand_over_ms)


def test_sessions_side_by_side_do_not_meet(engine):
    alone = [torch.cat([chunk.frames for chunk in engine.session(prompt(seed), seed=seed)]) for seed in (0, 1)]
    pair = [engine.session(prompt(seed), seed=seed) for seed in (0, 1)]
    together = [
        torch.cat(frames) for frames in zip(*[(a.frames, b.frames) for a, b in zip(*pair, strict=True)], strict=True)
    ]
    assert not torch.equal(*alone)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_chunks_made_ahead_are_the_same(engine):
    wanted = list(engine.session(prompt(), seed=2))
    session = engine.session(prompt(), seed=2, ahead=True)
    assert session.next_chunk == 0
    first = next(session)
    assert session.next_chunk == 2  # chunk 1 is under way
    found = [first, *session]
    for one, other in zip(found, wanted, strict=True):
        assert one.index == other.index
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.frames, other.frames)
    switched = engine.session(prompt(), seed=2, ahead=True)
    chunks = [next(switched)]
    switched.switch_prompt(prompt(1))
    chunks += switched
    same = [torch.equal(one.latents, other.latents) for one, other in zip(chunks, wanted, strict=True)]
    assert same == [True, True, False, False]
    held = engine.session(prompt(), ahead=True)
    next(held)
    held.close()  # with a chunk under way
    assert engine.open_sessions == 0
    assert engine.makes_ahead is False


def test_given_latents_are_the_video_s_past(engine, bundles):
    first = next(iter(engine.session(prompt(), seed=3)))
    session = engine.session(prompt(), seed=3, initial_latents=first.latents)
    assert torch.equal(session.initial_frames, first.frames)
    chunk = next(session)
    assert len(chunk.frames) == 12
    whole = decoded_whole(bundles(), torch.cat([first.latents, chunk.latents]))
    assert_same_pixels(chunk.frames, whole[9:])
    session.close()


def test_a_clip_becomes_latents(engine, bundles):
    clip = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = engine.encode_frames(clip)
    torch.testing.assert_close(latents, encode(load_vae(bundles() / VAE_WEIGHTS), clip), rtol=0, atol=MODULE)
    with engine.session(prompt(), initial_latents=latents) as session:
        assert len(next(session).frames) == 12
    for wrong in (clip[:3], clip[:, :16], clip.float(), torch.cat([clip] * 5 + [clip[:4]]), clip[:0], None):
        with pytest.raises(RequestError, match=r"must be uint8 \[T, 32, 48, 3\] with T = 1, 5, 9 ... at most 45"):
            engine.encode_frames(wrong)
    assert engine.decoder.pid  # a refusal ends nothing


def test_more_sessions_than_fit_are_refused(engine):
    held = [engine.session(prompt(seed)) for seed in range(2)]
    with pytest.raises(CapacityError, match=r"2 sessions are open.*end one with"):
        engine.session(prompt())
    assert engine.open_sessions == 2
    held.pop().close()
    again = engine.session(prompt())
    assert next(again).index == 0
    engine.wait()
    del again  # nobody holds it: its room is free
    assert engine.open_sessions == 1
    with engine.session(prompt()) as third:
        assert next(third).frames is not None
    held.pop().close()
    assert engine.open_sessions == 0


def test_async_iteration_and_cancel(engine):
    async def watch():
        async with asyncio.timeout(60):
            return [chunk async for chunk in engine.session(prompt(), seed=5)]

    assert [chunk.index for chunk in asyncio.run(watch())] == [0, 1, 2, 3]
    session = engine.session(prompt())
    next(session)
    session.cancel()
    assert list(session) == []
    assert engine.open_sessions == 0


def test_sessions_take_turns(engine):
    """Two threads that never pause: neither gets two chunks more than the other."""
    order, start = [], threading.Barrier(2)

    def run(name):
        with engine.session(prompt(), num_chunks=4) as session:
            start.wait()
            order.extend(name for _ in session)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ahead = [abs(order[:n].count("a") - order[:n].count("b")) for n in range(1, 9)]
    assert max(ahead) <= 2


def test_prompts_as_text(bundles, tmp_path):
    folder = write_text_encoder(tmp_path)
    with causalrt.load(bundles(), device="cpu", text_encoder=folder) as engine:
        embeds, _ = engine.encode_prompt("a fox runs")
        spoken, given = engine.session("a fox runs", seed=2), engine.session(embeds, seed=2)
        assert spoken.text_ms > 0 == given.text_ms
        for session in (spoken, given):
            next(session)
        assert spoken.switch_prompt("a cat sleeps") > 0
        given.switch_prompt(engine.encode_prompt("a cat sleeps")[0])
        assert torch.equal(next(spoken).frames, next(given).frames)
    with causalrt.load(bundles(), device="cpu", vae=False) as engine:
        assert not engine.has_vae
        with pytest.raises(PromptError, match="no text encoder; load it with text_encoder=FOLDER"):
            engine.session("a fox")
        chunk = next(engine.session(prompt()))
        assert (chunk.frames, chunk.decode_ms) == (None, 0.0)
        with pytest.raises(RequestError, match="build the bundle with `--vae FILE`"):
            engine.encode_frames(torch.zeros(1, 32, 48, 3, dtype=torch.uint8))


def test_a_decoder_that_was_not_built(bundles):
    with pytest.raises(BundleError, match=r"^vae_executor: .*for eager; build again with `--executor onnxruntime`"):
        causalrt.load(bundles(), vae_executor="onnxruntime")


def test_a_text_encoder_on_another_device(bundles, tmp_path):
    folder = write_text_encoder(tmp_path)
    with pytest.raises(ExecutorError, match=r"no device cuda:0 here|there is no device cuda:0"):
        causalrt.load(bundles(), device="cpu", text_encoder=folder, text_device="cuda:0")


def test_a_bundle_without_a_vae(tmp_path):
    path = bundle_factory(tmp_path)(1)
    with pytest.raises(BundleError, match="was built without a VAE; build it again with `--vae FILE`"):
        causalrt.load(path, vae=True)
    with causalrt.load(path, device="cpu") as engine:
        assert not engine.has_vae


def test_a_decoder_without_memory_for_a_session_refuses_it(bundles, engine, monkeypatch, tmp_path):
    """The session ends; the others, and those that come later, have the frames that they should have."""

    def frames(session):
        return [chunk.frames for chunk in session]

    wanted = {seed: frames(engine.session(prompt(), seed=seed)) for seed in (1, 2)}
    full = run_out_of_memory(monkeypatch, tmp_path, "vae_server", "VaeServer._state")
    clip = torch.zeros(9, 32, 48, 3, dtype=torch.uint8)
    with causalrt.load(bundles(), executor="eager", device="cpu") as engine:
        open_one, pid = engine.session(prompt(), seed=1), engine.decoder.pid
        made = [next(open_one).frames]
        given = engine.encode_frames(clip)
        full.touch()
        refused = engine.session(prompt(), seed=2)
        with pytest.raises(
            CapacityError, match=r"^the decoder has no memory for a further session \(CUDA out of memory"
        ):
            next(refused)
        with pytest.raises(EngineClosedError):
            next(refused)
        with pytest.raises(CapacityError):
            engine.session(prompt(), initial_latents=given)
        full.unlink()
        assert all(map(torch.equal, frames(engine.session(prompt(), seed=2)), wanted[2]))
        assert all(map(torch.equal, [*made, *frames(open_one)], wanted[1]))
        assert engine.decoder.pid == pid
        assert engine.open_sessions == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_a_decoder_that_fails_ends_the_engine(bundles, number):
    engine = causalrt.load(bundles(), device="cpu", timeout_s=2)
    pids = [*engine.rank_pids, engine.decoder.pid]
    session = engine.session(prompt())
    next(session)
    os.kill(engine.decoder.pid, number)
    with pytest.raises(RankError, match=r"the decoder (has died|gave no answer within 2 s)"):
        next(session)
    with pytest.raises(EngineClosedError):
        engine.session(prompt())
    engine.close()
    assert_gone(pids)


def test_ranks_that_fail_end_the_decoder(bundles):
    engine = causalrt.load(bundles(), device="cpu", timeout_s=5)
    pids = [*engine.rank_pids, engine.decoder.pid]
    session = engine.session(prompt())
    os.kill(engine.rank_pids[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 0 has died"):
        next(session)
    engine.close()
    assert_gone(pids)


def test_closing_in_mid_chunk(bundles):
    engine = causalrt.load(bundles(changes={"sampler.steps": ",".join(map(str, range(1000, 600, -1)))}), device="cpu")
    pids = [*engine.rank_pids, engine.decoder.pid]
    raised = []

    def run():
        try:
            list(engine.session(prompt()))
        except EngineClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    engine.close()
    thread.join(10)
    assert len(raised) == 1
    assert_gone(pids)


def assert_gone(pids):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.05)
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []


def test_pixels_of_the_recipe():
    video = tiny_config().video
    assert (video.pixel_height, video.pixel_width, video.fps) == (32, 48, 16)
