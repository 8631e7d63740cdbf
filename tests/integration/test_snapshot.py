"""Snapshots: a session that is taken up again goes on as if it had never stopped."""

import contextlib
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.small_bundles import bundle_factory, prompt, tiny_config, write_checkpoint
from support.small_encoders import write_vae
from support.tolerances import WHOLE_MODEL

import causalrt
from causalrt.engines.bundle import file_digest, record_digest, tensor_digest
from causalrt.errors import RequestError
from causalrt.runtime.snapshot import DECODER_FILE, SESSION_FILE, rank_file, save_tensors

pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")


CHANGES = {"video.independent_first_frame": "true", "video.horizon_frames": "16"}
CHANGES |= {"video.window_frames": "8", "video.sink_frames": "2"}
"""An independent first frame, and a window that the sink divides unevenly."""


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, vae_folder):
    folder = tmp_path_factory.mktemp("bundle")
    config = tiny_config(2, CHANGES)
    weights = write_checkpoint(config, folder / "checkpoint.safetensors")
    return causalrt.build(config, checkpoint=weights, out=folder / "b", executors=["eager"], vae=vae_folder)


@pytest.fixture(scope="module")
def engine(bundle):
    with causalrt.load(bundle, executor="eager", device="cpu") as engine:
        yield engine


def run(session, num):
    return [next(session) for _ in range(num)]


def same(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.latents, b.latents, **(tolerance or {"rtol": 0, "atol": 0}))
        assert (a.frames is None) == (b.frames is None)
        if a.frames is not None:
            assert torch.equal(a.frames, b.frames)


@pytest.mark.parametrize(("after", "ahead"), [(0, False), (1, False), (4, False), (1, True), (3, True)])
def test_a_session_goes_on(engine, tmp_path, after, ahead):
    whole = list(engine.session(prompt(), seed=4))
    session = engine.session(prompt(), seed=4, ahead=ahead)
    same(run(session, after), whole[:after])
    session.snapshot(tmp_path / "s")
    same(list(session), whole[after:])  # here, too
    resumed = engine.resume(tmp_path / "s")
    chunks = list(resumed)
    assert [chunk.index for chunk in chunks] == list(range(after, 6))
    same(chunks, whole[after:])
    assert engine.open_sessions == 0


def test_after_a_switch_and_by_another_executor(tmp_path):
    """The bundle has graphs for another executor, and no decoder, whose graphs would take longer than the rest."""
    config = tiny_config(2, CHANGES)
    weights = write_checkpoint(config, tmp_path / "checkpoint.safetensors")
    bundle = causalrt.build(config, checkpoint=weights, out=tmp_path / "b", executors=["onnxruntime"])
    with causalrt.load(bundle, executor="eager", device="cpu") as engine:
        go_on_by_another_executor(engine, bundle, tmp_path)


def go_on_by_another_executor(engine, bundle, tmp_path):
    session = engine.session(prompt(), seed=5)
    run(session, 2)
    session.switch_prompt(prompt(1), policy="keep")
    run(session, 1)
    session.snapshot(tmp_path / "s")
    session.switch_prompt(prompt(2), policy="recache")
    rest = list(session)
    with causalrt.load(bundle, executor="onnxruntime", device="cpu") as other:
        resumed = other.resume(tmp_path / "s")
        resumed.switch_prompt(prompt(2), policy="recache")
        same(list(resumed), rest, rtol=0, atol=WHOLE_MODEL)
    shorter = engine.resume(tmp_path / "s", num_chunks=4)
    assert len(list(shorter)) == 1


def test_what_cannot_be_snapshot(engine, tmp_path):
    session = engine.session(prompt(), num_chunks=2)
    next(session)
    session.snapshot(tmp_path / "s")
    with pytest.raises(RequestError, match="exists already: choose another folder, or pass overwrite=True"):
        session.snapshot(tmp_path / "s")
    session.snapshot(tmp_path / "s", overwrite=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(RequestError, match="exists already: it is no snapshot"):
        session.snapshot(tmp_path / "mine", overwrite=True)
    with pytest.raises(RequestError, match="choose a writable folder"):
        session.snapshot(tmp_path / "nowhere" / "s")
    next(session)
    with pytest.raises(RequestError, match="the last chunk was generated"):
        session.snapshot(tmp_path / "late")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "s"]


