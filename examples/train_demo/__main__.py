"""Runs `command.py`."""

import sys

from train_demo.command import main

sys.exit(main())
