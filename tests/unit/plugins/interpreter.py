"""Runs a file of tests in Triton's interpreter: a process of its own, since the choice is made when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path


def run_in_interpreter(name, *, timeout_s=300):
    """Run the tests of `name`, beside this file; on failure, show what they print."""
    path = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{name} in the interpreter:\n{done.stdout}\n{done.stderr}"
