"""The wheel holds the package once, typed, and its command."""

import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from causalrt.install_hint import install_extra, install_package

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ("checkpoint.safetensors", "codec.safetensors", "words.safetensors", "README.md")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    subprocess.run(wheel, cwd=ROOT, check=True, timeout=300)
    (wheel,) = folder.glob("causalrt-*.whl")
    return wheel


def test_wheel_holds_the_package_once(built):
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "causalrt").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert "causalrt/py.typed" in names
    page = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "causalrt").glob("server/page/*")}
    assert "causalrt/server/page/index.html" in page <= names
    demo = {f"causalrt/demo_model/{name}" for name in DEMO_MODEL}
    assert demo <= names
    assert sum(sizes[name] for name in demo) < 6_000_000
    assert "causalrt.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_hints_of_an_installed_wheel(built, monkeypatch):
    """They name what the extras require, and not this package, which is on no index."""
    with zipfile.ZipFile(built) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requires = message_from_bytes(archive.read(name)).get_all("Requires-Dist")
    monkeypatch.setattr(metadata, "requires", {"causalrt": requires}.get)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("video", "proof", "gpu", "gpu-cu12", "torch-tensorrt", "tensorrt-rtx"):
        hint = install_extra(extra)
        assert [Requirement(text) for text in hint.split("'")[1::2]] == [Requirement(text) for text in extras[extra]]
    assert install_extra("serve").startswith(install_extra("video"))
    assert "fastapi" in install_extra("serve")
    assert Requirement(install_package("onnxruntime-gpu").split("'")[1]).specifier == ">=1.31,<1.32"


def test_root_folders_are_links_into_the_package():
    for name in ("export", "runtime", "plugins", "engines", "tools"):
        assert (ROOT / name).resolve() == ROOT / "src" / "causalrt" / name


def test_production_host_needs_no_exporter():
    """Loading and running a bundle imports neither the exporter nor what only it needs."""
    names = "[m for m in sys.modules if m.startswith(('causalrt.export', 'onnxscript'))]"
    script = f"import sys, causalrt, causalrt.runtime.worker; print({names})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
