"""Engines that are built on another machine than the rest of the bundle, and later: `causalrt build --finish`.

The machine with the GPU is a stand-in for data-centre TensorRT; where engines are really built, `tensorrt_rtx` builds them.
"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from support import tensorrt_stand_in
from support.small_bundles import prompt, tiny_config, write_checkpoint
from support.small_encoders import write_text_encoder
from support.stand_in_bundles import stand_in_builder

import causalrt
from causalrt import build, finish_build, override
from causalrt.child_python import python_command, python_environment
from causalrt.cli import main
from causalrt.engines.bundle import MANIFEST, open_bundle, record_digest
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.errors import BuildError, BundleError, ConfigError, ExecutorError
from causalrt.export import engine_files
from causalrt.model.codecs.block_dct import write_block_dct
from causalrt.tools.inspect import inspect_bundle

NEEDS_RTX = "engines are built with tensorrt_rtx: pip install 'causalrt[tensorrt-rtx]'"
HOW = "causalrt build --finish "


class Inputs:
    """A checkpoint and a VAE's file in a folder of their own."""

    def __init__(self, folder, world_size=2):
        self.config = override(tiny_config(world_size), {"build.precision": "bfloat16"})
        self.checkpoint = write_checkpoint(self.config, folder / "checkpoint.safetensors")
        self.vae = folder / "codec.safetensors"
        write_block_dct(self.vae, mean=[0.0] * 16, std=[1.0] * 16)

    def build(self, out, executor="tensorrt", **options):
        return build(self.config, checkpoint=self.checkpoint, vae=self.vae, out=out, executors=[executor], **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def prepared(inputs, tmp_path_factory):
    """With plugins and a VAE; not to be changed."""
    return inputs.build(tmp_path_factory.mktemp("prepared") / "bundle", fused_ops="on", prepare=True)


@pytest.fixture(scope="module")
def for_rtx(tmp_path_factory):
    """A bundle of one rank that is prepared for real engines, and what it was made of; not to be changed."""
    pytest.importorskip("tensorrt_rtx", reason=NEEDS_RTX)
    inputs = Inputs(tmp_path_factory.mktemp("rtx-inputs"), 1)
    folder = tmp_path_factory.mktemp("rtx-prepared") / "bundle"
    return inputs, inputs.build(folder, "tensorrt_rtx", targets=["sm89"], prepare=True)


@pytest.fixture
def bundle(prepared, tmp_path):
    """A copy of the prepared bundle, as on a server."""
    return shutil.copytree(prepared, tmp_path / "server" / "bundle")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def server():
    with stand_in_builder():
        yield


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["digest"] = record_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


# Two steps are one


def test_finished_without_the_checkpoint_it_is_what_one_command_makes(inputs, bundle, server, tmp_path):
    at_once = inputs.build(tmp_path / "at-once", fused_ops="on")
    assert finish_build(bundle) == bundle
    assert contents(bundle) == contents(at_once)
    opened = open_bundle(bundle)
    assert (opened.executors, opened.unfinished) == (("eager", "tensorrt"), ())
    engines = opened.engines["tensorrt"].targets["sm80"]
    assert len(engines.vae) == 2
    assert opened.fused_ops
    assert all(
        (bundle / file).read_bytes().startswith(b"stand-in engine") for file in (*engines.steps[0], *engines.vae)
    )
    assert os.listdir(bundle.parent) == ["bundle"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"video.independent_first_frame": "true", "video.horizon_frames": "13"}])
def test_collectives_at_runtime_with_their_profiles(inputs, server, tmp_path, changes):
    config = override(inputs.config, changes)
    options = {"executors": ["tensorrt"], "collectives": "runtime", "targets": ["sm80"]}
    at_once = build(config, checkpoint=inputs.checkpoint, out=tmp_path / "at-once", **options)
    later = build(config, checkpoint=inputs.checkpoint, out=tmp_path / "later", prepare=True, **options)
    finish_build(later)
    assert contents(later) == contents(at_once)


