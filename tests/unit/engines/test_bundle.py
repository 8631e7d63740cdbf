import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import stat
import time
from collections import namedtuple
from importlib import metadata

import pytest

from causalrt.config import override
from causalrt.engines import bundle as bundle_module
from causalrt.engines.bundle import (
    FIRST_GRAPH,
    MANIFEST,
    NEXT_GRAPH,
    REBUILD,
    SCHEMA,
    VAE_WEIGHTS,
    new_bundle,
    open_bundle,
    reopen_bundle,
    unchanged,
    write_manifest,
)
from causalrt.engines.step_record import StepGraphs, StepPart
from causalrt.engines.toolchain import toolchain_versions
from causalrt.errors import BuildError, BundleError
from causalrt.layout import layout_from_config
from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.recipes import recipe

CONFIG = override(recipe("tiny"), {"build.world_size": "2"})
STEPS = (StepGraphs(segments=(StepPart(file="step-000.onnx"),)),)
CONTENTS = {
    "weights.safetensors": bytes(range(256)) * 40,
    **dict.fromkeys(("step-000.onnx", "prompt.onnx", "time.onnx"), b"graph"),
}


TWO_KINDS = override(CONFIG, {"video.horizon_frames": "13", "video.independent_first_frame": "true"})
TWO_STEPS = (*STEPS, StepGraphs(segments=(StepPart(file="1-frame-step-000.onnx"),)))


def fill(folder, contents=CONTENTS, *, config=CONFIG, steps=STEPS, vae=None):
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    executors = ("eager", "onnxruntime")
    write_manifest(folder, config=config, fused_ops=False, executors=executors, steps=steps, engines={}, vae=vae)


def make_bundle(target, *, overwrite=False, contents=CONTENTS, then=lambda: None, vae=None):
    with new_bundle(target, overwrite=overwrite, needed_bytes=0) as folder:
        fill(folder, contents, vae=vae)
        then()
    return target


def raising(error):
    def act():
        raise error

    return act


@pytest.fixture
def made(tmp_path):
    return make_bundle(tmp_path / "b")


