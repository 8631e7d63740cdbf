"""The spool removes nothing but what spools have made, and leaves alone what it cannot read."""

import json
import logging
import os
from dataclasses import asdict

import pytest

from causalrt.errors import RequestError
from causalrt.server.job_store import Job, JobStore

ONE, TWO = f"video_{'1' * 32}", f"video_{'2' * 32}"


def job(job_id=ONE, **changes):
    fields = {
        "id": job_id,
        "owner": "alice",
        "model": "causalrt",
        "prompt": "a fox",
        "seed": 7,
        "size": "48x32",
        "seconds": "1",
        "num_frames": 16,
        "num_chunks": 2,
        "created_at": 1_700_000_000,
        "status": "completed",
        "completed_at": 1_700_000_009,
        "expires_at": 1_700_090_000,
        "num_bytes": 5,
    }
    return Job(**{**fields, **changes})


def opened_and_closed(folder):
    """The jobs of a spool, as a server that starts and ends finds them."""
    spool = JobStore(folder)
    try:
        return list(spool.load())
    finally:
        spool.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.is_symlink()}


@pytest.fixture
def spool(tmp_path):
    """The folder of a spool that holds one finished job."""
    folder = tmp_path / "spool"
    made = JobStore(folder)
    made.video(ONE).write_bytes(b"video")
    made.save(job())
    made.close()
    return folder


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o500])
@pytest.mark.parametrize(
    "names", [["holiday.mp4", "beach.partial"], ["notes.txt"], [".hidden"], [".lock", "holiday.mp4"]]
)
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(tmp_path, names, mode):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"" if name == ".lock" else b"precious")
        (folder / name).chmod(0o640)
    folder.chmod(mode)
    before = contents(folder)
    with pytest.raises(RequestError, match=r"not a spool and not empty.* give a new or an empty folder with --spool"):
        JobStore(folder)
    assert contents(folder) == before
    assert folder.stat().st_mode & 0o777 == mode
    assert {(folder / name).stat().st_mode & 0o777 for name in names} == {0o640}


def test_a_lock_file_of_somebody_else_does_not_make_a_spool(tmp_path):
    (tmp_path / ".lock").write_text("pid 12")
    with pytest.raises(RequestError, match=r"holds '\.lock'"):
        JobStore(tmp_path)
    (tmp_path / ".lock").unlink()
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="cannot be used"):
        JobStore(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_what_strangers_put_into_a_spool_stays(spool):
    strangers = [
        "holiday.mp4",
        "beach.partial",
        ".x.mp4.0123456789ab.partial",
        "video_1.mp4",
        f"{TWO}.mp4.bak",
        f"{TWO}.txt",
    ]
    for name in strangers:
        (spool / name).write_bytes(b"precious")
    (spool / f"{TWO}.mp4").mkdir()
    (spool / f"{TWO}.mp4" / "inside").touch()
    assert opened_and_closed(spool) == [job()]
    assert {name: contents(spool)[name] for name in strangers} == dict.fromkeys(strangers, b"precious")
    assert (spool / f"{TWO}.mp4" / "inside").exists()


def test_what_a_killed_server_leaves_is_removed(spool):
    before = contents(spool)
    left = [f"{TWO}.mp4", f".{TWO}.mp4.0123456789ab.partial", f".{TWO}.json.0123456789ab.partial"]
    for name in left:
        (spool / name).touch()
    opened_and_closed(spool)
    assert contents(spool) == before


def test_a_record_is_saved_without_a_look_at_the_rest_of_the_folder(spool, monkeypatch):
    before = contents(spool)

    def refuse(*arguments, **named):
        raise AssertionError("the folder was listed")

    opened = JobStore(spool)
    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        patched.setattr(os, "listdir", refuse)
        opened.save(job(TWO))
    opened.close()
    assert set(contents(spool)) - set(before) == {f"{TWO}.json"}


def test_a_spool_whose_lock_file_was_lost_or_is_of_an_earlier_version_is_used_again(spool):
    (spool / ".lock").unlink()
    assert opened_and_closed(spool) == [job()]
    (spool / ".lock").write_bytes(b"")
    assert opened_and_closed(spool) == [job()]


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o700])
def test_an_empty_folder_keeps_its_permissions_and_its_files_are_private(tmp_path, mode):
    folder = tmp_path / "spool"
    folder.mkdir()
    folder.chmod(mode)
    made = JobStore(folder)
    made.save(job())
    made.close()
    assert folder.stat().st_mode & 0o777 == mode
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_folder_that_every_user_may_write_to_is_named_in_the_log(tmp_path, caplog):
    tmp_path.chmod(0o777)
    opened_and_closed(tmp_path)
    assert f"may write to the spool {tmp_path}" in caplog.text


