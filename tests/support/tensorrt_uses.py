"""What our source uses of TensorRT, read from its syntax tree.

    trt.LayerType.CAST, self.trt.Runtime(...)    a chain from the module, which is `trt` everywhere
    api.from_shape_expr(...)                     the same from its plugin module, which is `api`
    context.set_device_memory(...)               attributes of an object: those of one name in one function belong together

An object is TensorRT's if one of its attributes is a name that TensorRT alone knows: not a name of ours, nor of the common
types of Python, NumPy and torch. Parameters with another annotation than `Any` are never TensorRT's.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch

ROOTS = ("trt", "api")


class Call(NamedTuple):
    """Arguments by position, or None where a `*` hides their number; names of the others."""

    positional: int | None
    keywords: tuple[str, ...]


class Use(NamedTuple):
    """One mention of an attribute.

    Attributes:
        where: file and line.
        receiver: `trt`, `api`, or the text of an expression.
        scope: the function that it is in.
        names: the chain of attributes.
        guarded: only a flavour with a certain setting comes here.
        call: the arguments, if it is called.
    """

    where: str
    receiver: str
    scope: str
    names: tuple[str, ...]
    guarded: bool
    call: Call | None

    def __str__(self) -> str:
        return f"{self.where}: {'.'.join([self.receiver, *self.names])}"


def uses_in_package(package: Path, guards: frozenset[str]) -> list[Use]:
    """All uses in the modules of a package that name `trt`."""
    texts = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    return [use for path, text in texts.items() if "trt" in text for use in uses_in(text, path.name, guards)]


def uses_in(text: str, file: str, guards: frozenset[str]) -> Iterator[Use]:
    """All attributes in a module but those of imported modules and of what is annotated as something else than `Any`.

    Args:
        text: of the module.
        file: what it is called.
        guards: attributes that are true for one flavour only. Under `if x.GUARD`, and after `if not x.GUARD: return`, a use is
            guarded.
    """
    tree = ast.parse(text)
    imports = {alias.asname or alias.name.partition(".")[0] for node in ast.walk(tree) for alias in _imported(node)}
    for scope in _functions(tree.body):
        arguments = [node for node in ast.walk(scope) if isinstance(node, ast.arg) and node.annotation is not None]
        known = {
            node.arg for node in arguments if node.annotation is not None and ast.unparse(node.annotation) != "Any"
        }
        yield from _Reader(f"{file}:{scope.lineno}", file, guards, known | imports | {"self"} - {"trt"}).read(
            scope.body
        )


def _imported(node: ast.AST) -> list[ast.alias]:
    return node.names if isinstance(node, ast.Import | ast.ImportFrom) else []


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body)


class _Reader:
    def __init__(self, scope: str, file: str, guards: frozenset[str], known: set[str]) -> None:
        self.scope, self.file, self.guards, self.known = scope, file, guards, known

    def read(self, body: list[ast.stmt], guarded: bool = False) -> Iterator[Use]:
        for statement in body:
            if not isinstance(statement, ast.If):
                yield from self.visit(statement, guarded)
                continue
            positive, negative = self.guard_of(statement.test)
            yield from self.visit(statement.test, guarded)
            yield from self.read(statement.body, guarded or positive)
            yield from self.read(statement.orelse, guarded or negative)
            leaves = isinstance(statement.body[-1], ast.Return | ast.Raise | ast.Continue)
            guarded = guarded or (negative and leaves)

    def guard_of(self, test: ast.expr) -> tuple[bool, bool]:
        """Whether a test that holds is a guard, and whether one that fails is."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.guard_of(test.operand)[::-1]
        if isinstance(test, ast.BoolOp):
            positive, negative = zip(*map(self.guard_of, test.values), strict=True)
            return (any(positive), False) if isinstance(test.op, ast.And) else (False, any(negative))
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot):
            test = test.left
        return isinstance(test, ast.Attribute) and test.attr in self.guards, False

    def visit(self, node: ast.AST, guarded: bool, call: Call | None = None) -> Iterator[Use]:
        if isinstance(node, ast.IfExp):
            positive, negative = self.guard_of(node.test)
            yield from self.visit(node.test, guarded)
            yield from self.visit(node.body, guarded or positive)
            yield from self.visit(node.orelse, guarded or negative)
        elif isinstance(node, ast.Call):
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            keywords = tuple(keyword.arg or "**" for keyword in node.keywords)
            yield from self.visit(node.func, guarded, Call(None if starred else len(node.args), keywords))
            for child in (*node.args, *node.keywords):
                yield from self.visit(child, guarded)
        elif isinstance(node, ast.Attribute):
            yield from self.attribute(node, guarded, call)
        elif isinstance(node, ast.ClassDef):
            yield from self.overrides(node, guarded)
            yield from self.read(node.body, guarded)
        else:
            for _, value in ast.iter_fields(node):
                children = value if isinstance(value, list) else [value]
                if children and isinstance(children[0], ast.stmt):
                    yield from self.read(children, guarded)
                else:
                    for child in children:
                        if isinstance(child, ast.AST):
                            yield from self.visit(child, guarded)

    def overrides(self, node: ast.ClassDef, guarded: bool) -> Iterator[Use]:
        """The public methods of a class that is derived from one of TensorRT's, which calls them by their names."""
        methods = [child.name for child in node.body if isinstance(child, ast.FunctionDef) and child.name[0] != "_"]
        for base in node.bases:
            for use in self.visit(base, guarded):
                yield from (use._replace(names=(*use.names, method)) for method in methods)

    def attribute(self, node: ast.Attribute, guarded: bool, call: Call | None) -> Iterator[Use]:
        names = [node.attr]
        base = node.value
        while isinstance(base, ast.Attribute) and base.attr not in ROOTS:
            names.insert(0, base.attr)
            base = base.value
        root = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
        where = f"{self.file}:{node.lineno}"
        if root in ROOTS:
            yield Use(where, root, self.scope, tuple(names), guarded, call)
            return
        yield from self.visit(node.value, guarded)
        if root not in self.known or (root == "self" and len(names) > 1):
            yield Use(where, ast.unparse(node.value), self.scope, (node.attr,), guarded, call)


