import contextlib
import fcntl
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest

from causalrt.owned_paths import TemporaryFolder, own, sweep

FORK = multiprocessing.get_context("fork")
DEAD = "causalrt-spool-0123456789ab"


def sweep_parts(folder: Path) -> None:
    sweep(folder, prefix=r"\.b\.", suffix=r"\.partial")


def hold(parent: Path, ready, *, folder: bool) -> None:
    with own(parent, prefix=".b.", suffix=".partial", folder=folder) as path:
        (path / "file" if folder else path).write_text("half")
        ready.set()
        time.sleep(600)


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_holds_is_not(tmp_path, folder):
    ready = FORK.Event()
    owner = FORK.Process(target=hold, args=(tmp_path, ready), kwargs={"folder": folder})
    owner.start()
    try:
        assert ready.wait(60)
        (path,) = tmp_path.iterdir()
        sweep_parts(tmp_path)
        assert path.exists()
    finally:
        owner.kill()
        owner.join()
    assert path.exists()
    sweep_parts(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize(
    "name", [".b.holiday.partial", ".b.0123456789ab.partial.jpg", ".b.0123456789AB.partial", "b.0123456789ab.partial"]
)
def test_other_names_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    sweep_parts(tmp_path)
    assert (tmp_path / name).is_dir()


def test_links_and_pipes_stay_and_what_links_point_to(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    kept.mkdir()
    (kept / "file").write_text("mine")
    folder.mkdir()
    (folder / ".b.000000000000.partial").symlink_to(kept)
    (folder / ".b.111111111111.partial").symlink_to(kept / "file")
    os.mkfifo(folder / ".b.222222222222.partial")
    inside = folder / ".b.333333333333.partial"
    inside.mkdir()
    (inside / "link").symlink_to(kept)
    sweep_parts(folder)
    assert (kept / "file").read_text() == "mine"
    assert len(os.listdir(folder)) == 3, "only the folder that held a link has gone"


def test_what_belongs_to_another_user_stays(tmp_path, monkeypatch):
    (tmp_path / ".b.0123456789ab.partial").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    sweep_parts(tmp_path)
    assert os.listdir(tmp_path) == [".b.0123456789ab.partial"]


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_a_sweep_between_making_and_locking_costs_another_try(tmp_path, monkeypatch, folder):
    made = []

    def swept_first(lock, operation):
        if not made:
            made.extend(tmp_path.iterdir())
            made[0].rmdir() if folder else made[0].unlink()
        flock(lock, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", swept_first)
    with own(tmp_path, prefix="a-", folder=folder) as path:
        assert path not in made
        assert path.exists()


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    def no_locks(lock, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with own(tmp_path, prefix=".b.", suffix=".partial", folder=True) as path:
        sweep_parts(tmp_path)
        assert path.is_dir()


def test_a_temporary_folder_goes_with_its_block_and_takes_those_of_the_dead_along(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / DEAD).mkdir()
    strangers = ["causalrt-spool", "causalrt-0123456789ab", "causalrt-demo-abcd1234", f"my-{DEAD}"]
    for name in strangers:
        (tmp_path / name).mkdir()
    with contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(TemporaryFolder("demo")) for _ in range(2))
        assert sorted(os.listdir(tmp_path)) == sorted([*strangers, one.name, other.name])
        assert one.stat().st_mode & 0o777 == 0o700
        (one / "file").write_text("")
    assert sorted(os.listdir(tmp_path)) == sorted(strangers)
