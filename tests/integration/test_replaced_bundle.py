"""A bundle that is replaced or rewritten while it is loaded: one error and no process, and never a video of two bundles."""

import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_bundles import prompt, tiny_config, write_checkpoint

import causalrt
from causalrt.engines import bundle as bundle_module
from causalrt.engines.bundle import MANIFEST, WEIGHTS
from causalrt.errors import BundleError
from causalrt.model.codecs.block_dct import write_block_dct
from causalrt.runtime import load as load_module
from causalrt.runtime import ranks
from causalrt.runtime.messages import LoadCommand

REPLACED = r"bundle was replaced or changed while it was being read; try again"


class Bundles:
    """`old`, in which the weights are random, and `new`, which is of the same shapes and sizes in bytes."""

    def __init__(self, folder):
        checkpoint = write_checkpoint(tiny_config(), folder / "old.safetensors")
        save_file({name: tensor / 2 for name, tensor in load_file(checkpoint).items()}, folder / "new.safetensors")
        for name, std in (("old", 3.0), ("new", 2.0)):
            write_block_dct(folder / f"{name}-codec.safetensors", mean=[0.0] * 16, std=[std] * 16)
        self.old, self.new = (
            causalrt.build(
                tiny_config(2),
                checkpoint=folder / f"{name}.safetensors",
                vae=folder / f"{name}-codec.safetensors",
                out=folder / name,
                executors=["eager"],
            )
            for name in ("old", "new")
        )
        self.videos = {path: video(path) for path in (self.old, self.new)}


def video(path):
    with causalrt.load(path, device="cpu") as engine:
        return frames(engine)


def frames(engine):
    with engine.session(prompt(), seed=1, num_chunks=1) as session:
        return next(session).frames


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    made = Bundles(tmp_path_factory.mktemp("bundles"))
    assert not torch.equal(*made.videos.values())
    return made


@pytest.fixture
def served(bundles, tmp_path):
    return Path(shutil.copytree(bundles.old, tmp_path / "bundle"))


def exchange(target, new):
    """As a build does, and a deployment that removes what was there."""
    shutil.copytree(new, target.with_name("incoming"))
    os.rename(target, target.with_name("outgoing"))
    os.rename(target.with_name("incoming"), target)
    shutil.rmtree(target.with_name("outgoing"))


def copy_over(target, new):
    """As `cp -r new/. target` does, with the manifest first."""
    for path in sorted(new.iterdir()):
        shutil.copyfile(path, target / path.name)


def rewrite_the_weights(target, new):
    """A copy that has not come to the manifest yet."""
    shutil.copyfile(new / WEIGHTS, target / "arriving")
    os.rename(target / "arriving", target / WEIGHTS)


def begin_to_remove(target, new):
    (target / MANIFEST).unlink()


