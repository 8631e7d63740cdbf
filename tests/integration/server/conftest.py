"""The helpers of the integration tests are the server's too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
