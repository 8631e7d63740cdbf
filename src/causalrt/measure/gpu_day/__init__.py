"""`causalrt gpu-day`: everything worth knowing about a GPU that this package has not run on, within one time budget.

`command.py` runs the modules of `parts` in order. `runner.py` runs each in a child process (`child.py`) with a time limit; the
part writes what it finds into its record (`book.py`) as it goes. `report.py` makes `gpu.json`, `gpu.md` and pictures of the
records, after each part and while one runs.
"""
