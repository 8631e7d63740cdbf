import ast
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from causalrt import install_hint
from causalrt.install_hint import install_extra, install_package

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRES = [
    "torch<2.14,>=2.13",
    "triton<3.8,>=3.7; platform_system == 'Linux'",
    "diffusers<0.43,>=0.42; extra == 'video'",
    "causalrt[video]; extra == 'serve'",
    "fastapi<0.166,>=0.165; extra == 'serve'",
    "winloop>=1; platform_system == 'Windows' and extra == 'serve'",
    "Onnxruntime.GPU[cudnn,cuda]<1.32,>=1.31; extra == 'gpu'",
]


@pytest.fixture
def installed(monkeypatch):
    def pretend(requirements):
        def requires(name):
            assert name == "causalrt"
            if requirements is None:
                raise metadata.PackageNotFoundError(name)
            return requirements

        monkeypatch.setattr(metadata, "requires", requires)

    return pretend


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("video", "pip install 'diffusers<0.43,>=0.42'"),
        ("serve", "pip install 'diffusers<0.43,>=0.42' 'fastapi<0.166,>=0.165'"),
        ("gpu", "pip install 'Onnxruntime.GPU[cuda,cudnn]<1.32,>=1.31'"),
    ],
)
def test_an_extra_is_installed_by_its_requirements(installed, extra, command):
    installed(REQUIRES)
    assert install_extra(extra) == command


@pytest.mark.parametrize("requirements", [None, [], REQUIRES])
def test_without_metadata_the_source_tree_is_named(installed, requirements, monkeypatch):
    """The last case: the metadata of an older version, which had no such extra."""
    monkeypatch.setattr(install_hint, "__file__", str(ROOT / "src" / "causalrt" / "install_hint.py"))
    installed(requirements)
    assert install_extra("proof") == f"pip install '{ROOT}[proof]'"


def test_one_library(installed):
    installed(REQUIRES)
    assert install_package("triton") == "pip install 'triton<3.8,>=3.7'"
    assert install_package("onnxruntime-gpu") == "pip install 'Onnxruntime.GPU[cuda,cudnn]<1.32,>=1.31'"
    assert install_package("matplotlib") == "pip install 'matplotlib'"
    installed(None)
    assert install_package("av") == "pip install 'av'"


def test_hints_name_what_pyproject_names():
    """Every extra and library that the source asks a hint for; and no hint that names this package, which no index has."""
    required = {Requirement(text).name for extra in PROJECT["optional-dependencies"].values() for text in extra}
    required |= {Requirement(text).name for text in PROJECT["dependencies"]}
    asked = []
    for path in (ROOT / "src").rglob("*.py"):
        assert path.name == "install_hint.py" or "pip install 'causalrt" not in path.read_text(), path
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.startswith("install_"):
                known = PROJECT["optional-dependencies"] if call.func.id == "install_extra" else required
                if isinstance(call.args[0], ast.Constant):
                    asked.append(call.args[0].value)
                    assert asked[-1] in known, path
    assert {"serve", "video", "proof", "torch-tensorrt", "av", "triton", "matplotlib", "onnxruntime-gpu"} <= set(asked)
