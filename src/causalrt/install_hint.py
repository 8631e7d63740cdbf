"""Commands that install missing libraries.

CausalRT is on no package index, so `pip install 'causalrt[video]'` fails, and the checkout that it was installed from may be
gone. The requirements themselves can always be installed; the installed metadata names them.
"""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def install_extra(extra: str) -> str:
    """The `pip install` command for everything that `extra` adds on this machine.

    If the package is not installed, as with `PYTHONPATH=src`, the command names the source tree.
    """
    required = _of_extra(extra, _requirements())
    if not required:
        return f"pip install '{Path(__file__).parents[2]}[{extra}]'"
    return " ".join(["pip install", *(_quoted(requirement) for requirement in required)])


def install_package(name: str) -> str:
    """The `pip install` command for one library, in the versions that CausalRT or one of its extras requires."""
    wanted = (found for found in _requirements() if canonicalize_name(found.name) == canonicalize_name(name))
    return f"pip install {_quoted(next(wanted, Requirement(name)))}"


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires("causalrt") or []]
    except metadata.PackageNotFoundError:
        return []


def _of_extra(extra: str, requirements: list[Requirement]) -> list[Requirement]:
    found = []
    for requirement in requirements:
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        if canonicalize_name(requirement.name) == "causalrt":  # an extra that includes others
            found += [other for name in sorted(requirement.extras) for other in _of_extra(name, requirements)]
        else:
            found.append(requirement)
    return found


def _quoted(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"'{requirement.name}{extras}{requirement.specifier}'"
