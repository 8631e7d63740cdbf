"""What is said of long work where there is no terminal."""

import re

from causalrt.tools import progress_bars as progress
from causalrt.tools.progress_bars import shown_progress


def test_a_line_for_each_stage_as_it_ends(capsys):
    with shown_progress() as update:
        for done in range(4):
            update("weights", done, 3)
        update("hashes", 0, 1)
        update("weights", 3, 3)  # a second stage of that name
        update("hashes", 1, 1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+\.\d s", "T", line) for line in lines] == [
        "weights: 3/3, done in T",
        "weights: 3/3, done in T",
        "hashes: 1/1, done in T",
    ]


def test_a_long_stage_says_how_far_it_is(capsys, monkeypatch):
    seconds = iter([0, 1, 25, 30, 46])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with shown_progress() as update:
        for done in range(5):
            update("rollouts", done, 9)
    assert capsys.readouterr().err.splitlines() == ["rollouts: 2/9 after 25 s", "rollouts: 4/9 after 46 s"]


def test_nothing_is_said_of_no_work(capsys):
    with shown_progress():
        pass
    assert capsys.readouterr() == ("", "")
