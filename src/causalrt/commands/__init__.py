"""The commands of `causalrt`, one module each: its request, what it calls, and how it shows the result.

    cli.py -> commands/NAME.py: options -> request -> a function of the package -> text or JSON

These modules import torch, and what they call, only when a command runs. Where the room of a command needs its request, the
request is there, in a module called `arguments`.
"""
