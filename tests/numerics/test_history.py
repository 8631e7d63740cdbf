"""Where a session's history comes from: frames that the caller gives, and what a prompt switch makes of it.

What the reference says of both is recorded (golden I and K, `test_golden.py`). The other policies are held against sessions
that must come to the same: attention sees differences of time alone, so a history at other places in time is the same history.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tolerances import CHANGED, REPLAYED

from causalrt import build, load, override, recipe
from causalrt.cli import main
from causalrt.errors import EngineClosedError, PromptError, RequestError
from causalrt.export.random_weights import random_weights
from causalrt.runtime.requests import checked_chunks

FULL = {"window_frames": "none", "sink_frames": "0"}
ROLLING = {"window_frames": "7", "sink_frames": "0"}
SINK = {"window_frames": "9", "sink_frames": "3"}
FIRST_FRAME = {"independent_first_frame": "true", "horizon_frames": "19"}
"""A video's first chunk is one frame; with any of the above."""
FIRST, SECOND = 0, 1
"""Seeds of two prompts."""
PLACES = [
    pytest.param(1, "eager", FULL, id="full-eager"),
    pytest.param(1, "eager", ROLLING, id="rolling-eager"),
    pytest.param(1, "eager", SINK, id="sink-eager"),
    pytest.param(2, "onnxruntime", FULL, id="full-onnxruntime", marks=pytest.mark.slow),
    pytest.param(2, "onnxruntime", ROLLING, id="rolling-onnxruntime", marks=pytest.mark.slow),
    pytest.param(2, "onnxruntime", SINK, id="sink-onnxruntime"),
]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """`engines(world_size, executor, **video)`: loaded once."""
    opened = {}

    def get(world_size=1, executor="eager", **video):
        key = world_size, executor, tuple(video.items())
        if key not in opened:
            folder = tmp_path_factory.mktemp("history")
            changes = {f"video.{name}": value for name, value in ({"horizon_frames": "21"} | video).items()}
            config = override(recipe("tiny"), {**changes, "build.world_size": str(world_size)})
            weights = {f"model.{name}": tensor for name, tensor in random_weights(config.model, seed=0)}
            save_file(weights, folder / "checkpoint.safetensors")
            checkpoint = folder / "checkpoint.safetensors"
            bundle = build(config, checkpoint=checkpoint, out=folder / "bundle", executors=[executor])
            opened[key] = load(bundle, executor=executor, device="cpu", num_threads=1)
        return opened[key]

    yield get
    for engine in opened.values():
        engine.close()


def prompt(seed, rows=8):
    return torch.randn(rows, recipe("tiny").model.text_dim, generator=torch.Generator().manual_seed(seed))


def noise(config, num_chunks=7):
    """One tensor; where the first frame is alone one for each chunk, the first of them cut short."""
    shape = (num_chunks, len(config.sampler.steps), config.tokens_per_chunk, config.model.patch_features)
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    if len(config.video.step_frames) == 1:
        return draws
    sizes = config.video.frames_of_chunks(num_chunks)
    return [draw[:, : frames * config.tokens_per_frame] for draw, frames in zip(draws, sizes, strict=True)]


def rollout(engine, chunks, *, first=FIRST, initial_latents=None, switch=None, policy="keep", second=SECOND):
    """Latents of `chunks` (a range: which draws of the noise), by chunk; the prompt changes before chunk `switch`."""
    draws = noise(engine.config)[chunks.start : chunks.stop]
    latents = []
    with engine.session(prompt(first), num_chunks=len(chunks), initial_latents=initial_latents, noise=draws) as session:
        for chunk in chunks:
            if chunk == switch:
                assert session.switch_prompt(prompt(second), policy=policy) > 0
            latents.append(next(session).latents)
    return latents


def apart(ones, others):
    return max(float((one - other).abs().max()) for one, other in zip(ones, others, strict=True))


# ---- given frames


@pytest.mark.parametrize(("world_size", "executor", "video"), PLACES)
def test_a_video_goes_on_where_it_was_left(engines, world_size, executor, video):
    engine = engines(world_size, executor, **video)
    whole = rollout(engine, range(6))
    for taken in (1, 4):
        assert (
            apart(rollout(engine, range(taken, 6), initial_latents=torch.cat(whole[:taken])), whole[taken:]) < REPLAYED
        )