def test_real_engines_hold_the_same(for_rtx, tmp_path):
    inputs, prepared = for_rtx
    at_once = inputs.build(tmp_path / "at-once", "tensorrt_rtx", targets=["sm89"])
    later = shutil.copytree(prepared, tmp_path / "later")
    assert not list(later.glob("*.engine"))
    finish_build(later)
    found = [inspect_bundle(path).as_dict() for path in (at_once, later)]
    assert len(found[0]["engines"]) == 1
    for one in found:
        one.pop("path")
        for file in one["engines"][0]["files"].values():
            del file["sha256"]  # TensorRT-RTX writes some hundred other bytes from build to build
    sizes = [one.pop("files") for one in found]
    assert sizes[0].keys() == sizes[1].keys()
    assert found[0] == found[1]
    assert json.loads((later / MANIFEST).read_text())["executors"] == ["eager", "tensorrt_rtx"]


def test_engines_of_two_flavours(inputs, tmp_path):
    """One is built at once, by a stand-in; the other, which needs a GPU, is finished later, and keeps the first."""
    with stand_in_builder(None):
        both = build(
            inputs.config,
            checkpoint=inputs.checkpoint,
            out=tmp_path / "both",
            executors=["tensorrt", "tensorrt_rtx"],
            targets=["sm89"],
        )
    opened = open_bundle(both)
    assert (opened.executors, opened.unfinished) == (("eager", "tensorrt_rtx"), ("tensorrt",))
    with stand_in_builder((8, 9)):
        finish_build(both)
    finished = open_bundle(both)
    assert finished.executors == ("eager", "tensorrt_rtx", "tensorrt")
    assert finished.engines["tensorrt_rtx"] == opened.engines["tensorrt_rtx"]


# What an unfinished bundle says of itself, and what it can do


