"""`causalrt doctor`: what this machine can build and run."""

import json
from dataclasses import dataclass

from cyclopts import Parameter

from causalrt import __version__
from causalrt.commands.output import EXIT_FAILED, say
from causalrt.options import Json
from causalrt.terminal import PrintableConsole

EXAMPLES = """
causalrt doctor
causalrt doctor --json

exit code: 0, or 1 if this machine has NVIDIA GPUs and CUDA does not work on
all of them; nothing else that is missing changes it
"""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorRequest:
    """How to show the findings.

    Attributes:
        json: see `Json`.
    """

    json: Json = False


def doctor(request: DoctorRequest = DoctorRequest()) -> int:
    """Show what this machine can build and run, what is missing, and what to do next."""
    from causalrt.tools.doctor import examine
    from causalrt.tools.doctor_page import print_page

    found = examine()
    if request.json:
        say(json.dumps(found))
    else:
        print_page(found, PrintableConsole(), version=__version__)
    return 0 if found["next"]["gpus_usable"] else EXIT_FAILED
