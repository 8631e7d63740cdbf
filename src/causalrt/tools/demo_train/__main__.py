"""See `command.py`."""

import sys

from causalrt.tools.demo_train.command import main

sys.exit(main())