def test_given_frames_count_towards_the_horizon(engines):
    engine = engines(**FULL)
    assert checked_chunks(engine.config, None, num_given=2) == 5
    with pytest.raises(RequestError, match=r"6 chunks .* after 2 of initial latents, .* \(5 chunks\)"):
        checked_chunks(engine.config, 6, num_given=2)
    with pytest.raises(RequestError, match=r"1 chunks .* after 7 of initial latents, .* \(0 chunks\)"):
        checked_chunks(engine.config, None, num_given=7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(4, 16, 4, 6), "4 initial latent frames; .* whole chunks of 3"),
        (torch.zeros(0, 16, 4, 6), "0 initial latent frames"),
        (torch.zeros(3, 16, 4, 4), r"\[frames, 16, 4, 6\], got \[3, 16, 4, 4\]"),
        (torch.zeros(3, 16, 4, 6, dtype=torch.int64), "floating-point"),
        (torch.full((3, 16, 4, 6), torch.nan), "not finite"),
        ([[0.0]], "got list"),
    ],
)
def test_given_frames_that_do_not_fit_are_refused(engines, given, message):
    engine = engines(**FULL)
    with pytest.raises(RequestError, match=message):
        engine.session(prompt(FIRST), initial_latents=given)
    assert len(rollout(engine, range(1))) == 1, "the engine goes on"


# ---- prompt switches


@pytest.mark.parametrize(("world_size", "executor"), [(1, "eager"), (2, "onnxruntime")])
@pytest.mark.parametrize("video", [FULL, ROLLING], ids=["full", "rolling"])
def test_recached_history_is_what_the_new_prompt_makes_of_the_same_frames(engines, world_size, executor, video):
    engine = engines(world_size, executor, **video)
    before = rollout(engine, range(4))
    got = rollout(engine, range(6), switch=4, policy="recache")
    kept = before if video is FULL else before[-2:]  # a window of 7 holds 4 frames of history: parts of 2 chunks
    expected = rollout(engine, range(4, 6), first=SECOND, initial_latents=torch.cat(kept))
    assert apart(got[:4], before) == 0
    assert apart(got[4:], expected) < REPLAYED


def test_recached_history_has_its_sink(engines):
    # Relative time counts what is kept: the sink's chunk, then the newest, as given frames would be.
    engine = engines(time_index="relative", **SINK)
    before = rollout(engine, range(5))
    got = rollout(engine, range(7), switch=5, policy="recache")
    expected = rollout(engine, range(5, 7), first=SECOND, initial_latents=torch.cat([before[0], before[-1]]))
    assert apart(got[5:], expected) < REPLAYED
    without = rollout(engine, range(5, 7), first=SECOND, initial_latents=before[-1])
    assert apart(got[5:], without) > CHANGED


def test_recached_sink_stays_at_its_place_in_time(engines):
    # By the global index the sink is as far away as it was: nearer, it would be what the test above has.
    engine, near = engines(**SINK), engines(time_index="relative", **SINK)
    got = rollout(engine, range(7), switch=5, policy="recache")
    assert apart(got[:5], rollout(near, range(5))) < REPLAYED
    assert apart(got[5:6], rollout(near, range(7), switch=5, policy="recache")[5:6]) > 10 * REPLAYED


@pytest.mark.parametrize("video", [FULL, SINK], ids=["full", "sink"])
@pytest.mark.parametrize(("world_size", "executor"), [(1, "eager"), (2, "onnxruntime")])
def test_flushed_history_is_none(engines, world_size, executor, video):
    engine = engines(world_size, executor, **video)
    got = rollout(engine, range(7), switch=3, policy="flush")
    assert apart(got[3:], rollout(engine, range(3, 7), first=SECOND)) < REPLAYED


def test_policies_differ(engines):
    engine = engines(**FULL)
    made = [rollout(engine, range(4), switch=2, policy=policy) for policy in ("keep", "recache", "flush")]
    made.append(rollout(engine, range(4)))
    for number, one in enumerate(made):
        assert apart(one[:2], made[0][:2]) == 0
        for other in made[number + 1 :]:
            assert apart(one[2:3], other[2:3]) > CHANGED