def children():
    """Children of this process and their own children, by command line."""
    found, parents = {}, {os.getpid()}
    for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
        try:
            text, command = stat.read_text(), (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        pid, parent = int(stat.parent.name), int(text.rpartition(")")[2].split()[1])
        if parent in parents and b"causalrt.runtime.worker" in command:
            parents.add(pid)
            found[pid] = command
    return found


def refused(path):
    with pytest.raises(BundleError, match=REPLACED):
        causalrt.load(path, device="cpu")
    assert children() == {}


# In the caller's own process


@pytest.fixture
def replaced_while_hashed(bundles, served, monkeypatch):
    """Take a way to replace `served`, and take it once, when the caller has hashed the last file."""

    def prepare(replace):
        digest, ways = bundle_module.file_digest, [replace]

        def replacing(path):
            found = digest(path)
            if path.name == WEIGHTS and ways:
                ways.pop()(served, bundles.new)
            return found

        monkeypatch.setattr(bundle_module, "file_digest", replacing)

    return prepare


@pytest.mark.parametrize("replace", [exchange, pytest.param(copy_over, marks=pytest.mark.slow)])
def test_a_whole_bundle_that_comes_while_the_caller_hashes_is_loaded(bundles, served, replaced_while_hashed, replace):
    replaced_while_hashed(replace)
    assert torch.equal(video(served), bundles.videos[bundles.new])


@pytest.mark.parametrize(
    ("replace", "said"), [(rewrite_the_weights, "weights.*contents changed"), (begin_to_remove, "is no bundle")]
)
def test_half_a_bundle_that_comes_while_the_caller_hashes_is_refused(served, replaced_while_hashed, replace, said):
    replaced_while_hashed(replace)
    with pytest.raises(BundleError, match=f"(?s){said}"):
        causalrt.load(served, device="cpu")
    assert children() == {}


@pytest.mark.parametrize("replace", [copy_over, rewrite_the_weights])
def test_between_the_hashes_and_the_start_of_the_ranks(bundles, served, monkeypatch, replace):
    engine_of = load_module.start_engine

    def replacing(*args, **kwargs):
        replace(served, bundles.new)
        return engine_of(*args, **kwargs)

    monkeypatch.setattr(load_module, "start_engine", replacing)
    refused(served)


def test_after_some_processes_have_been_told_to_load(bundles, served, monkeypatch):
    """The decoder may have the old one, and the ranks the new one."""
    send = ranks.RankPool.send

    def replacing(pool, command):
        if isinstance(command, LoadCommand):
            exchange(served, bundles.new)
        send(pool, command)

    monkeypatch.setattr(ranks.RankPool, "send", replacing)
    refused(served)


# In the rank processes and the decoder's, which import this before they run


INJECTION = """
    import os, sys
    if "causalrt.runtime.worker" in sys.orig_argv:
        sys.path.insert(0, {tests!r})
        from pathlib import Path
        from causalrt.runtime import {module}
        import test_replaced_bundle as test

        original = {module}.{function}

        def replacing(*args, **kwargs):
            made = original(*args, **kwargs) if {when!r} == "after" else None
            try:
                os.mkdir({flag!r})
            except FileExistsError:
                pass
            else:
                test.{replace}(Path({target!r}), Path({new!r}))
            return made or original(*args, **kwargs)

        {module}.{function} = replacing
"""


@pytest.fixture
def inject(bundles, served, tmp_path, monkeypatch):
    """Have a rank, or the decoder, replace the bundle before or after it calls a function."""

    def inject(module, function, when, replace):
        text = INJECTION.format(
            tests=str(Path(__file__).parent),
            module=module,
            function=function,
            when=when,
            flag=str(tmp_path / "replaced"),
            replace=replace.__name__,
            target=str(served),
            new=str(bundles.new),
        )
        folder = tmp_path / "injection"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(textwrap.dedent(text))
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])

    yield inject
    assert (tmp_path / "replaced").exists(), "nothing was injected"


STAGES = [
    ("rank_server", "reopen_bundle", "before", begin_to_remove),
    ("rank_server", "make_executor", "before", exchange),
    ("rank_server", "make_executor", "after", rewrite_the_weights),
    ("vae_server", "make_vae", "before", exchange),
]


@pytest.mark.parametrize(("module", "function", "when", "replace"), STAGES)
def test_while_a_process_opens_it(served, inject, module, function, when, replace):
    inject(module, function, when, replace)
    refused(served)


# Afterwards


def test_the_next_load_takes_the_new_one(bundles, served, monkeypatch):
    with monkeypatch.context() as patch:
        engine_of = load_module.start_engine

        def replacing(*args, **kwargs):
            exchange(served, bundles.new)
            return engine_of(*args, **kwargs)

        patch.setattr(load_module, "start_engine", replacing)
        refused(served)
    assert torch.equal(video(served), bundles.videos[bundles.new])


def test_a_loaded_engine_keeps_what_it_has_loaded(bundles, served):
    """Its encoder, too, though that is made only when a clip is first given."""
    clip = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with causalrt.load(bundles.old, device="cpu") as engine:
        wanted = engine.encode_frames(clip)
    with causalrt.load(served, device="cpu") as engine:
        exchange(served, bundles.new)
        assert torch.equal(frames(engine), bundles.videos[bundles.old])
        assert torch.equal(engine.encode_frames(clip), wanted)
