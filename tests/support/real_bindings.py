"""Processes in which `import tensorrt` finds NVIDIA's own bindings, on a machine without TensorRT's libraries.

The bindings (distribution `tensorrt-cu13-bindings`) load three libraries, of which they call nine functions by name. A stub
that defines these nine is enough to import them, with every class, enum and docstring. What reaches into the
library does not work. It happens in child processes, so that no test finds a module `tensorrt` that another one has left.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

DISTRIBUTION = "tensorrt-cu13-bindings"
INSTALLED = "11.4"
"""The version that the extra `test` installs; others are downloaded."""

LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# What the distribution `tensorrt` puts in front of the bindings.
FRONT = {
    "__init__.py": "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n",
    "plugin/__init__.py": "from tensorrt_bindings.plugin import *\n",
}


def environment(folder, version=INSTALLED):
    """Environment of a process that imports the bindings of `version` as `tensorrt`; skips the test where there can be none.

    Args:
        folder: an empty one, for the stub and for bindings that are downloaded.
        version: two numbers, as "11.2".
    """
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("needs a C compiler, for the stub of TensorRT's libraries")
    paths = [folder]
    if version != INSTALLED:
        paths.append(_download(folder, version))
    elif importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip(f"needs TensorRT's bindings: `pip install --no-deps '{DISTRIBUTION}=={version}.*'`")
    source, stub = folder / "stub.c", folder / LIBRARIES[0]
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in FUNCTIONS))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", stub, source], check=True)
    for name in LIBRARIES[1:]:
        (folder / name).symlink_to(stub)
    for name, text in FRONT.items():
        path = folder / "tensorrt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {
        "LD_LIBRARY_PATH": _joined([folder], "LD_LIBRARY_PATH"),
        "PYTHONPATH": _joined(paths, "PYTHONPATH"),
        "PYTHONWARNINGS": "ignore::DeprecationWarning,ignore::SyntaxWarning",  # escapes in docstrings of the bindings
    }


def _joined(paths, name):
    return os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get(name)])])


def _download(folder, version):
    if importlib.util.find_spec("pip") is None:
        pytest.skip(f"needs pip, to download {DISTRIBUTION} {version}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--retries=1",
        "--timeout=20",
    ]
    command += ["--dest", folder, f"{DISTRIBUTION}=={version}.*"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"cannot download {DISTRIBUTION} {version}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    unpacked = folder / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked
