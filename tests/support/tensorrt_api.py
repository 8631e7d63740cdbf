"""Prints the API of a TensorRT as JSON: `python tensorrt_api.py MODULE`. Started by `test_tensorrt_api.py`.

    {"names": [...], "classes": {NAME: {"bases": [...], "members": {NAME: signatures or null}}}, "plugin": the same or null}

A signature is a list of [parameter, whether it must be given]; null where neither Python nor the docstring shows one.
"""

import importlib
import inspect
import json
import re
import sys


def signatures(name, thing):
    """Of a function: what `inspect` knows of one written in Python, what the docstring says of one written in C++."""
    if inspect.isfunction(thing):
        found = inspect.signature(thing).parameters.values()
        return [
            [[p.name, p.default is p.empty] for p in found if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
        ]
    lines = (thing.__doc__ or "").splitlines() if callable(thing) else []
    shown = [match[1] for line in lines if (match := re.match(rf"(?:\d+\. )?{name}\((.*)\) -> ", line))]
    return [parameters(text) for text in shown] or None


def parameters(text):
    """`self: A, b: list[C], d: int = 0` as [["b", True], ["d", False]]."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found = [[part.partition(":")[0].strip(), " = " not in part] for part in parts if part]
    return [entry for entry in found if entry[0] != "self"]


def members(cls):
    """Names of a class with their signatures; that of the constructor is `__init__`."""
    found = {name: signatures(name, getattr(cls, name)) for name in dir(cls)}
    return found | {"__init__": signatures("__init__", cls.__init__)}


def describe(module):
    classes = {name: thing for name, thing in vars(module).items() if isinstance(thing, type)}
    names = {cls: name for name, cls in classes.items()}
    return {
        "names": dir(module),
        "classes": {
            name: {"bases": [names[base] for base in cls.__mro__ if base in names], "members": members(cls)}
            for name, cls in classes.items()
        },
        "functions": {name: signatures(name, thing) for name, thing in vars(module).items() if callable(thing)},
    }


if __name__ == "__main__":
    trt = importlib.import_module(sys.argv[1])
    found = describe(trt)
    try:
        found["plugin"] = describe(importlib.import_module(f"{sys.argv[1]}.plugin"))
    except ImportError:
        found["plugin"] = None
    found["version"] = trt.__version__
    with open(sys.argv[2], "w") as file:  # TensorRT prints
        json.dump(found, file)
