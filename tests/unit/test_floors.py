"""The floors of the house (docs/architecture.md): imports point down, and nothing imports the links at the root."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "causalrt"
LINKS = ("export", "plugins", "engines", "runtime", "tools")

FLOORS = (
    (
        "codec_geometry",
        "config",
        "layout",
        "errors",
        "atomic_files",
        "owned_paths",
        "regular_files",
        "terminal",
        "demo_model",
        "user_cache",
        "child_python",
        "control_groups",
        "install_hint",
        "progress",
        "plain",
    ),
    ("plugins",),
    ("recipes", "media"),
    ("options",),
    ("model",),
    ("engines",),
    ("export", "runtime"),  # side by side: neither imports the other
    ("server",),
    ("tools",),
    ("proof",),
    ("measure",),
    ("commands", "cli", "__init__", "__main__"),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
SIDE_BY_SIDE = {"export", "runtime"}


def allowed(importer: str, imported: str) -> bool:
    if importer in SIDE_BY_SIDE and imported in SIDE_BY_SIDE:
        return importer == imported
    return FLOOR[imported] <= FLOOR[importer]


def imports(source: str, module: str = "", *, is_package: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in `source`, relative ones resolved, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *filter(None, [node.module])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return found


def part_of(name: str) -> str | None:
    """The part of the package that a dotted name belongs to; None outside of it."""
    top, _, rest = name.partition(".")
    if top != "causalrt":
        return None
    part = rest.partition(".")[0]
    is_module = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
    return part if part and is_module else "__init__"


def upward(source: str, path: Path) -> list[str]:
    """Imports of a file of the package that do not point down."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    module = ".".join(["causalrt", *parts]).removesuffix(".__init__")
    found = imports(source, module, is_package=path.name == "__init__.py")
    targets = [(line, name, part_of(name)) for line, name in found]
    return [f"{path}:{line}: {name}" for line, name, part in targets if part and not allowed(parts[0], part)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_every_part_has_a_floor():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in files(PACKAGE)}
    assert parts <= set(FLOOR)
    assert {"config", "layout", "errors", *LINKS, "model", "__init__"} <= parts


@pytest.mark.parametrize("path", files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert upward(path.read_text(), path) == []


def test_links_are_never_imported():
    found = [
        f"{path}:{line}: {name}"
        for folder in ("src", "tests", "benchmarks")
        for path in files(ROOT / folder)
        for line, name in imports(path.read_text())
        if name.partition(".")[0] in LINKS
    ]
    assert found == []


@pytest.mark.parametrize("link", LINKS)
def test_links_point_into_the_package(link):
    if not (ROOT / link).exists():
        pytest.skip("no checkout: the links are not part of a source distribution")
    assert (ROOT / link).resolve() == PACKAGE / link


# ---- the checker itself


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layout.py", "from causalrt.plugins import rotate"),
        ("config.py", "import causalrt.model.wan.transformer"),
        ("plugins/rotate.py", "from causalrt.model.wan.rope import angles"),
        ("plugins/rotate.py", "from ..model import rope"),
        ("plugins/__init__.py", "from ..model import rope"),
        ("plugins/rotate.py", "from .. import model"),
        ("model/wan/transformer.py", "from causalrt import engines"),
        ("model/wan/transformer.py", "from causalrt import Config"),
        ("model/wan/transformer.py", "import causalrt"),
        ("engines/base.py", "def f():\n    from causalrt.runtime.noise import Noise"),
        ("runtime/engine.py", "if TYPE_CHECKING:\n    import causalrt.export.build"),
        ("export/build.py", "from causalrt.runtime import memory"),
        ("export/build.py", "importlib.import_module('causalrt.proof.compare')"),
        ("proof/compare.py", "from causalrt.cli import main"),
    ],
)
def test_an_upward_import_is_found(file, source):
    assert len(upward(source, PACKAGE / file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("layout.py", "from causalrt.config import Config"),
        ("model/wan/transformer.py", "from . import rope\nfrom .rope import angles\nfrom ..plugins import rotate"),
        ("model/__init__.py", "from .rope import angles"),
        ("runtime/engine.py", "import causalrt.engines.bundle, json\nfrom causalrt.errors import RankError"),
        ("proof/compare.py", "from causalrt.export.build import build\nfrom causalrt.runtime import engine"),
        ("__init__.py", "from .runtime.engine import load"),
        ("cli.py", "import causalrt\nfrom causalrt import load"),
    ],
)
def test_a_downward_import_is_fine(file, source):
    assert upward(source, PACKAGE / file) == []
