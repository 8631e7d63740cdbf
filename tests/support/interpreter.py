"""Runs a file of tests in a process of its own, for what must be settled before Python starts or a module is imported."""

import os
import subprocess
import sys
from pathlib import Path


def run_in_interpreter(name, *, timeout_s=300):
    """Run the tests of `name`, beside this file, in Triton's interpreter, for which it decides when it is imported."""
    run_tests(Path(__file__).with_name(name), {"TRITON_INTERPRET": "1"}, timeout_s=timeout_s)


def run_tests(path, environment, *, timeout_s=300):
    """Run the tests of a file in a changed environment; on failure, show what they print."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{path.name} with {environment}:\n{done.stdout}\n{done.stderr}"
