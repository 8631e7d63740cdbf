"""The extras of pyproject.toml: each can be installed, and beside each other."""

import os
import re
import subprocess
import sys
import tomllib
from itertools import combinations
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = sorted(PROJECT["optional-dependencies"])
PAIRS = list(combinations(EXTRAS, 2))
ALTERNATIVES = {"gpu", "gpu-cu12", "torch-tensorrt"}
"""Each brings another build of TensorRT to the same folders, so an environment takes one of them."""
SAME_FOLDER = ({"onnxruntime", "onnxruntime-gpu"}, {"tensorrt-cu12-libs", "tensorrt-cu13-libs"})
"""Distributions that overwrite each other's files."""
REFUSED = {("gpu", "torch-tensorrt")}
"""Pairs that an installer refuses: torch-tensorrt 2.13 requires a TensorRT before 11.1."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORM = "x86_64-manylinux_2_28"
SOURCES = ("tensorrt-cu13", "tensorrt-cu13-libs", "tensorrt-rtx", "tensorrt-rtx-cu13")
"""NVIDIA publishes these as sources alone, which fetch or require the wheels proper when they are installed."""
NVIDIA_METADATA = """
[[dependency-metadata]]  # a build of this source would ask NVIDIA's index, which a test shall not need
name = "tensorrt-cu13-libs"
version = "11.0.0.114"
requires-dist = []
"""


def declared(*extras: str) -> dict[str, SpecifierSet]:
    """What the package and `extras` require by name, extras of its own followed."""
    found: dict[str, SpecifierSet] = {}
    waiting, seen = [*PROJECT["dependencies"]], set()
    for extra in extras:
        waiting += PROJECT["optional-dependencies"][extra]
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name == "causalrt":
            for extra in requirement.extras - seen:
                seen.add(extra)
                waiting += PROJECT["optional-dependencies"][extra]
        else:
            found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found


def have_a_version_in_common(specifiers: SpecifierSet) -> bool:
    """A range that is not empty holds one of its own bounds."""
    bounds = [specifier.version for specifier in specifiers] or ["1"]
    return any(specifiers.contains(bound) for bound in bounds)


@pytest.mark.parametrize("extras", [*((extra,) for extra in EXTRAS), *PAIRS], ids="+".join)
def test_requirements_do_not_exclude_each_other(extras):
    for name, specifiers in declared(*extras).items():
        assert have_a_version_in_common(specifiers), f"{name}{specifiers}"
    if not ALTERNATIVES.issuperset(extras):
        for names in SAME_FOLDER:
            assert len(names & declared(*extras).keys()) <= 1


def test_one_onnxruntime_for_everybody():
    """Whatever is installed beside it, and for the demo nothing needs to be."""
    for extras in [(), *PAIRS]:
        assert {name for name in declared(*extras) if name.startswith("onnxruntime")} == {"onnxruntime-gpu"}


def test_specifiers_that_exclude_each_other_are_found():
    assert have_a_version_in_common(SpecifierSet(">=11.0,<12") & SpecifierSet(">=11.2,<12"))
    assert not have_a_version_in_common(SpecifierSet("==11.4.0.106") & SpecifierSet(">=11.0,<11.1"))


def test_chosen_packages_are_named():
    named = {name for extra in EXTRAS for name in declared(extra)}
    assert named >= {
        *("torch", "onnx", "onnxruntime-gpu", "triton", "polygraphy", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
        *("tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx", "torch-tensorrt"),
    }


def test_constraints_meet_the_requirements():
    constraints = {
        canonicalize_name(Requirement(line).name): Requirement(line).specifier
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    }
    for name, specifiers in declared("dev").items():
        (pinned,) = constraints[name]
        assert pinned.operator == "=="
        assert specifiers.contains(pinned.version), (
            f"{name} is {pinned} in .ci/constraints.txt, and {specifiers} is required"
        )
    assert not [name for name in constraints if re.match(r"nvidia-|cuda-", name)], "torch brings its own CUDA"


# ---- resolved as an installer would, which needs a package index


@pytest.fixture(scope="module")
def resolve(tmp_path_factory):
    """`resolve(extras, python=..., options=...)`: what would be installed, as {name: version}, or the resolver's refusal."""
    uv = pytest.importorskip("uv", reason="needs uv: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("uv")
    (folder / "uv.toml").write_text(NVIDIA_METADATA)
    environment = os.environ | {"UV_CACHE_DIR": str(folder / "cache"), "UV_HTTP_TIMEOUT": "60"}

    def run(requirements: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [
            uv.find_uv_bin(),
            *f"pip compile --quiet --no-header --no-annotate --python-platform {PLATFORM}".split(),
        ]
        command += ["--config-file", str(folder / "uv.toml"), "--python", sys.executable, *options, requirements]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    (folder / "one.txt").write_text("packaging")
    if run(str(folder / "one.txt")).returncode:
        pytest.skip("needs a package index, and none can be reached")

    def resolved(extras: tuple[str, ...], *options: str, python: str = PYTHONS[0]) -> dict[str, str] | str:
        wanted = [part for extra in extras for part in ("--extra", extra)]
        done = run(str(ROOT / "pyproject.toml"), "--python-version", python, *wanted, *options)
        if done.returncode:
            return done.stderr
        return dict(line.split(" ")[0].split("==") for line in done.stdout.splitlines())

    return resolved


@pytest.mark.slow
@pytest.mark.parametrize("extras", [*((extra,) for extra in EXTRAS), *PAIRS], ids="+".join)
def test_extras_resolve(resolve, extras):
    found = resolve(extras)
    if extras in REFUSED:
        assert isinstance(found, str)
        assert "torch-tensorrt==2.13.0 depends on tensorrt-cu13>=11.0.0,<11.1.0" in found
        return
    assert isinstance(found, dict), found
    assert "onnxruntime" not in found
    if not ALTERNATIVES.issuperset(extras):
        for names in SAME_FOLDER:
            assert len(names & found.keys()) <= 1
        bindings = {version for name, version in found.items() if re.fullmatch(r"tensorrt-cu1\d-bindings", name)}
        assert len(bindings) <= 1, "of one version, the bindings for CUDA 12 and 13 are the same files"


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_has_wheels(resolve, python):
    options = ["--only-binary", ":all:", *(part for name in SOURCES for part in ("--no-binary", name))]
    found = resolve(("dev", "gpu", "tensorrt-rtx"), *options, python=python)
    assert isinstance(found, dict), found
    assert {"torch", "onnxruntime-gpu", "av", "tensorrt-cu13"} <= found.keys()


def test_pythons_are_those_of_the_classifiers():
    prefix = "Programming Language :: Python :: "
    assert [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)] == [*PYTHONS]
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(9, 20) if allowed.contains(f"3.{minor}.1")] == [*PYTHONS]
