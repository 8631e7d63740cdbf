"""Nothing that CausalRT runs reports to anybody: no device id is written, and no name is looked up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import SUPPORT
from support.small_bundles import bundle_factory

STARTS_PROCESSES = True

RECORDER = SUPPORT / "dns_recorder.py"
COLLECTOR = "mobile.events.data.microsoft.com"
LONG_ENOUGH_S = 12
"""ONNX Runtime's first look-up came five seconds after its import."""
# Which of these are set decides whether ONNX Runtime reports at all.
DECIDING = (
    *("ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI"),
    *("TRAVIS", "JENKINS_URL", "CODEBUILD_BUILD_ID", "BUILDKITE", "TEAMCITY_VERSION", "APPVEYOR"),
    *("BITBUCKET_BUILD_NUMBER", "PYTEST_CURRENT_TEST"),
)
GENERATE = """
import sys, time
from causalrt import load
import torch

with load(sys.argv[1], executor="onnxruntime") as engine:
    with engine.session(torch.zeros(8, 24), num_chunks=1) as session:
        next(iter(session))
    import onnxruntime
    onnxruntime.InferenceSession(sys.argv[1] + "/time.onnx")
    time.sleep(float(sys.argv[2]))
"""


def environment(scratch: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in DECIDING}
    return {**kept, "TMPDIR": str(scratch)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundle_factory(tmp_path_factory.mktemp("bundles"), executor="onnxruntime")()


@pytest.fixture
def scratch(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def test_onnxruntime_alone_writes_a_device_id(scratch):
    """Without this, the tests below would show nothing."""
    subprocess.run([sys.executable, "-c", "import onnxruntime"], env=environment(scratch), check=True)
    assert (scratch / ".ses").exists()


def test_no_device_id_is_written(bundle, scratch):
    subprocess.run([sys.executable, "-c", GENERATE, bundle, "0"], env=environment(scratch), check=True)
    assert list(scratch.rglob("*")) == []


def test_no_device_id_is_written_through_a_symbolic_link(scratch, tmp_path):
    target = tmp_path / "somebody's file"
    (scratch / ".ses").symlink_to(target)
    subprocess.run([sys.executable, "-c", "import causalrt, onnxruntime"], env=environment(scratch), check=True)
    assert not target.exists()
    assert (scratch / ".ses").is_symlink()


def test_a_process_that_has_imported_onnxruntime_before_is_warned(scratch):
    code = "import onnxruntime, causalrt, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(scratch), check=True, capture_output=True, text=True
    )
    assert "import causalrt first" in ran.stderr
    assert ran.stdout == "1\n"  # what it starts does not report


def test_the_choice_of_the_user_stays(scratch):
    code = "import causalrt, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environ = environment(scratch) | {"ORT_DISABLE_TELEMETRY": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("0\n", "")


def start_recorded(command, scratch: Path) -> "subprocess.Popen[str]":
    namespaces = ["unshare", "--map-root-user", "--net", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespaces, "true"], capture_output=True).returncode:
        pytest.skip("needs `unshare` and leave to make network and mount namespaces")
    return subprocess.Popen(
        [*namespaces, sys.executable, RECORDER, *command], env=environment(scratch), stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_no_name_is_looked_up(bundle, scratch):
    alone = f"import onnxruntime, time; time.sleep({LONG_ENOUGH_S})"
    with (
        start_recorded([sys.executable, "-c", alone], scratch) as by_itself,
        start_recorded([sys.executable, "-c", GENERATE, bundle, str(LONG_ENOUGH_S)], scratch) as ours,
    ):
        assert set(by_itself.communicate()[0].split()) == {COLLECTOR}
        assert ours.communicate()[0].split() == []
    assert (by_itself.returncode, ours.returncode) == (0, 0)
