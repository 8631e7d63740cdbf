import contextlib
import multiprocessing
import os

import pytest

from causalrt.user_cache import kept_folder

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "causalrt" / "things"


def make(path):
    path.mkdir(exist_ok=True)
    (path / "file").write_text("whole")


def keep(key, most=2, complete=make):
    return kept_folder("things", key, complete=complete, most=most)


def test_the_folders_that_were_used_last_are_kept(cache):
    for key in ("a", "b", "a", "c"):
        with keep(key) as path:
            assert (path / "file").read_text() == "whole"
    assert sorted(os.listdir(cache)) == ["a", "c"]


def test_a_folder_in_use_is_never_removed(cache):
    with keep("a"):
        for key in ("b", "c", "d"):
            with keep(key):
                pass
        assert sorted(os.listdir(cache)) == ["a", "c", "d"]
    with keep("d"):
        pass
    assert sorted(os.listdir(cache)) == ["c", "d"]


def test_what_a_killed_builder_left_is_removed(cache):
    with keep("a"):
        pass
    (cache / ".b.0123456789ab.partial").mkdir()
    with keep("a"):
        pass
    assert os.listdir(cache) == ["a"]


def start(folder, barrier):
    def complete(path):
        with (folder / "log").open("a") as log:
            log.write("begin ")
            make(path)
            log.write("end ")

    barrier.wait()
    with keep("a", complete=complete) as path:
        assert (path / "file").read_text() == "whole"


def test_several_that_want_the_same_wait_for_each_other(tmp_path):
    barrier = FORK.Barrier(4)
    starters = [FORK.Process(target=start, args=(tmp_path, barrier)) for _ in range(4)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert [starter.exitcode for starter in starters] == [0] * 4
    assert (tmp_path / "log").read_text() == "begin end " * 4


def test_an_error_while_it_is_made_lets_others_try(cache):
    def fail(path):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), keep("a", complete=fail):
        pass
    with keep("a") as path:
        assert (path / "file").read_text() == "whole"


@pytest.mark.parametrize("place", ["things", "."])
def test_somebody_else_s_cache_is_not_used(cache, monkeypatch, place):
    with keep("a"):
        pass
    stranger = (cache.parent / place).resolve()
    stat = type(cache).stat

    def of_a_stranger(path, **options):
        found = stat(path, **options)
        return os.stat_result((*found[:4], found.st_uid + (path == stranger), *found[5:10]))

    monkeypatch.setattr(type(cache), "stat", of_a_stranger)
    with pytest.raises(PermissionError, match="belongs to another user"), contextlib.ExitStack() as stack:
        stack.enter_context(keep("a"))


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "causalrt").write_text("in the way")
    with pytest.raises(OSError, match=r"exists|Not a directory"), keep("a"):
        pass