def test_a_rank_that_cannot_write_ends_nothing(engine, tmp_path, monkeypatch):
    session = engine.session(prompt(), seed=1, num_chunks=3)
    first = next(session)
    from causalrt.runtime import session as module

    real = module.new_snapshot

    @contextlib.contextmanager
    def blocked(*arguments, **options):
        with real(*arguments, **options) as folder:
            (folder / rank_file(1)).mkdir()  # what the second rank wants to write is in its way
            yield folder

    monkeypatch.setattr(module, "new_snapshot", blocked)
    with pytest.raises(RequestError, match=r"cannot write rank1.safetensors of the snapshot"):
        session.snapshot(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
    assert len(list(session)) == 2
    assert first.index == 0


@pytest.fixture
def written(engine, tmp_path):
    with engine.session(prompt(), seed=1) as session:
        run(session, 3)
        session.snapshot(tmp_path / "s")
    return tmp_path / "s"


def read_header(folder):
    with safe_open(folder / SESSION_FILE, framework="pt") as file:
        return json.loads(file.metadata()["causalrt.session"])


def write_header(folder, plain):
    """As whoever knows the format would: with digests that are right."""
    tensors = load_file(folder / SESSION_FILE)
    if "files" in plain:
        plain["files"] = {name: file_digest(folder / name) for name in plain["files"] if (folder / name).is_file()}
    save_file(
        tensors, folder / SESSION_FILE, {"causalrt.session": json.dumps(plain | {"digest": record_digest(plain)})}
    )


def damage(path, change, *, sign=False):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if sign:
        write_header(path.parent, read_header(path.parent))


def refused(engine, folder, match):
    """One error that says so; the engine goes on. What it said."""
    with pytest.raises(RequestError, match=match) as caught:
        engine.resume(folder)
    assert engine.open_sessions == 0
    assert next(engine.session(prompt())).index == 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (rank_file(0), lambda found: found.pop("k.0.0")),
        (rank_file(1), lambda found: found.update({"v.1.0": found["v.1.0"][1:].clone()})),
        (rank_file(1), lambda found: found.update({"frames": torch.tensor([-1, 2])})),
        (rank_file(0), lambda found: found.update({"frames": torch.tensor([10**6, 10**6])})),
        (rank_file(0), lambda found: found.update({"frames": torch.tensor(7)})),
        (rank_file(0), lambda found: found.update({"frames": found["frames"] + 3})),
        (DECODER_FILE, lambda found: found.update({"latent_frames": torch.tensor([4])})),
        (rank_file(0), lambda found: found.update({"more": torch.zeros(1)})),
        (DECODER_FILE, lambda found: found.pop("cache.03")),
    ],
)
@pytest.mark.parametrize("sign", [False, True], ids=["unsigned", "signed"])
def test_a_damaged_file_is_refused_by_name(engine, written, file, change, sign):
    damage(written / file, change, sign=sign)
    refused(engine, written, f"{written / file} is damaged")


@pytest.mark.parametrize("file", [rank_file(0), rank_file(1), DECODER_FILE, SESSION_FILE])
def test_a_flipped_bit_is_noticed_in_any_file(engine, written, file):
    data = bytearray((written / file).read_bytes())
    data[len(data) // 2] ^= 1
    (written / file).write_bytes(data)
    refused(engine, written, str(written / file))


def swap(folder, other):
    one, two, aside = folder / rank_file(0), folder / rank_file(1), folder / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def truncate(folder, other):
    data = (folder / rank_file(0)).read_bytes()
    (folder / rank_file(0)).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("change", "file"),
    [
        (swap, r"rank[01]\.safetensors"),
        (truncate, rank_file(0)),
        (lambda folder, other: shutil.copy(folder / rank_file(0), folder / rank_file(1)), rank_file(1)),
        (lambda folder, other: shutil.copy(other / rank_file(1), folder / rank_file(1)), rank_file(1)),
        (lambda folder, other: shutil.copy(other / DECODER_FILE, folder / DECODER_FILE), DECODER_FILE),
        (lambda folder, other: shutil.copy(other / SESSION_FILE, folder / SESSION_FILE), r"rank[01]\.safetensors"),
        (lambda folder, other: damage(folder / SESSION_FILE, lambda found: None), SESSION_FILE),  # its header is gone
    ],
    ids=["swapped", "truncated", "twice", "foreign-rank", "foreign-decoder", "foreign-session", "headless"],
)
def test_files_that_are_not_those_of_this_rank_and_session_are_refused_by_name(engine, written, tmp_path, change, file):
    with engine.session(prompt(1), seed=2) as session:
        run(session, 3)
        session.snapshot(tmp_path / "other")
    change(written, tmp_path / "other")
    refused(engine, written, rf"{written}/{file} (is damaged|cannot be read)")


