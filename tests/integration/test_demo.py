"""`causalrt demo`, whole: the shipped files, bundles, rows, parity, and what is written; and what it refuses."""

import fcntl
import io
import json
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image
from support.tolerances import RECORDED

from causalrt.cli import main
from causalrt.demo_model import demo_files
from causalrt.engines.bundle import file_digest
from causalrt.errors import CheckpointError, PromptError, RequestError
from causalrt.export.checkpoint import check_checkpoint, open_checkpoint
from causalrt.model.codecs.registry import load_vae
from causalrt.model.text.words import WordEncoder
from causalrt.recipes import recipe
from causalrt.tools import demo
from causalrt.tools.arguments import EXAMPLES, ROWS, DemoRequest
from causalrt.tools.contact_sheet import SheetRow, chunks_shown, contact_sheet

FILES = {"demo.mp4", "contact-sheet.png"}


def quiet(request):
    return demo.run_demo(request, on_progress=lambda *told: None, on_stage=lambda text: None)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "causalrt" / "demo"


@pytest.fixture(scope="module")
def shown(cache, tmp_path_factory):
    """(what was said, folder) of two rows, two chunks, a switch."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    rows = (("eager", 1), ("onnxruntime", 2))
    said = quiet(DemoRequest(out=out, chunks=2, rows=rows, switches=[f"1={EXAMPLES[1]}"]))
    return said, out


def test_the_shipped_files_are_the_recipe_s():
    config, files = recipe("demo"), demo_files()
    check_checkpoint(open_checkpoint(files.checkpoint), config.model)
    assert load_vae(files.codec).dtype == torch.float32
    words = WordEncoder.from_folder(files.words, text_dim=config.model.text_dim, max_tokens=config.model.text_len)
    assert all(words.encode(prompt).shape[1] == config.model.text_dim for prompt in EXAMPLES)
    assert config.video.horizon_chunks == 42


def test_rows_agree_with_eager(shown):
    said, _ = shown
    assert [(row.executor, row.world_size) for row in said.rows] == [("eager", 1), ("onnxruntime", 2)]
    assert said.rows[0].latent_error == 0
    assert 0 < said.rows[1].latent_error < RECORDED
    assert max(row.grey_levels for row in said.rows) <= 1
    assert said.passed
    assert all(len(row.chunk_ms) == 2 and row.first_frame_ms > 0 for row in said.rows)


def test_bundles_are_kept_and_built_again_if_damaged(shown, cache, monkeypatch, caplog):
    kept = sorted(cache.iterdir())
    assert [path.name[:8] for path in kept] == ["ranks-1-", "ranks-2-"]
    before = {file.name: file.read_bytes() for file in kept[0].iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(demo, "build", lambda *given, **named: pytest.fail("it was built"))
        with demo.kept_demo_bundle(world_size=1) as bundle:
            assert bundle == kept[0]
    for damage in (lambda path: path.write_bytes(b"\0" * path.stat().st_size), lambda path: path.unlink()):
        damage(kept[0] / "weights.safetensors")
        with demo.kept_demo_bundle(world_size=1) as bundle:
            assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
        assert "is built again" in caplog.text
        caplog.clear()


def test_damaged_bundle_that_another_process_uses_is_left_alone(shown, cache, caplog):
    kept = sorted(cache.iterdir())[0]
    weights = kept / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"\0" * len(whole))
    user = os.open(kept, os.O_RDONLY)
    try:
        fcntl.flock(user, fcntl.LOCK_SH)
        with demo.kept_demo_bundle(world_size=1) as bundle:
            assert bundle != kept
            assert (bundle / "weights.safetensors").read_bytes() == whole
        assert "in a temporary folder" in caplog.text
        assert weights.read_bytes() == b"\0" * len(whole)
    finally:
        os.close(user)
    with demo.kept_demo_bundle(world_size=1) as bundle:
        assert bundle == kept
        assert weights.read_bytes() == whole


def test_other_code_or_libraries_want_another_bundle(monkeypatch):
    key = demo._bundle_key(1)
    assert demo._bundle_key(1) == key != demo._bundle_key(2)
    monkeypatch.setattr(demo, "toolchain_versions", lambda: {"torch": "0"})
    assert demo._bundle_key(1) != key
    monkeypatch.undo()
    monkeypatch.setattr(demo, "file_digest", lambda path: "changed" if path.name == "step.py" else file_digest(path))
    assert demo._bundle_key(1) != key


def test_without_a_cache_the_bundle_is_temporary(tmp_path, monkeypatch, caplog):
    (tmp_path / "causalrt").write_text("in the way")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with demo.kept_demo_bundle(world_size=1) as bundle:
        assert (bundle / "manifest.json").is_file()
        assert bundle.parent.parent == tmp_path / "temporary"
    assert "in a temporary folder, since it cannot be cached" in caplog.text
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_files_are_a_video_and_a_picture(shown):
    said, out = shown
    assert {path.name for path in out.iterdir()} == FILES
    assert said.files == [str(out / "demo.mp4"), str(out / "contact-sheet.png")]
    with av.open(str(out / "demo.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 9 + 12
    assert frames[0].shape == (384, 384, 3)
    with Image.open(out / "contact-sheet.png") as sheet:
        sheet.load()
        assert sheet.width > 2 * 128
        pixels = np.asarray(sheet.convert("RGB"))
    last = frames[-1].astype(int)[3::6, 3::6]  # the pixels as the model made them, through H.264
    cells = [
        pixels[y : y + 128 : 2, x : x + 128 : 2].astype(int)
        for y in range(0, pixels.shape[0] - 128, 2)
        for x in (100 + 134,)
    ]
    nearest = min(float(np.abs(cell - last).mean()) for cell in cells)
    assert nearest < 8  # of 255: the last frame of chunk 1 is in its column


def test_a_row_that_differs_fails(shown, tmp_path, monkeypatch, capsys):
    """The picture, the table and the exit code say so; the files are there all the same."""
    real = demo.make_video

    def spoilt(*given, stage, **named):
        made = real(*given, stage=stage, **named)
        if "2 ranks" in stage:
            made.chunks[1].frames[3, 5, 7, 1] ^= 0x40
        return made

    monkeypatch.setattr(demo, "make_video", spoilt)
    said = quiet(DemoRequest(out=tmp_path, chunks=2, rows=(("eager", 2), ("eager", 1))))
    assert [row.grey_levels for row in said.rows] == [0, 64]
    assert not said.passed
    assert {path.name for path in tmp_path.iterdir()} == FILES
    monkeypatch.setattr("causalrt.tools.demo.run_demo", lambda *given, **told: said)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "ROWS DISAGREE" in capsys.readouterr().out
    assert main(["demo", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(said.as_dict()))


def test_what_lies_in_the_folder_stays(shown, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "demo.mp4").write_text("an earlier demo's")

    def breaks(*given, **named):
        raise RuntimeError("on the way")

    monkeypatch.setattr(demo, "make_video", breaks)
    with pytest.raises(RuntimeError, match="on the way"):
        quiet(DemoRequest(out=tmp_path, chunks=1, rows=(("eager", 1),)))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "mine.txt": "mine",
        "demo.mp4": "an earlier demo's",
    }


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt": "a fox in the snow"}, PromptError, "does not know fox, snow; its words are: .*circle"),
        ({"prompt": ""}, PromptError, "words that say something"),
        ({"switches": ["1=a fox"]}, PromptError, "does not know fox"),
        ({"switches": ["2=a red circle"]}, RequestError, "chunks are 0 to 1"),
        ({"switches": ["soon"]}, RequestError, "CHUNK=PROMPT"),
        ({"switches": [f"{'9' * 5000}=a red circle"]}, RequestError, "CHUNK=PROMPT"),
        ({"switches": ["1=a red circle", "1=a blue circle"]}, RequestError, "names chunk 1 more than once"),
        ({"chunks": 43}, RequestError, "makes 1 to 42 chunks, not 43"),
        ({"chunks": 0}, RequestError, "makes 1 to 42 chunks, not 0"),
        ({"seed": -1}, RequestError, "seed"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(changes, error, words, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build", lambda *given, **named: pytest.fail("it was built"))
    with pytest.raises(error, match=words) as caught:
        quiet(DemoRequest(**{"out": tmp_path / "out", "chunks": 2, **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build", lambda *given, **named: pytest.fail("it was built"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="choose another folder"):
        quiet(DemoRequest(out=tmp_path / "file"))
    (tmp_path / "demo.mp4").mkdir()
    with pytest.raises(RequestError, match="cannot write"):
        quiet(DemoRequest(out=tmp_path))


def test_an_unknown_word_is_one_line_on_the_command_line(tmp_path, capsys):
    assert main(["demo", "--prompt", "a purple elephant", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: this model does not know elephant")


def test_files_that_are_missing_are_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("causalrt.demo_model.files", lambda name: tmp_path)
    with pytest.raises(CheckpointError, match=r"words\.safetensors"):
        quiet(DemoRequest(out=tmp_path / "out"))


def test_the_contact_sheet_has_a_place_for_everything():
    frames = [torch.full((2, 64, 64, 3), 10 * chunk, dtype=torch.uint8) for chunk in range(5)]
    rows = [
        SheetRow(name="one", frames=frames, verdict="", agrees=None),
        SheetRow(name="other", frames=frames, verdict="0", agrees=False),
    ]
    with Image.open(io.BytesIO(contact_sheet("title", rows))) as sheet:
        pixels = np.asarray(sheet)
    for chunk in range(1, 5):
        same = (pixels == 10 * chunk).all(axis=2)
        assert same.sum() >= 2 * 128 * 128  # a frame in each of the two rows
    long = [SheetRow(name="one", frames=8 * frames, verdict="", agrees=None)]
    with Image.open(io.BytesIO(contact_sheet("title", long))) as sheet:
        assert sheet.width <= 2200
    short = [SheetRow(name="one", frames=frames[:1], verdict="", agrees=None)]
    with Image.open(io.BytesIO(contact_sheet("a title " * 30, short))) as sheet:
        ink = np.asarray(sheet)[:30].min(axis=(0, 2)) < 128
        assert ink.any()
        assert not ink[-4:].any()  # it is not cut
    assert chunks_shown(5, 9) == [0, 1, 2, 3, 4]
    assert chunks_shown(42, 4) == [0, 14, 27, 41]


@pytest.mark.slow  # CI runs the command, too
def test_the_whole_demo(tmp_path):
    said = quiet(DemoRequest(out=tmp_path))
    assert said.passed
    assert [(row.executor, row.world_size) for row in said.rows] == list(ROWS)
    assert all(len(row.chunk_ms) == 7 for row in said.rows)
