"""The wheel holds the package once, typed, and its command."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ("checkpoint.safetensors", "codec.safetensors", "words.safetensors", "README.md")


def test_wheel_holds_the_package_once(tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run(wheel, cwd=ROOT, check=True, timeout=300)
    (built,) = tmp_path.glob("causalrt-*.whl")
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "causalrt").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert "causalrt/py.typed" in names
    page = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "causalrt").glob("runtime/server/page/*")}
    assert "causalrt/runtime/server/page/index.html" in page <= names
    demo = {f"causalrt/demo_model/{name}" for name in DEMO_MODEL}
    assert demo <= names
    assert sum(sizes[name] for name in demo) < 6_000_000
    assert "causalrt.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_root_folders_are_links_into_the_package():
    for name in ("export", "runtime", "plugins", "engines", "tools"):
        assert (ROOT / name).resolve() == ROOT / "src" / "causalrt" / name


def test_production_host_needs_no_exporter():
    """Loading and running a bundle imports neither the exporter nor what only it needs."""
    names = "[m for m in sys.modules if m.startswith(('causalrt.export', 'onnxscript'))]"
    script = f"import sys, causalrt, causalrt.runtime.worker; print({names})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
