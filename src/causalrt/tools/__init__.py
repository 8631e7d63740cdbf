"""Implementations of commands: compare, demo, doctor, inspect."""
