"""`causalrt gpu-day`: everything worth knowing about a GPU that this package has not run on, within one time budget.

    command.py    arguments -> the parts to run, in order
    runner.py     a part in a child process with a time limit        child.py   what that process does
    report.py     gpu.json, gpu.md and pictures, rewritten after each part and while one runs
    book.py       what a part writes down                            parts/     the parts
"""