@pytest.mark.parametrize("policy", ["keep", "recache", "flush"])
def test_a_switch_before_the_first_chunk_is_another_prompt(engines, policy):
    engine = engines(**SINK)
    assert apart(rollout(engine, range(2), switch=0, policy=policy), rollout(engine, range(2), first=SECOND)) == 0


def test_there_and_back_again(engines):
    engine = engines(**FULL)
    draws = noise(engine.config, 2)
    with engine.session(prompt(FIRST), num_chunks=2, noise=draws) as session:
        latents = [next(session).latents]
        session.switch_prompt(prompt(SECOND, rows=3))
        session.switch_prompt(prompt(FIRST))
        latents.append(next(session).latents)
    assert apart(latents, rollout(engine, range(2))) == 0


def test_two_sessions_do_not_share_a_prompt(engines):
    engine = engines(**FULL)
    draws = noise(engine.config, 2)
    with (
        engine.session(prompt(FIRST), num_chunks=2, noise=draws) as one,
        engine.session(prompt(FIRST), num_chunks=2, noise=draws) as other,
    ):
        next(one), next(other)
        one.switch_prompt(prompt(SECOND), policy="flush")
        next(one)
        assert apart([next(other).latents], rollout(engine, range(2))[1:]) == 0


def test_switches_that_cannot_be_are_refused(engines):
    engine = engines(**FULL)
    with engine.session(prompt(FIRST), num_chunks=2, noise=noise(engine.config, 2)) as session:
        latents = [next(session).latents]
        with pytest.raises(RequestError, match="keep, recache, flush, got 'forget'"):
            session.switch_prompt(prompt(SECOND), policy="forget")
        with pytest.raises(PromptError, match="rows"):
            session.switch_prompt(prompt(SECOND, rows=99))
        latents.append(next(session).latents)
    assert apart(latents, rollout(engine, range(2))) == 0, "a refused switch has changed something"
    with pytest.raises(EngineClosedError, match="closed"):
        session.switch_prompt(prompt(SECOND))


# ---- after a first chunk of one frame


@pytest.mark.parametrize(("world_size", "executor", "video"), PLACES)
def test_a_video_with_an_independent_first_frame_goes_on_where_it_was_left(engines, world_size, executor, video):
    engine = engines(world_size, executor, **video, **FIRST_FRAME)
    whole = rollout(engine, range(6))
    assert [len(latents) for latents in whole] == [1, 3, 3, 3, 3, 3]
    for taken in (1, 4):
        assert (
            apart(rollout(engine, range(taken, 6), initial_latents=torch.cat(whole[:taken])), whole[taken:]) < REPLAYED
        )


def test_an_independent_first_frame_is_of_the_same_noise_on_all_ranks(engines):
    one, two = (engines(*how, **SINK, **FIRST_FRAME) for how in ((1, "eager"), (2, "onnxruntime")))
    videos = []
    for engine in (one, two):
        with engine.session(prompt(FIRST), seed=5) as session:
            assert session.num_chunks == 7, "as many as the horizon of 1 + 6 x 3 frames holds"
            videos.append([chunk.latents for chunk in session])
            assert [times[0].kv_frames for times in session.times.values()] == [1, 4, 7, 9, 9, 9, 9]
    assert apart(*videos) < REPLAYED


@pytest.mark.parametrize(
    ("world_size", "executor"), [(1, "eager"), pytest.param(2, "onnxruntime", marks=pytest.mark.slow)]
)
def test_recached_history_begins_with_the_first_frame(engines, world_size, executor):
    engine = engines(world_size, executor, **FULL, **FIRST_FRAME)
    before = rollout(engine, range(4))
    got = rollout(engine, range(6), switch=4, policy="recache")
    expected = rollout(engine, range(4, 6), first=SECOND, initial_latents=torch.cat(before))
    assert apart(got[:4], before) == 0
    assert apart(got[4:], expected) < REPLAYED


def test_recached_history_whose_first_frame_has_left_the_window(engines):
    engine, plain = engines(**ROLLING, **FIRST_FRAME), engines(**ROLLING)
    before = rollout(engine, range(4))
    got = rollout(engine, range(6), switch=4, policy="recache")
    expected = rollout(plain, range(4, 6), first=SECOND, initial_latents=torch.cat(before[-2:]))
    assert apart(got[4:], expected) < REPLAYED


