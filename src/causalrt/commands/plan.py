"""`causalrt plan`: predict how fast a recipe runs, and how much memory it takes."""

from causalrt.commands.output import say
from causalrt.errors import Faults
from causalrt.options import configured
from causalrt.tools.plan.arguments import PlanRequest
from causalrt.tools.progress_bars import shown_progress

EXAMPLES = """
causalrt plan --recipe wan_1_3b_480p --gpu a800 --world-size 8
causalrt plan --recipe wan_1_3b_480p --gpu h100 --fused-ops on --vae shared \\
    --timeline timeline.png
causalrt plan --recipe bench_cpu --calibrate machine.json
causalrt plan --validate
"""


def plan(request: PlanRequest = PlanRequest()) -> int:
    """Predict latency, frames a second, memory and traffic on GPUs, or on this machine once it has been measured."""
    from causalrt.tools.plan.command import check_request, run

    config, faults = None, Faults()
    dtype = request.dtype or ("bfloat16" if request.gpu else None)
    with faults:
        config = configured(request.recipe, request.overrides, world_size=request.world_size, precision=dtype)
    with faults:
        check_request(request, config)
    faults.report()
    assert config is not None
    with shown_progress() as progress:
        run(request, config, write=say, on_progress=progress)
    return 0
