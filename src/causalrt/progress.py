"""How long work reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""A function that is called with (stage, units done, units in all)."""