@pytest.mark.parametrize("video", [FULL, SINK], ids=["full", "sink"])
@pytest.mark.parametrize(("world_size", "executor"), [(1, "eager"), (2, "onnxruntime")])
def test_after_a_flush_all_chunks_are_whole(engines, world_size, executor, video):
    engine = engines(world_size, executor, **video, **FIRST_FRAME)
    got = rollout(engine, range(6), switch=3, policy="flush")
    assert apart(got[3:], rollout(engines(**video), range(3, 6), first=SECOND)) < REPLAYED


@pytest.mark.parametrize("policy", ["recache", "flush"])
def test_a_switch_before_the_first_frame_leaves_it_alone(engines, policy):
    engine = engines(**SINK, **FIRST_FRAME)
    assert apart(rollout(engine, range(2), switch=0, policy=policy), rollout(engine, range(2), first=SECOND)) == 0


@pytest.mark.parametrize("frames", [0, 2, 3, 6])
def test_given_frames_that_do_not_begin_with_a_single_one_are_refused(engines, frames):
    engine = engines(**SINK, **FIRST_FRAME)
    with pytest.raises(
        RequestError, match=rf"{frames} initial latent frames; .* a first chunk of 1 frame\(s\), then whole chunks of 3"
    ):
        engine.session(prompt(FIRST), initial_latents=torch.zeros(frames, 16, 4, 6))


def test_the_first_frame_counts_towards_the_horizon(engines):
    config = engines(**SINK, **FIRST_FRAME).config
    assert [checked_chunks(config, None, num_given=given) for given in range(7)] == [7, 6, 5, 4, 3, 2, 1]
    with pytest.raises(RequestError, match=r"8 chunks .* horizon is 19 latent frames \(7 chunks\)"):
        checked_chunks(config, 8)


# ---- from the command line


@pytest.fixture
def files(tmp_path):
    for name, seed in (("first", FIRST), ("second", SECOND)):
        save_file({"prompt_embeds": prompt(seed)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def generate(engine, files, *flags):
    out = files / "out.safetensors"
    prompt_file = str(files / "first.safetensors")
    base = ["generate", str(engine.bundle.path), "--prompt-embeds", prompt_file, "--out", str(out), "--device", "cpu"]
    return main([*base, *flags, "--json"]), out


def test_generate_goes_on_and_switches(engines, files, capsys):
    engine = engines(**FULL)
    code, out = generate(engine, files, "--chunks", "2")
    assert code == 0
    clip = files / "clip.safetensors"
    out.rename(clip)
    capsys.readouterr()
    flags = ["--given", str(clip), "--chunks", "2", "--switch", f"1={files / 'second.safetensors'}"]
    code, out = generate(engine, files, *flags, "--switch-policy", "recache")
    assert code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == [12, 16, 4, 6]
    first, second = (chunk["switch_ms"] for chunk in report["chunks"])
    assert first is None
    assert second > 0
    assert torch.equal(load_file(out)["latents"][:6], load_file(clip)["latents"])


def test_generate_from_one_image(engines, files, capsys):
    engine = engines(**SINK, **FIRST_FRAME)
    assert generate(engine, files, "--chunks", "2")[0] == 0
    out = files / "out.safetensors"
    whole = load_file(out)["latents"]
    assert list(whole.shape) == [4, 16, 4, 6]
    save_file({"latents": whole[:1].clone()}, files / "image.safetensors")
    capsys.readouterr()
    code, out = generate(engine, files, "--given", str(files / "image.safetensors"), "--chunks", "2")
    assert code == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [7, 16, 4, 6]
    assert torch.equal(load_file(out)["latents"][:1], whole[:1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--switch", "second.safetensors"], "CHUNK=PROMPT"),
        (["--text-encoder", "wan"], "--text-encoder is for --prompt"),
        (["--switch", "0={second}", "--chunks", "2"], "chunks are 0 to 1"),
        (["--switch", "2={second}", "--chunks", "2"], "chunks are 0 to 1"),
        (["--switch", "1=none.safetensors", "--chunks", "2"], "cannot be read"),
        (["--given", "none.safetensors"], "cannot be read"),
        (["--given", "{second}"], "no tensor 'latents'"),
    ],
)
def test_generate_refuses_before_it_begins(engines, files, capsys, flags, message):
    flags = [flag.format(second=files / "second.safetensors") for flag in flags]
    code, out = generate(engines(**FULL), files, *flags)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
