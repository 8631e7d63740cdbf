"""JSON to typed values: builds dataclasses from parsed JSON, and checks every part on the way."""

import dataclasses
import sys
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def from_plain(hint: Any, plain: Any, at: str) -> Any:
    """Build a value of an annotated type from parsed JSON.

    Args:
        hint: a dataclass, `int`, `float`, `str`, `bool`, `Any`, a `Literal`, or of these a union with None, `tuple[T, ...]` or
            `Mapping[str, T]`. Keys of an object that a dataclass does not have are ignored.
        plain: what `json.loads` returned.
        at: where it stands, for messages.

    Raises:
        TypeError: a part is missing or of a wrong type (a truth value is no number), or a dataclass refuses its fields.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return plain
    if dataclasses.is_dataclass(hint) and isinstance(plain, dict):
        return _dataclass_from_plain(hint, plain, at)
    if origin is Literal and plain in arguments:
        return plain
    if origin is tuple and isinstance(plain, list | tuple):
        return tuple(from_plain(arguments[0], entry, f"{at}[{index}]") for index, entry in enumerate(plain))
    if origin is Mapping and isinstance(plain, dict):
        return {key: from_plain(arguments[1], value, f"{at}.{key}") for key, value in plain.items()}
    if origin in (Union, UnionType):
        chosen = next(kind for kind in arguments if (kind is type(None)) == (plain is None))
        return from_plain(chosen, plain, at)
    if hint is float and type(plain) in (int, float) and abs(plain) <= sys.float_info.max:
        return float(plain)
    if hint is not float and type(plain) is hint:
        return plain
    raise TypeError(f"{at} must be {type_name(hint)}, got {plain!r:.80}")


def _dataclass_from_plain(cls: Any, plain: Mapping[str, Any], at: str) -> Any:
    hints = get_type_hints(cls)
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in plain
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise TypeError(f"{at} lacks {', '.join(missing)}")
    values = {name: from_plain(hint, plain[name], f"{at}.{name}") for name, hint in hints.items() if name in plain}
    try:
        return cls(**values)
    except TypeError as error:
        raise TypeError(f"{at}: {error}") from error


def type_name(hint: Any) -> str:
    """An annotated type as messages name it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {'integers' if arguments[0] is int else type_name(arguments[0])}"
    if origin is Mapping or dataclasses.is_dataclass(hint):
        return "an object"
    return " or ".join("none" if kind is type(None) else kind.__name__ for kind in arguments or (hint,))
