"""The structure of the package (docs/architecture.md): imports point down and not in circles, and no part grows too large."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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


# ---- circles, sizes, and what the wings take from `runtime`

MODULES = {
    ".".join(["causalrt", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in files(PACKAGE)
}
MAX_LINES = 400
MAX_SHARE = 0.2
WINGS = ("server", "tools", "proof", "measure")
FOR_WINGS = {
    "canary": {"ExchangeCheck", "check_exchanges"},
    "collectives": {"CountingCollectives", "LocalCollectives", "TorchCollectives", "Traffic", "join_ranks"},
    "engine": {"Engine"},
    "kv_slots": {"KVSlots"},
    "load": {"check_rank_limits", "load"},
    "memory": {
        "DecoderMemory",
        "MemoryEstimate",
        "available_bytes",
        "decoder_memory",
        "predict_decoder_memory",
        "predict_memory",
        "rank_memory",
    },
    "noise": {"RecordedNoise", "SeededNoise"},
    "ranks": {"ENVIRONMENT"},
    "requests": {"checked_chunks", "checked_initial_latents", "checked_text"},
    "rollout": {"ChunkTimes", "Rollout", "StepRecord", "SwitchPolicy"},
    "session": {"Chunk", "Session"},
    "session_buffers": {"SessionBufferPool", "SessionBuffers"},
    "start": {"open_text_encoder"},
    "stopwatch": {"process_age_s"},
    "usage": {"WaitCounter"},
}
"""What the wings may import from `runtime`, by module."""


def at_import(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: none in functions, none for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ):
            yield from at_import(node)


def needs(source: str) -> set[str]:
    """Modules of the package that the module with this source imports when it is imported itself."""
    found = set()
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in MODULES else name.rpartition(".")[0] for name in found} & MODULES.keys()


def circles(needed: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that need each other."""
    order = TopologicalSorter(needed)
    try:
        order.prepare()
    except CycleError as error:
        circle = error.args[1]
        rest = {name: others - {circle[0]} for name, others in needed.items() if name != circle[0]}
        return [sorted(set(circle)), *circles(rest)]
    return []


def test_modules_do_not_import_each_other_in_circles():
    assert circles({name: needs(path.read_text()) for name, path in MODULES.items()}) == []


def test_files_are_short():
    sizes = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in files(PACKAGE)}
    assert [file for file, lines in sizes.items() if lines > MAX_LINES] == []


def test_no_part_is_a_fifth_of_the_package():
    lines = Counter()
    for path in files(PACKAGE):
        lines[path.relative_to(PACKAGE).parts[0]] += len(path.read_text().splitlines())
    assert {part: count for part, count in lines.items() if count > MAX_SHARE * lines.total()} == {}


def test_wings_take_from_runtime_what_is_listed():
    taken = {
        name
        for wing in WINGS
        for path in files(PACKAGE / wing)
        for _, name in imports(path.read_text())
        if name.startswith("causalrt.runtime.")
    }
    listed = {f"causalrt.runtime.{module}.{name}" for module, names in FOR_WINGS.items() for name in names}
    assert sorted(taken - listed) == []


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


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": set()}) == [["a", "b", "c"]]


def test_what_runs_later_is_in_no_circle():
    later = "def f():\n    from causalrt import errors\nif TYPE_CHECKING:\n    import causalrt.layout\n"
    assert needs(later + "try:\n    from causalrt.config import Config\nexcept ImportError:\n    pass") == {
        "causalrt.config"
    }
