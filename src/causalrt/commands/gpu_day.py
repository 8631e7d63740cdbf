"""`causalrt gpu-day`: try everything on a GPU within a time budget."""

from causalrt import __version__
from causalrt.commands.output import EXIT_FAILED, say
from causalrt.measure.gpu_day.arguments import GpuDayRequest
from causalrt.terminal import PrintableConsole

EXAMPLES = """
causalrt gpu-day --budget 570 --out report
causalrt gpu-day --parts golden ranks
causalrt gpu-day --dry-run
"""


def gpu_day(request: GpuDayRequest = GpuDayRequest()) -> int:
    """Try everything on a GPU within a time budget; the report is rewritten after each part."""
    from causalrt.measure.gpu_day.command import run

    console = PrintableConsole(stderr=True)
    passed = run(request, version=__version__, write=say, on_stage=lambda line: console.print(line, soft_wrap=True))
    return 0 if passed else EXIT_FAILED
