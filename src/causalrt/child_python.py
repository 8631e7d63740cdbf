"""Running a module of this package in another process, with the same module search path."""

import json
import os
import sys

_RUN = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def python_command(module: str) -> list[str]:
    """The start of a command line that runs a module as `python -m` does; append the module's arguments.

    The search path is an argument, because a path with a colon would count as two in `PYTHONPATH`. The working directory is not
    added to it (`-P`).
    """
    return [sys.executable, "-P", "-c", _RUN, json.dumps(_paths()), module]


def python_environment(**changes: str) -> dict[str, str]:
    """The environment for `python_command`; it sets `PYTHONPATH` for what is imported at the start, such as `sitecustomize`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(_paths()), **changes}


def _paths() -> list[str]:
    return [path or os.getcwd() for path in sys.path]