class Api:
    """What a TensorRT has (see `tensorrt_api.py`)."""

    def __init__(self, found: Mapping) -> None:
        self.version = found["version"]
        self.modules = {"trt": found, "api": found["plugin"]}
        self.classes = {
            name: cls for module in self.modules.values() if module for name, cls in module["classes"].items()
        }
        # What an object of a class may be downcast to is its class too.
        self.families: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
        for cls in self.classes.values():
            for base in cls["bases"]:
                for name, shown in cls["members"].items():
                    self.families[base][name].append(shown)
        self.names = {name for cls in self.classes.values() for name in cls["members"]}

    def faults(self, uses: list[Use], *, distinctive: frozenset[str], guarded: bool) -> list[str]:
        """What of `uses` this TensorRT lacks, in words.

        Args:
            uses: of the source.
            distinctive: names that make an object TensorRT's.
            guarded: guarded uses come here.
        """
        uses = [use for use in uses if guarded or not use.guarded]
        faults = [fault for use in uses if use.receiver in ROOTS for fault in self._chain_fault(use)]
        objects = defaultdict(list)
        for use in uses:
            if use.receiver not in ROOTS:
                objects[use.scope, use.receiver].append(use)
        for found in objects.values():
            if any(use.names[0] in distinctive for use in found):
                faults += self._object_fault(found)
        return sorted(set(faults))

    def _chain_fault(self, use: Use) -> list[str]:
        module = self.modules[use.receiver]
        if module is None:
            return []
        name, *rest = use.names
        if name not in module["names"] or (
            rest and name in module["classes"] and rest[0] not in module["classes"][name]["members"]
        ):
            return [f"{use} is not in {self.version}"]
        cls = module["classes"].get(name)
        shown = cls["members"]["__init__"] if cls and not rest else None if rest else module["functions"].get(name)
        return _call_fault(use, [shown])

    def _object_fault(self, uses: list[Use]) -> list[str]:
        names = {use.names[0] for use in uses}
        fitting = [family for family in self.families.values() if names <= set(family)]
        if not fitting:
            nearest = max(self.families, key=lambda name: len(names & set(self.families[name])))
            lacking = names - set(self.families[nearest])
            place = self.version if lacking == names else f"{nearest} of {self.version}"
            return [f"{use} is not in {place}" for use in uses if use.names[0] in lacking]
        return [fault for use in uses for fault in _call_fault(use, [s for f in fitting for s in f[use.names[0]]])]


def _call_fault(use: Use, shown: list) -> list[str]:
    if use.call is None or "**" in use.call.keywords or None in shown:
        return []
    if any(map(_fits(use.call), chain.from_iterable(shown))):
        return []
    return [f"{use} is called with {use.call}, and takes {shown}"]


def _fits(call: Call):
    def fits(parameters: list) -> bool:
        names = [name for name, _ in parameters]
        if call.positional is None:
            return set(call.keywords) <= set(names)
        rest = parameters[call.positional :]
        must = {name for name, needed in rest if needed}
        return call.positional <= len(names) and must <= set(call.keywords) <= {name for name, _ in rest}

    return fits


def names_of_others(package: Path) -> set[str]:
    """Attributes that are no sign of TensorRT: those that our source defines, and those of common types."""
    found: set[str] = set()
    for cls in (str, bytes, list, dict, set, int, float, PurePath, torch.Tensor, torch.dtype, np.ndarray, np.dtype):
        found |= set(dir(cls))
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
    return found
