"""How to run a module of this package in a process of its own, which finds modules where this process finds them."""

import json
import os
import sys

_RUN = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def python_command(module: str) -> list[str]:
    """The start of a command line that runs a module as `python -m` does; its arguments follow.

    The paths of modules are an argument, because in `PYTHONPATH` one that contains a colon would be taken for two. The working
    directory is not among them (`-P`) unless it is one of this process's.
    """
    return [sys.executable, "-P", "-c", _RUN, json.dumps(_paths()), module]


def python_environment(**changes: str) -> dict[str, str]:
    """The environment for `python_command`, with `PYTHONPATH` for what reads that at the start, such as `sitecustomize`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(_paths()), **changes}


def _paths() -> list[str]:
    return [path or os.getcwd() for path in sys.path]
