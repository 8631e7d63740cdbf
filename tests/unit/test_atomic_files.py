import ctypes
import errno
import os
import stat
from pathlib import Path

import pytest

from causalrt.atomic_files import atomic_file, atomic_folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_and_raise(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_takes_the_place_of_another_at_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert mode(partial) == 0o600, "nobody else reads half a file"
        assert partial.parent == tmp_path, "renamed within one file system"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
    assert mode(path) == 0o640


def test_a_private_file_is_its_owners(tmp_path):
    with atomic_file(tmp_path / "file", private=True) as partial:
        partial.write_text("")
    assert mode(tmp_path / "file") == 0o600


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_was_not_finished_leaves_nothing(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_file(path) as partial:
        write_and_raise(partial, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_whose_place_is_taken_by_a_folder_leaves_nothing(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"), atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert os.listdir(tmp_path) == ["file"]


def test_two_writers_of_one_file_do_not_share_what_they_write_to(tmp_path):
    with atomic_file(tmp_path / "file") as first, atomic_file(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first", "the outer block ends last"


def test_a_folder_comes_as_one(tmp_path):
    with atomic_folder(tmp_path / "folder") as work:
        (work / "file").write_text("new")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert mode(tmp_path / "folder") == 0o750
    with atomic_folder(tmp_path / "private", private=True):
        pass
    assert mode(tmp_path / "private") == 0o700


def test_a_folder_gives_way_only_if_it_holds_the_file_named(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "mark").write_text("old")
    for replaces in (None, "another"):
        with pytest.raises(OSError, match="not empty"), atomic_folder(target, replaces=replaces) as work:
            (work / "mark").write_text("new")
        assert (target / "mark").read_text() == "old"
    with atomic_folder(target, replaces="mark") as work:
        (work / "mark").write_text("new")
    assert (target / "mark").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_that_was_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as work:
        write_and_raise(work / "file", KeyboardInterrupt())
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_folder_stays_and_what_it_points_to_is_replaced(tmp_path):
    real, link = tmp_path / "store" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "mark").write_text("old")
    link.symlink_to(real)
    with atomic_folder(link, replaces="mark") as work:
        (work / "mark").write_text("new")
    assert link.is_symlink()
    assert (real / "mark").read_text() == "new"
    assert os.listdir(tmp_path / "store") == ["real"]


def test_what_is_open_in_a_replaced_folder_can_be_read_on(tmp_path):
    with atomic_folder(tmp_path / "folder") as work:
        (work / "mark").write_text("old")
    with (tmp_path / "folder" / "mark").open() as file:
        with atomic_folder(tmp_path / "folder", replaces="mark") as work:
            (work / "mark").write_text("new")
        assert file.read() == "old"


def test_a_file_may_be_written_without_looking_for_leftovers(tmp_path):
    left = tmp_path / ".file.0123456789ab.partial"
    left.touch()
    with atomic_file(tmp_path / "file", sweeps=False) as partial:
        partial.write_text("new")
    assert sorted(os.listdir(tmp_path)) == [left.name, "file"]


def test_what_killed_writers_have_left_is_removed(tmp_path):
    (tmp_path / ".file.0123456789ab.partial").write_text("half")
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("new")
    assert os.listdir(tmp_path) == ["file"]
    for name, mark in (("0123456789ab.partial", "another"), ("0123456789ab.old", "mark"), ("ba9876543210.old", "mine")):
        (tmp_path / f".folder.{name}").mkdir()
        (tmp_path / f".folder.{name}" / mark).write_text("")
    with atomic_folder(tmp_path / "folder", replaces="mark") as work:
        (work / "mark").write_text("new")
    assert sorted(os.listdir(tmp_path)) == [".folder.ba9876543210.old", "file", "folder"], "a stranger's folder stays"


def test_a_writer_that_was_first_is_replaced_if_it_may_be(tmp_path):
    with atomic_folder(tmp_path / "folder", replaces="mark") as slow:
        (slow / "mark").write_text("slow")
        with atomic_folder(tmp_path / "folder", replaces="mark") as fast:
            (fast / "mark").write_text("fast")
    assert (tmp_path / "folder" / "mark").read_text() == "slow"
    assert os.listdir(tmp_path) == ["folder"]


class Library:
    """A C library whose kernel or file system refuses to exchange names."""

    def __init__(self, code: int) -> None:
        self.code = code

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self.code)
        return -1


@pytest.mark.parametrize("library", [Library(errno.EINVAL), object()], ids=["refuses", "lacks"])
def test_without_an_exchange_a_folder_is_replaced_in_two_steps_and_that_is_logged(
    tmp_path, monkeypatch, caplog, library
):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    with atomic_folder(tmp_path / "folder") as work:
        (work / "mark").write_text("old")
    with atomic_folder(tmp_path / "folder", replaces="mark") as work:
        (work / "mark").write_text("new")
    assert (tmp_path / "folder" / "mark").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]
    assert "for a moment" in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL], ids=["exchange", "two-steps"])
def test_a_swap_that_fails_leaves_the_old_folder(tmp_path, monkeypatch, code):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "mark").write_text("old")
    rename = os.rename

    def fail_on_arrival(source, destination):
        if destination == target and not target.exists() and source.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_on_arrival)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library(code))
    with pytest.raises(OSError, match="Input/output"), atomic_folder(target, replaces="mark") as work:
        (work / "mark").write_text("new")
    assert os.listdir(tmp_path) == ["folder"]
    assert (target / "mark").read_text() == "old"
