"""What several test files use: small bundles, stand-ins, recordings, tolerances, and programs that tests start."""

from pathlib import Path

SUPPORT = Path(__file__).parent
"""Some of these files are run in a process of their own."""
GOLDEN = SUPPORT.parent / "data" / "golden"
"""Rollouts that were recorded from the reference."""
