"""Runs the tests on several cores, and does once what every test would do again."""

import functools
import gc
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.forked_workers import ForkedWorkers

# Before torch is imported, and for the processes that tests start: small ops on several threads wait for each other, at
# great length where other tests run beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The servers that tests start are on this machine, and a proxy of the environment does not lead back to it.
for proxy in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(proxy, None)
    os.environ.pop(proxy.upper(), None)
# Programs that tests start import `support` too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
# Tests that import onnxruntime before causalrt must not report to its maker either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# A shell has what it starts in the background ignore Ctrl-C, and tests that press it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

MAX_WORKERS = 4
"""A worker takes one or two gigabytes, with the ranks that it starts."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute the test files over several processes, unless `-n` says otherwise.

    Files that are named on the command line run in this process, and so does everything on a machine with a GPU, which the
    processes would have to share.
    """
    option = config.option
    wanted = getattr(option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    named = any(".py" in argument for argument in config.args)
    if wanted and not (named or option.usepdb or option.collectonly or Path("/dev/nvidia0").exists()):
        # One more than cores: processes that tests start, and time that tests wait for, leave cores idle.
        option.numprocesses = min(len(os.sched_getaffinity(0)) + 1, MAX_WORKERS)
        option.dist = "loadfile"  # fixtures of a module are made once
        option.loadscopereorder = False  # as they are collected: units, which are many and short, come last


def pytest_collection_finish() -> None:
    """Keep the garbage collector from scanning half a million objects of imported modules again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the reasons for which tests were skipped, with the number of tests."""
    skipped = terminalreporter.getreports("skipped")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped if report.longrepr)
    if reasons:
        terminalreporter.section("not tested on this machine")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture(autouse=True, scope="session")
def torchlib_read_once() -> Iterator[None]:
    """Cache the five hundred translations that torch's exporter parses at each call: half of its time for `tiny`."""
    from torch.onnx._internal.exporter import _registration

    apis = _registration.onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="session")
def forked_workers() -> Iterator["ForkedWorkers | None"]:
    """The template of rank processes; None on systems whose kernel does not reparent orphans as it needs."""
    if sys.platform != "linux":
        yield None
        return
    from support.forked_workers import ForkedWorkers

    workers = ForkedWorkers()
    yield workers
    workers.close()


@pytest.fixture(autouse=True, scope="module")
def ranks_of_a_template(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fork ranks from a template, unless the module tests how they start (`STARTS_PROCESSES = True`)."""
    if getattr(request.module, "STARTS_PROCESSES", False):
        yield
        return
    from causalrt.runtime import ranks

    workers = request.getfixturevalue("forked_workers")
    with pytest.MonkeyPatch.context() as patch:
        if workers:
            patch.setattr(ranks, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": workers.popen}))
        yield


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """No TF32 in matrix products and convolutions. `monkeypatch` cannot restore these settings, which are properties."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