def test_commands_say_what_is_missing(inputs, bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--recipe", "tiny", "--checkpoint", str(inputs.checkpoint), "--executor", "tensorrt"]
    made = tmp_path / "made"
    assert main(["build", *flags, "--target", "sm90", "--out", str(made)]) == 0
    said = capsys.readouterr()
    size = sum(path.stat().st_size for path in made.iterdir() if path.name != MANIFEST) / 2**20
    assert f"{made}: prepared in " in said.out
    assert f"{size:,.1f} MiB" in said.out
    assert "its tensorrt engines are not built" in said.out
    assert f"{HOW}{made}" in said.out
    assert open_bundle(made).engines["tensorrt"].wanted == ("sm90",)

    assert main(["inspect", str(made)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "engines for sm90: not built; finish the bundle" in shown
    assert main(["inspect", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["executors"] == ["eager"]
    assert found["unfinished"]["tensorrt"]["targets"] == ["sm90"]
    assert f"{HOW}{made}" in found["unfinished"]["tensorrt"]["to_do"]

    wanted = (
        f"the tensorrt engines of {bundle} are not built; finish the bundle on the GPU that will run it with `{HOW}"
    )
    with pytest.raises(BundleError, match=wanted):
        causalrt.load(bundle, executor="tensorrt")
    with pytest.raises(BundleError, match=wanted):
        causalrt.load(bundle, executor="eager", vae_executor="tensorrt")
    embeds = tmp_path / "prompt.pt"
    torch.save(prompt(), embeds)
    video = ["--prompt-embeds", str(embeds), "--out", str(tmp_path / "v.safetensors")]
    for command in (
        ["generate", str(bundle), *video],
        ["serve", str(bundle), "--text-encoder", str(write_text_encoder(tmp_path / "text")), "--port", "0"],
        ["compare", str(bundle)],
        ["bench", str(bundle), "--device", "cpu", "--out", str(tmp_path / "bench")],
    ):
        option = "--executors" if command[0] == "bench" else "--executor"
        assert main([*command, option, "tensorrt"]) == 2
        assert wanted in " ".join(capsys.readouterr().err.split())


def test_other_executors_run_it(prepared):
    with causalrt.load(prepared, device="cpu", fused_ops=True) as engine, engine.session(prompt()) as session:
        assert engine.executor == "eager"
        assert next(session).frames.shape == (9, 32, 48, 3)


def test_its_graphs_can_be_certified(bundle, capsys):
    pytest.importorskip("polygraphy", reason="a certificate wants Polygraphy: pip install 'causalrt[proof]'")
    flags = ["--executor", "tensorrt", "--emulate", "--chunks", "1", "--json"]
    assert main(["compare", str(bundle), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_it_can_be_copied_between_machines(prepared):
    """No file says where it was built, or where the package is."""
    places = [str(prepared), str(Path(causalrt.__file__).parent), str(Path(torch.__file__).parent)]
    for name, data in contents(prepared).items():
        assert [place for place in places if place.encode() in data] == [], name


# What cannot be finished


def other_version(folder):
    edit_manifest(folder, lambda manifest: manifest["toolchain"].update(causalrt="0.0.1"))


def damage(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def for_other_gpus(folder):
    edit_manifest(folder, lambda manifest: manifest["engines"]["tensorrt"].update(wanted=["sm90", "sm100"]))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (other_version, BundleError, r"was prepared by CausalRT 0\.0\.1, and this is .*prepare it again"),
        (damage, BundleError, "is damaged.*(?s:.*)weights.safetensors: contents changed since the build"),
        (for_other_gpus, ExecutorError, "prepared for sm90, sm100, and the GPU here is sm80; finish it on such a GPU"),
        (shutil.rmtree, BundleError, "is no bundle"),
        (finish_build, BundleError, "is complete, with engines of tensorrt for sm80; there is nothing to finish"),
        (lambda folder: (folder / "notes.txt").touch(), BundleError, "not part of the bundle: notes.txt; move them"),
    ],
)
def test_bundle_that_is_refused(bundle, server, monkeypatch, change, error, said):
    monkeypatch.setattr("causalrt.export.finish.toolchain_versions", lambda: {"causalrt": causalrt.__version__})
    change(bundle)
    before = contents(bundle) if bundle.exists() else None
    with pytest.raises(error, match=said):
        finish_build(bundle)
    assert (contents(bundle) if bundle.exists() else None) == before


def test_bundle_without_tensorrt(inputs, server, tmp_path):
    bundle = inputs.build(tmp_path / "bundle", "eager")
    with pytest.raises(BundleError, match="was built without TensorRT, so it has no engines to finish"):
        finish_build(bundle)


def test_machine_that_cannot_build(bundle, monkeypatch, capsys):
    before = contents(bundle)
    with stand_in_builder(None):
        assert main(["build", "--finish", str(bundle)]) == 2
    assert "torch sees none here; copy the bundle to a machine that has one" in capsys.readouterr().err
    monkeypatch.setitem(FLAVOURS, "tensorrt", dataclasses.replace(FLAVOURS["tensorrt"], module="no_such_module"))
    with pytest.raises(ExecutorError, match=r"which does not import here .*pip install"):
        finish_build(bundle)
    assert contents(bundle) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--recipe", "tiny"], "--finish builds what the bundle was prepared for; leave --recipe out"),
        (["--world-size", "2", "--plugins", "on", "--set", "a=b"], "leave --world-size, --set, --fused-ops out"),
    ],
)
def test_options_that_the_bundle_has_already(bundle, capsys, flags, said):
    assert main(["build", "--finish", str(bundle), *flags]) == 2
    assert said in capsys.readouterr().err


def test_build_of_nothing(capsys):
    assert main(["build", "--out", "bundle"]) == 2
    assert "build needs --recipe, --checkpoint; or give --finish BUNDLE alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"timing_cache": "t.cache"}, ConfigError, "--timing-cache is for the machine that builds the engines"),
        ({"targets": ["sm70"]}, ExecutorError, "tensorrt builds for sm80, .*and sm70 is not among them"),
        ({"executors": ["eager"]}, ConfigError, "--prepare are for TensorRT"),
        ({"frontend": "torch-tensorrt", "collectives": "runtime"}, ConfigError, "leave out one of the two options"),
    ],
)
def test_what_cannot_be_prepared(inputs, tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        build(
            inputs.config,
            checkpoint=inputs.checkpoint,
            out=tmp_path / "bundle",
            prepare=True,
            **{"executors": ["tensorrt"], **options},
        )
    assert not (tmp_path / "bundle").exists()


def test_the_gpu_here_is_not_the_one_to_build_for(inputs, server, tmp_path):
    with pytest.raises(ExecutorError, match=r"which is sm80, not for sm90; .*--prepare"):
        inputs.build(tmp_path / "bundle", targets=["sm90"])


# Places


def test_finished_elsewhere_the_prepared_one_stays(bundle, server, tmp_path):
    before, out = contents(bundle), tmp_path / "finished"
    assert finish_build(bundle, out=out) == out
    assert contents(bundle) == before
    assert open_bundle(out).executors == ("eager", "tensorrt")
    with pytest.raises(BuildError, match="exists already; choose another folder or pass --overwrite"):
        finish_build(bundle, out=out)
    finish_build(bundle, out=out, overwrite=True)


def test_bundle_of_links(bundle, server, tmp_path):
    """As in the cache of the Hugging Face hub, which keeps its files."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in list(bundle.iterdir()):
        shutil.move(file, blobs / file.name)
        file.symlink_to(os.path.relpath(blobs / file.name, bundle))
    before = contents(blobs)
    finish_build(bundle)
    assert open_bundle(bundle).executors == ("eager", "tensorrt")
    assert not any(path.is_symlink() for path in bundle.iterdir())
    assert contents(blobs) == before


# When it breaks


def test_error_leaves_it_to_be_finished_again(bundle, server, monkeypatch):
    before = contents(bundle)

    def refuse(request, target, on_progress):
        (Path(json.loads(request)["folder"]) / "half.engine").write_bytes(b"half")
        raise BuildError("tensorrt cannot build it")

    with monkeypatch.context() as patch:
        patch.setattr(engine_files, "run_child", refuse)
        with pytest.raises(BuildError, match="tensorrt cannot build it"):
            finish_build(bundle)
    assert contents(bundle) == before
    assert os.listdir(bundle.parent) == ["bundle"]
    finish_build(bundle)
    assert open_bundle(bundle).unfinished == ()


def test_replaced_meanwhile(bundle, server, monkeypatch, tmp_path):
    """Somebody else finishes the same bundle first: theirs stays."""
    write_engine = tensorrt_stand_in.write_engine
    calls = []

    def another(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            finish_build(bundle)
        write_engine(*args, **options)

    monkeypatch.setattr(tensorrt_stand_in, "write_engine", another)
    with pytest.raises(BundleError, match="was replaced or changed while it was being read"):
        finish_build(bundle)
    assert open_bundle(bundle).unfinished == ()
    assert os.listdir(bundle.parent) == ["bundle"]


def test_killed_in_the_middle(for_rtx, tmp_path):
    bundle = shutil.copytree(for_rtx[1], tmp_path / "server" / "bundle")
    before = contents(bundle)
    command = [*python_command("causalrt.cli"), "build", "--finish", str(bundle)]
    with subprocess.Popen(command, env=python_environment(), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(bundle.parent.glob(".bundle.*.partial/*.engine")):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert contents(bundle) == before
    assert open_bundle(bundle).unfinished == ("tensorrt_rtx",)
    finish_build(bundle)
    assert open_bundle(bundle).executors == ("eager", "tensorrt_rtx")
    assert os.listdir(bundle.parent) == ["bundle"]


# Advice


def test_gpus_that_nvidia_does_not_list_are_built_for_with_a_warning(inputs, server, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        bundle = inputs.build(tmp_path / "bundle", "tensorrt_rtx", targets=["sm80", "sm89"])
    assert set(open_bundle(bundle).engines["tensorrt_rtx"].targets) == {"sm80", "sm89"}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("NVIDIA does not list sm80 as supported by tensorrt_rtx, ")
    assert said.endswith("the documented way is `--executor tensorrt`")