def edit_manifest(path, change, *, sign):
    """Change the manifest in place; with `sign`, as one would who knows how its digest is made."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    if sign:
        manifest.pop("digest")
        manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- writing


@pytest.mark.parametrize(
    ("name", "distributions", "version"),
    [
        ("onnxruntime", {"onnxruntime-gpu": "1.31.1"}, "1.31.1"),
        ("onnxruntime", {"onnxruntime": "1.31.0"}, "1.31.0"),
        ("tensorrt", {"tensorrt-cu13": "11.4.0"}, "11.4.0"),
        ("tensorrt", {"tensorrt-cu12": "11.2.1"}, "11.2.1"),
        ("tensorrt", {}, None),
    ],
)
def test_a_version_is_that_of_the_distribution_that_is_installed(monkeypatch, name, distributions, version):
    def installed(distribution):
        try:
            return distributions[distribution]
        except KeyError:
            raise metadata.PackageNotFoundError(distribution) from None

    monkeypatch.setattr(metadata, "version", installed)
    assert toolchain_versions().get(name) == version


def test_written_and_opened(made):
    opened = open_bundle(made)
    assert opened.path == made
    assert opened.config == CONFIG
    assert opened.layout == layout_from_config(CONFIG)
    assert opened.executors == ("eager", "onnxruntime")
    assert opened.steps == STEPS
    assert {"torch", "onnx", "onnxruntime"} <= set(opened.toolchain)
    assert names(made) == sorted([*CONTENTS, MANIFEST])
    assert names(made.parent) == ["b"]
    assert made.stat().st_mode & 0o777 == 0o755


def test_a_relative_path_and_text_are_paths_too(made, monkeypatch):
    monkeypatch.chdir(made.parent)
    assert open_bundle("b").path == made
    make_bundle(bundle_module.Path("c"))
    assert open_bundle("c").path == made.parent / "c"


def test_manifest_records_bytes_and_sha256_of_every_other_file(made):
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in CONTENTS.items()
    }
    assert manifest["steps"][0]["layout"]["scatter_rows"] == layout_from_config(CONFIG).scatter_rows


def test_the_digest_tells_one_bundle_from_another(tmp_path):
    same = [open_bundle(make_bundle(tmp_path / name)).digest for name in ("one", "copy")]
    other = open_bundle(make_bundle(tmp_path / "other", contents=CONTENTS | {"time.onnx": b"grape"})).digest
    assert same[0] == same[1] == json.loads((tmp_path / "one" / MANIFEST).read_text())["digest"]
    assert other != same[0]


def test_the_target_appears_whole(tmp_path):
    target = tmp_path / "deep" / "b"
    with new_bundle(target, overwrite=False, needed_bytes=0) as folder:
        assert folder.parent == target.parent, "renamed within one file system"
        fill(folder)
        assert not target.exists()
    assert open_bundle(target).config == CONFIG


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BuildError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_in_the_block_leaves_nothing(tmp_path, error, overwrite):
    with pytest.raises(error, match="stop"):
        make_bundle(tmp_path / "b", overwrite=overwrite, then=raising(error("stop")))
    assert names(tmp_path) == []


def test_an_exception_in_the_block_leaves_the_old_bundle(made):
    with pytest.raises(ValueError, match="stop"):
        make_bundle(made, overwrite=True, contents={"other": b""}, then=raising(ValueError("stop")))
    assert names(made.parent) == ["b"]
    assert open_bundle(made).steps == STEPS


def test_a_full_disk_is_a_build_error(tmp_path):
    with pytest.raises(BuildError, match="No space left"), new_bundle(tmp_path / "b", overwrite=False, needed_bytes=0):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_too_little_space_is_refused_before_the_block(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 0, 1000)
    monkeypatch.setattr(bundle_module.shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(BuildError, match=r"5,000 bytes.*1,000 free.*choose another folder"),
        new_bundle(tmp_path / "b", overwrite=False, needed_bytes=5000),
    ):
        pytest.fail("the block ran")
    assert names(tmp_path) == []


def test_an_existing_target_is_refused(made):
    with (
        pytest.raises(BuildError, match=r"b exists already.*--overwrite"),
        new_bundle(made, overwrite=False, needed_bytes=0),
    ):
        pytest.fail("the block ran")
    assert open_bundle(made).config == CONFIG


def test_overwrite_swaps(tmp_path):
    target = make_bundle(tmp_path / "b", contents=CONTENTS | {"old.engine": b""})
    with new_bundle(target, overwrite=True, needed_bytes=0) as folder:
        fill(folder, CONTENTS | {"weights.safetensors": b"new"})
        assert open_bundle(target).steps == STEPS, "the old bundle serves until the new one is whole"
        assert "old.engine" in names(target)
    assert names(tmp_path) == ["b"]
    assert names(target) == sorted([*CONTENTS, MANIFEST])
    assert (target / "weights.safetensors").read_bytes() == b"new"
    open_bundle(target)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "folder with a folder manifest.json"])
def test_what_is_no_bundle_is_never_overwritten(tmp_path, kind, overwrite):
    target = tmp_path / "home"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
    if kind == "folder":
        (target / "thesis.tex").write_text("mine")
    if "manifest" in kind:
        (target / MANIFEST).mkdir()
    before = names(target) if target.is_dir() else target.read_text()
    with pytest.raises(BuildError, match="home exists"), new_bundle(target, overwrite=overwrite, needed_bytes=0):
        pytest.fail("the block ran")
    assert (names(target) if target.is_dir() else target.read_text()) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_during_the_build_is_kept(tmp_path, overwrite):
    target = tmp_path / "b"

    def appear():
        target.mkdir()
        (target / "thesis.tex").write_text("mine")

    with pytest.raises(BuildError, match="b"):
        make_bundle(target, overwrite=overwrite, then=appear)
    assert names(target) == ["thesis.tex"]


def test_a_bundle_that_appears_during_the_build_is_kept(tmp_path):
    target = tmp_path / "b"
    with pytest.raises(BuildError, match="b"):
        make_bundle(target, contents={"weights.safetensors": b"late"}, then=lambda: make_bundle(target))
    assert (target / "weights.safetensors").read_bytes() == CONTENTS["weights.safetensors"]


def test_a_failed_swap_puts_the_old_bundle_back(made, monkeypatch):
    rename = os.rename

    def fail_on_arrival(source, target):
        if str(source).endswith(".partial") and str(target) == str(made):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(bundle_module.os, "rename", fail_on_arrival)
    with pytest.raises(BuildError, match="Input/output"):
        make_bundle(made, overwrite=True, contents={"other": b""})
    assert names(made.parent) == ["b"]
    assert open_bundle(made).steps == STEPS


def test_a_place_that_cannot_be_written_is_a_build_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(BuildError, match="cannot write a bundle"),
        new_bundle(tmp_path / "file" / "b", overwrite=False, needed_bytes=0),
    ):
        pytest.fail("the block ran")


# ---- reading what is damaged


def truncate(path):
    data = (path / "weights.safetensors").read_bytes()
    (path / "weights.safetensors").write_bytes(data[:-1])


def tamper(path):
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[5000] ^= 1
    (path / "weights.safetensors").write_bytes(data)


def remove(path):
    (path / "weights.safetensors").unlink()


def link_to(target):
    def damage(path):
        remove(path)
        (path / "weights.safetensors").symlink_to(target)

    return damage


def make_folder(path):
    remove(path)
    (path / "weights.safetensors").mkdir()


def make_pipe(path):
    remove(path)
    os.mkfifo(path / "weights.safetensors")


def make_socket(path):
    remove(path)
    os.mknod(path / "weights.safetensors", stat.S_IFSOCK | 0o600)


def link_to_a_pipe(path):
    os.mkfifo(path.parent / "pipe")
    link_to("../pipe")(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "10,239 bytes, expected 10,240"),
        (tamper, "sha256"),
        (remove, "missing"),
        (link_to("nowhere"), "missing, or a link to nothing"),
        (link_to("weights.safetensors"), "Too many levels of symbolic links"),
        (link_to("/dev/zero"), "it is a device"),
        (make_folder, "it is a folder"),
        (make_pipe, "it is a named pipe"),
        (make_socket, "it is a socket"),
        (link_to_a_pipe, "it is a named pipe"),
    ],
)
def test_a_damaged_file_is_named(made, damage, said):
    damage(made)
    with pytest.raises(BundleError) as caught:
        open_bundle(made)
    message = str(caught.value)
    for part in (str(made), "weights.safetensors", said, REBUILD):
        assert part in message
    assert "step-000.onnx" not in message


def as_in_the_hub_cache(bundle):
    """Every file a link to a blob that is named by its hash; the blob of the weights."""
    blobs = bundle.parent / "blobs"
    blobs.mkdir()
    for file in list(bundle.iterdir()):
        blob = file.rename(blobs / hashlib.sha256(file.read_bytes()).hexdigest())
        file.symlink_to(os.path.relpath(blob, bundle))
    return (bundle / "weights.safetensors").resolve()


def test_links_are_followed_and_what_they_point_to_is_hashed(made):
    before = open_bundle(made)
    weights = as_in_the_hub_cache(made)
    assert open_bundle(made) == before
    weights.write_bytes(bytes(len(CONTENTS["weights.safetensors"])))
    with pytest.raises(BundleError, match=r"weights.safetensors: contents changed"):
        open_bundle(made)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_a_manifest_that_would_be_read_for_ever_is_refused(made, make):
    (made / MANIFEST).unlink()
    make(made / MANIFEST)
    with pytest.raises(BundleError, match=rf"{MANIFEST} cannot be read: it is a (named pipe|device|folder), not a reg"):
        open_bundle(made)


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(made, monkeypatch):
    digest = bundle_module.file_digest
    newer = make_bundle(made.parent / "newer", contents=dict.fromkeys(CONTENTS, b"newer"))
    wanted = open_bundle(newer)

    def replaced_first(path):
        if newer.exists():
            shutil.rmtree(made)
            newer.rename(made)
        return digest(path)

    monkeypatch.setattr(bundle_module, "file_digest", replaced_first)
    assert open_bundle(made).digest == wanted.digest


def overwrite_for_ever(target):
    for number in itertools.count():
        make_bundle(target, overwrite=True, contents=dict.fromkeys(CONTENTS, str(number).encode()))


def test_readers_always_find_a_whole_bundle_however_writers_end(made):
    """Three writers replace it all the time, and are killed at random; their successors go on, and clean up."""
    context, instants = multiprocessing.get_context("fork"), random.Random(0)
    writers = []
    reads = kills = 0
    try:
        while kills < 15:
            while len(writers) < 3:
                writers.append(context.Process(target=overwrite_for_ever, args=(made,)))
                writers[-1].start()
            until = time.monotonic() + instants.uniform(0.01, 0.1)
            while time.monotonic() < until:
                open_bundle(made)
                reads += 1
            victim = writers.pop(instants.randrange(3))
            victim.kill()
            victim.join()
            kills += 1
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert reads > kills
    make_bundle(made, overwrite=True)
    assert names(made.parent) == ["b"]


def test_all_damage_is_listed_at_once(made):
    truncate(made)
    (made / "step-000.onnx").unlink()
    with pytest.raises(BundleError, match=r"(?s)step-000\.onnx: missing.*weights\.safetensors: 10,239"):
        open_bundle(made)


REPLACED = "b was replaced or changed while it was being read; try again when it is complete"


def test_a_verified_bundle_is_opened_again_and_no_other(made):
    digest = open_bundle(made).digest
    assert reopen_bundle(made, digest) == open_bundle(made)
    make_bundle(made, overwrite=True, contents=CONTENTS | {"time.onnx": b"other"})
    with pytest.raises(BundleError, match=REPLACED):
        reopen_bundle(made, digest)


@pytest.mark.parametrize("change", [tamper, truncate, remove, lambda path: (path / MANIFEST).unlink(), shutil.rmtree])
@pytest.mark.parametrize("error", [None, FileNotFoundError("weights.safetensors"), BundleError("is damaged")])
def test_a_change_while_a_bundle_is_read_is_told_whatever_came_of_it(made, change, error):
    os.utime(
        made / "weights.safetensors", ns=(0, 0)
    )  # a change in the same tick of the file system's clock would be missed
    bundle = open_bundle(made)

    def read():
        with unchanged(bundle):
            change(made)
            if error is not None:
                raise error

    with pytest.raises(BundleError, match=REPLACED):
        read()


def test_an_error_of_another_kind_stays(made):
    with pytest.raises(FileNotFoundError), unchanged(open_bundle(made)):
        raise FileNotFoundError


def test_a_rank_skips_the_hashes_but_not_the_sizes(made):
    tamper(made)
    open_bundle(made, verify=False)
    truncate(made)
    with pytest.raises(BundleError, match="10,239"):
        open_bundle(made, verify=False)


@pytest.mark.parametrize("where", ["nowhere", "empty", "file"])
def test_what_is_no_bundle(tmp_path, where):
    path = tmp_path / where
    if where == "empty":
        path.mkdir()
    elif where == "file":
        path.write_text("")
    with pytest.raises(BundleError, match=rf"{where}.*causalrt build"):
        open_bundle(path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"schema": 1', b"[" * 200])
def test_a_manifest_that_is_no_json(made, data):
    (made / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{MANIFEST}.*{REBUILD}"):
        open_bundle(made)


@pytest.mark.parametrize("data", [b"[]", b"null", b"3", b"{}", b'"text"'])
def test_a_manifest_that_is_no_manifest(made, data):
    (made / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=rf"schema None.*{REBUILD}"):
        open_bundle(made)


@pytest.mark.parametrize("schema", [0, 2, "3", None, [3]])
@pytest.mark.parametrize("sign", [False, True])
def test_another_schema(made, schema, sign):
    edit_manifest(made, lambda manifest: manifest.update(schema=schema), sign=sign)
    with pytest.raises(BundleError) as caught:
        open_bundle(made)
    for part in (str(made), f"schema {schema!r}", f"reads {SCHEMA}", REBUILD):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["config"]["video"].update(horizon_frames=15),
        lambda m: m["toolchain"].update(torch="1.0"),
        lambda m: m["files"].pop("step-000.onnx"),
        lambda m: m["files"]["step-000.onnx"].update(bytes=6),
        lambda m: m.update(extra=1),
        lambda m: m.pop("digest"),
        lambda m: m.update(digest=None),
    ],
)
def test_an_edited_manifest(made, change):
    edit_manifest(made, change, sign=False)
    with pytest.raises(BundleError, match=rf"{MANIFEST} was changed after the build.*{REBUILD}"):
        open_bundle(made)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", ".", "", "sub/../step-000.onnx"])
def test_a_file_name_that_leaves_the_bundle(made, name):
    (made.parent / "secret").write_bytes(b"graph")
    (made / "sub").mkdir()
    (made / "sub" / "file").write_bytes(b"graph")
    edit_manifest(made, lambda m: m["files"].update({name: m["files"]["step-000.onnx"]}), sign=True)
    with pytest.raises(BundleError, match="not a plain file") as caught:
        open_bundle(made)
    assert f"\n  {name}: " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["config"]["model"].update(dim=47), "model.dim"),
        (lambda m: m["config"]["model"].pop("dim"), "dim"),
        (lambda m: m["config"].pop("video"), "video"),
        (lambda m: m.update(config=None), MANIFEST),
        (lambda m: m.pop("config"), "config"),
        (lambda m: m.pop("files"), "files"),
        (lambda m: m.pop("steps"), "steps"),
        (lambda m: m.update(executors=None), MANIFEST),
    ],
)
def test_a_signed_manifest_that_makes_no_sense(made, change, named):
    edit_manifest(made, change, sign=True)
    with pytest.raises(BundleError, match=rf"{MANIFEST} is not valid.*{REBUILD}") as caught:
        open_bundle(made)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files=["weights.safetensors"]),
        lambda m: m["files"].update({"weights.safetensors": {}}),
        lambda m: m["files"].update({"weights.safetensors": None}),
        lambda m: m["config"].update(model="abc"),
        lambda m: m.update(executors=[[]]),
        lambda m: m.update(toolchain=[]),
        lambda m: m.update(steps=None),
    ],
    ids=["files-list", "entry-empty", "entry-none", "section-str", "executor-list", "toolchain-list", "steps-none"],
)
def test_a_signed_manifest_of_wrong_types(made, change):
    edit_manifest(made, change, sign=True)
    with pytest.raises(BundleError):
        open_bundle(made)


def test_a_vae_is_in_the_manifest(tmp_path):
    vae = VaeConfig(base_dim=8)
    contents = CONTENTS | dict.fromkeys((VAE_WEIGHTS, FIRST_GRAPH, NEXT_GRAPH), b"part")
    path = make_bundle(tmp_path / "b", contents=contents, vae=vae)
    assert open_bundle(path).vae == vae


@pytest.mark.parametrize("missing", [VAE_WEIGHTS, FIRST_GRAPH, NEXT_GRAPH])
def test_a_vae_whose_files_are_not_listed(tmp_path, missing):
    contents = CONTENTS | dict.fromkeys({VAE_WEIGHTS, FIRST_GRAPH, NEXT_GRAPH} - {missing}, b"part")
    path = make_bundle(tmp_path / "b", contents=contents, vae=VaeConfig())
    with pytest.raises(BundleError, match=f"does not list files that its executors need: '{missing}'"):
        open_bundle(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(vae=[]),
        lambda m: m.pop("vae"),
        lambda m: m["vae"].update(base_dim=10**9),
        lambda m: m["vae"].update(z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        lambda m: m["vae"].update(dim_mult=[1]),
    ],
    ids=["list", "none", "huge", "channels", "stages"],
)
def test_a_vae_that_makes_no_sense(tmp_path, change):
    contents = CONTENTS | dict.fromkeys((VAE_WEIGHTS, FIRST_GRAPH, NEXT_GRAPH), b"part")
    path = make_bundle(tmp_path / "b", contents=contents, vae=VaeConfig(base_dim=8))
    edit_manifest(path, change, sign=True)
    with pytest.raises(BundleError, match=rf"{MANIFEST} is not valid.*{REBUILD}"):
        open_bundle(path)


@pytest.mark.parametrize("field", ["local_tokens", "scatter_rows", "gather_rows", "shards"])
def test_a_bundle_of_another_layout(made, field):
    # The graphs have the layout of the version that built them; running them with another one would mix up heads.
    edit_manifest(made, lambda m: m["steps"][0]["layout"].update({field: 0}), sign=True)
    with pytest.raises(BundleError, match="layout"):
        open_bundle(made)


def test_a_graph_file_that_is_not_listed(made):
    edit_manifest(made, lambda m: m["steps"][0]["segments"][0].update(file="../evil.onnx"), sign=True)
    with pytest.raises(BundleError, match=r"evil\.onnx"):
        open_bundle(made)


@pytest.fixture
def two_kinds(tmp_path):
    """A bundle with two kinds of step."""
    with new_bundle(tmp_path / "b", overwrite=False, needed_bytes=0) as folder:
        fill(folder, CONTENTS | {"1-frame-step-000.onnx": b"graph"}, config=TWO_KINDS, steps=TWO_STEPS)
    return tmp_path / "b"


def test_a_bundle_with_two_kinds_of_step(two_kinds):
    assert open_bundle(two_kinds).steps == TWO_STEPS
    steps = json.loads((two_kinds / MANIFEST).read_text())["steps"]
    assert [(step["frames"], step["layout"]["local_tokens"]) for step in steps] == [(3, 9), (1, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["steps"].pop(), "steps must have 2 entries"),
        (lambda m: m["steps"].append(m["steps"][0]), "steps must have 2 entries"),
        (lambda m: m["steps"][1].update(segments=[]), "do not fit the graphs"),
        (lambda m: m["steps"][1].update(frames=3), "frames"),
        (lambda m: m["steps"][1]["layout"].update(gather_rows=0), "layout"),
    ],
    ids=["one is missing", "one too many", "its graph is missing", "of another length", "of another layout"],
)
def test_steps_that_do_not_fit_the_config(two_kinds, change, message):
    edit_manifest(two_kinds, change, sign=True)
    with pytest.raises(BundleError, match=message):
        open_bundle(two_kinds)