@pytest.mark.parametrize(
    ("file", "value"),
    [
        (rank_file(0), float("nan")),
        (rank_file(1), float("-inf")),
        (DECODER_FILE, float("inf")),
        (SESSION_FILE, float("nan")),
    ],
)
def test_values_that_are_not_finite_are_refused(engine, written, file, value):
    """By whoever knows the format, too."""
    path = written / file
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[-1] = value
    header = read_header(written)
    save_file(tensors, path, {"causalrt.session": "{}"})
    header["tensors"] = {name: tensor_digest(tensor) for name, tensor in load_file(written / SESSION_FILE).items()}
    write_header(written, header)
    refused(engine, written, f"{path}: {name} holds NaN or infinity")


def test_a_session_that_holds_values_that_are_not_finite_is_not_saved(tmp_path):
    with pytest.raises(RequestError, match=r"k\.0\.0 holds NaN or infinity"):
        save_tensors({"k.0.0": torch.tensor([1.0, float("nan")])}, tmp_path / "rank0.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_snapshot_of_an_older_version_is_refused_in_words(engine, written):
    plain = read_header(written)
    for name in ("digest", "files", "tensors"):
        del plain[name]
    save_file(
        load_file(written / SESSION_FILE),
        written / SESSION_FILE,
        {"causalrt.session": json.dumps(plain | {"version": 1})},
    )
    refused(engine, written, "is a snapshot of version 1, and this version of CausalRT reads 2")


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain["session"].update(num_chunks=1000),
        lambda plain: plain["session"].update(next_chunk=1),
        lambda plain: plain["session"].update(num_given=1),
        lambda plain: plain["session"].update(seed=-1),
        lambda plain: plain["session"].update(more=1),
        lambda plain: plain["session"].update(vae="0" * 64),
        lambda plain: plain.pop("session"),
        lambda plain: plain.pop("files"),
        lambda plain: plain["files"].pop(rank_file(1)),
        lambda plain: plain["tensors"].update(text=""),
    ],
    ids=["num_chunks", "next_chunk", "num_given", "seed", "more", "vae", "none", "no files", "a file", "tensors"],
)
def test_a_header_that_cannot_be(engine, written, change):
    plain = read_header(written)
    change(plain)
    header = {"causalrt.session": json.dumps(plain | {"digest": record_digest(plain)})}
    save_file(load_file(written / SESSION_FILE), written / SESSION_FILE, header)
    refused(engine, written, r"\S")


def test_a_header_that_was_edited(engine, written):
    plain = read_header(written)
    plain["session"]["seed"] += 1
    save_file(load_file(written / SESSION_FILE), written / SESSION_FILE, {"causalrt.session": json.dumps(plain)})
    refused(engine, written, rf"{written / SESSION_FILE} is damaged .*its header was changed")


def test_a_session_that_began_with_given_frames(engine, tmp_path):
    first = next(engine.session(prompt(), seed=3)).latents  # one frame
    whole = list(engine.session(prompt(), seed=3, initial_latents=first))
    session = engine.session(prompt(), seed=3, initial_latents=first)
    next(session)
    session.snapshot(tmp_path / "s")
    with pytest.raises(RequestError, match="6 chunks of 3 latent frames asked for after 1 of initial latents"):
        engine.resume(tmp_path / "s", num_chunks=6)
    same(list(engine.resume(tmp_path / "s")), whole[1:])


def test_other_bundles_and_files_are_refused(engine, written, tmp_path):
    (written / rank_file(1)).write_bytes(b"short")
    with pytest.raises(RequestError, match=r"rank1.safetensors cannot be read"):
        engine.resume(written)
    (written / rank_file(1)).unlink()
    os.mkfifo(written / rank_file(1))
    with pytest.raises(RequestError, match=r"rank1.safetensors cannot be read: it is a named pipe"):
        engine.resume(written)
    with pytest.raises(RequestError, match="is no snapshot"):
        engine.resume(tmp_path)
    with pytest.raises(RequestError, match="has 3 chunks already"):
        engine.resume(written, num_chunks=3)
    other = bundle_factory(tmp_path)(1)
    with (
        causalrt.load(other, device="cpu") as another,
        pytest.raises(RequestError, match=r"another bundle .config differ"),
    ):
        another.resume(written)


def test_frames_are_wanted_or_not(engine, bundle, written, tmp_path):
    with causalrt.load(bundle, executor="eager", device="cpu", vae=False) as plain:
        rest = list(plain.resume(written))
        assert [chunk.frames for chunk in rest] == [None] * 3
        session = plain.session(prompt(), seed=1)
        run(session, 3)
        session.snapshot(tmp_path / "plain")
        torch.testing.assert_close(next(session).latents, rest[0].latents, rtol=0, atol=0)
    with pytest.raises(RequestError, match="made without frames; load the engine with vae=False"):
        engine.resume(tmp_path / "plain")
