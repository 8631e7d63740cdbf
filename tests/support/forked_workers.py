"""Rank processes that are forked from a template, which has imported torch once for all tests of a pytest process.

A new interpreter takes seconds of CPU time to import torch, and most tests that load an engine are not about that. The forked
process is a child of pytest's, with the descriptors, the environment and the session that `subprocess.Popen` would give it.
"""

import array
import contextlib
import ctypes
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from causalrt.child_python import python_command, python_environment
from causalrt.runtime import worker
from causalrt.runtime.ranks import ENVIRONMENT

PR_SET_CHILD_SUBREAPER = 36
MAX_DESCRIPTORS = 64
HIGH = 500
"""Received descriptors are moved up here first: the numbers that are wanted are lower."""
OF_EACH_PROCESS = ("PYTHONPATH", "PYTEST_CURRENT_TEST", *ENVIRONMENT["decoder"])
"""Variables that may differ from the template's. Other differences, or a `sitecustomize` of a test, want a new interpreter."""


class ForkedWorkers:
    """The template, and the process class that takes the place of `subprocess.Popen` in `causalrt.runtime.ranks`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._environment = _compared(os.environ)
        self._path = list(sys.path)
        self._owner = os.getpid()
        self._channel: socket.socket | None = None
        workers = self

        class Popen(subprocess.Popen[Any]):
            def _execute_child(self, args: list[str], *rest: Any) -> None:
                _, _, _, pass_fds, _, env, *_, errwrite, _, _, _, _, _, start_new_session, _ = rest
                if not workers._would_be_the_same(env, json.loads(args[4])) or not start_new_session:
                    super()._execute_child(args, *rest)  # type: ignore[misc]
                    return
                self.pid = workers.fork(args, dict.fromkeys(pass_fds) | {2: errwrite}, env)
                self._child_created = True

        self.popen = Popen

    def _would_be_the_same(self, environment: dict[str, str], path: list[str]) -> bool:
        customizes = any(Path(entry, "sitecustomize.py").exists() for entry in path if entry not in self._path)
        return os.getpid() == self._owner and _compared(environment) == self._environment and not customizes

    def fork(self, args: list[str], descriptors: dict[int, int | None], env: dict[str, str]) -> int:
        """Fork the template; `descriptors` has for each number in the new process the one here, where that is another."""
        wanted = list(descriptors)
        ours = [number if source is None else source for number, source in descriptors.items()]
        paths, _, *arguments = args[4:]  # as `python_command` has them
        request = json.dumps(
            {"wanted": wanted, "path": json.loads(paths), "argv": arguments, "env": env, "cwd": os.getcwd()}
        )
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(PR_SET_CHILD_SUBREAPER, 1)
            try:
                payload = request.encode()
                channel = self._channel = self._channel or self._start()
                channel.sendmsg(
                    [len(payload).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ours))]
                )
                channel.sendall(payload)
                return int.from_bytes(_exactly(channel, 8), "big")
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0)

    def _start(self) -> socket.socket:
        channel, theirs = socket.socketpair()
        with theirs:
            self._template = subprocess.Popen(
                [*python_command("support.forked_workers"), str(theirs.fileno())],
                env=python_environment(**ENVIRONMENT["rank"]),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        return channel

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._template.wait()


def _compared(environment: Any) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OF_EACH_PROCESS}


def _exactly(channel: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += (part := channel.recv(size - len(received)))
        if not part:
            raise EOFError
    return received


def _become(request: dict[str, Any], received: list[int]) -> None:
    """Take the place of a process that was started with `request`."""
    os.setsid()
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, HIGH) for number in received]
    os.closerange(3, HIGH)
    for number, source in zip(request["wanted"], high, strict=True):
        os.dup2(source, number)
    os.closerange(HIGH, HIGH + 2 * MAX_DESCRIPTORS)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # as the new environment has it
    sys.path[:] = request["path"]
    sys.argv[1:] = request["argv"]


def serve(channel: socket.socket) -> None:
    """Fork twice for each request: the process that is asked for is an orphan, which pytest's process adopts."""
    pytest_pid = os.getppid()
    with contextlib.suppress(EOFError):
        while True:
            size, descriptors, _, _ = socket.recv_fds(channel, 8, MAX_DESCRIPTORS)
            request = json.loads(_exactly(channel, int.from_bytes(size + _exactly(channel, 8 - len(size)), "big")))
            between = os.fork()
            if between == 0:
                if os.fork():
                    os._exit(0)
                status = 1
                try:
                    while os.getppid() != pytest_pid:
                        time.sleep(0.001)
                    channel.sendall(os.getpid().to_bytes(8, "big"))
                    _become(request, descriptors)
                    status = worker.main()
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            os.waitpid(between, 0)
            for descriptor in descriptors:
                os.close(descriptor)


if __name__ == "__main__":
    import onnxruntime  # noqa: F401  what most ranks import next

    serve(socket.socket(fileno=int(sys.argv[1])))