def test_a_record_without_a_version_is_one_of_the_first(spool):
    (spool / f"{ONE}.json").write_text(json.dumps(asdict(job())))
    assert opened_and_closed(spool) == [job()]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (json.dumps({"schema": 2, "id": ONE}), "its schema is 2, and this version reads 1"),
        (json.dumps({"schema": None}), "its schema is None"),
        (json.dumps({**asdict(job()), "expires_at": "tomorrow"}), "expires_at: Input should be a valid integer"),
        (json.dumps({**asdict(job()), "created_at": None}), "created_at: Input should be a valid integer"),
        (json.dumps({**asdict(job()), "created_at": 1.5}), "created_at"),
        (json.dumps({**asdict(job()), "expires_at": 10**400}), "expires_at"),
        (json.dumps({**asdict(job()), "num_bytes": -1}), "num_bytes"),
        (json.dumps({**asdict(job()), "num_bytes": True}), "num_bytes"),
        (json.dumps({**asdict(job()), "prompt": ["a fox"]}), "prompt: Input should be a valid string"),
        (json.dumps({**asdict(job()), "prompt": "\ud800"}), "Invalid JSON"),
        (json.dumps({**asdict(job()), "status": "paused"}), "status"),
        (json.dumps({**asdict(job()), "added_later": 1}), "added_later"),
        (json.dumps({**asdict(job(TWO))}), f"its id is '{TWO}'"),
        (json.dumps({"id": ONE}), "owner: Field required"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_record_that_cannot_be_read_is_left_alone_with_its_video_and_named(spool, caplog, text, complaint):
    (spool / f"{ONE}.json").write_text(text)
    before = contents(spool)
    with caplog.at_level(logging.WARNING):
        assert opened_and_closed(spool) == []
    assert contents(spool) == before
    (record,) = caplog.records
    assert f"{ONE}.json is left alone, with its video: " in record.getMessage()
    assert complaint in record.getMessage()
    assert len(record.getMessage()) < 600
    assert "a fox" not in record.getMessage()  # what users ask for is theirs


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.parametrize("suffix", [".json", ".mp4"])
def test_links_and_pipes_in_the_place_of_a_job_are_not_followed(spool, tmp_path, caplog, kind, suffix):
    path = spool / f"{ONE}{suffix}"
    path.rename(tmp_path / "elsewhere")
    {"link": lambda: path.symlink_to(tmp_path / "elsewhere"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[
        kind
    ]()
    assert opened_and_closed(spool) == []
    assert f"{ONE}{suffix} is not a regular file" in caplog.text
    assert {f"{ONE}.json", f"{ONE}.mp4"} <= set(os.listdir(spool))
    assert (tmp_path / "elsewhere").exists()


def test_a_finished_job_whose_video_is_gone_is_forgotten(spool, caplog):
    (spool / f"{ONE}.mp4").unlink()
    assert opened_and_closed(spool) == []
    assert f"the video of job {ONE} is gone" in caplog.text
    assert set(os.listdir(spool)) == {".lock"}
