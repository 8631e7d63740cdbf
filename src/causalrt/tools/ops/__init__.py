"""Single ops of a chunk step: how many there are, how large they are, and how long they take on this machine.

    work.py --counts--> micro_ops.py --one op each--> timing.py, in the processes of rank_processes.py --> samples

`tools/plan` fits costs to samples and predicts with the counts; `measure/bench` takes its ceilings from samples.
"""
