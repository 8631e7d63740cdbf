"""`causalrt gpu-day`: everything worth knowing about a GPU that this package has not run on, within one time budget.

`command.py` runs the modules of `parts` in order. `runner.py` runs each in a process of its own with a time limit, in which the
part writes its findings through a `Recorder`. `report.py` makes `gpu.json`, `gpu.md` and pictures from these records, after
each part and while one runs.
"""
