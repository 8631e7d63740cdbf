"""`pytest` says at its end what the machine could not test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SAMPLES = """
import shutil, pytest

@pytest.mark.parametrize("number", range(3))
@pytest.mark.skip(reason="needs a browser")
def test_pictures(number):
    pass

@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="needs ffprobe (Debian package ffmpeg)")
def test_video():
    pass
"""


def summary(arguments: list[object], **settings) -> list[str]:
    """The lines of the section; it runs where no tool is found."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)],
        env={**os.environ, "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=300,
        **settings,
    )
    head = next(line for line in ran.stdout.splitlines() if "not tested on this machine" in line)
    after = ran.stdout.partition(head)[2].strip().splitlines()
    return [line for line in after if " skipped: " in line]


@pytest.mark.parametrize("processes", [0, 2])
def test_each_reason_is_listed_with_its_count(tmp_path, processes):
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_sample.py").write_text(SAMPLES)
    assert summary([f"-n{processes}", tmp_path], cwd=tmp_path) == [
        "3 skipped: needs a browser",
        "1 skipped: needs ffprobe (Debian package ffmpeg)",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "missing"),
    [("unit/runtime/test_video_file.py", "needs ffprobe"), ("browser/test_page.py", "needs a browser")],
    ids=["ffmpeg", "browser"],
)
def test_missing_tools_of_this_suite_are_listed(file, missing):
    lines = summary(["-n0", "-k", "ffprobe or video_plays", TESTS / file], cwd=TESTS.parent)
    assert [missing in line for line in lines] == [True], lines
