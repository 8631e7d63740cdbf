"""`causalrt demo`: make a video with the model that ships with the package."""

import json

from rich import box
from rich.table import Table

from causalrt.commands.output import EXIT_FAILED, say
from causalrt.terminal import PrintableConsole
from causalrt.tools.arguments import DemoRequest
from causalrt.tools.progress_bars import shown_progress

EXAMPLES = """
causalrt demo
causalrt demo --prompt 'a blue square bounces up and down slowly' \\
    --switch '4=a blue square moves left quickly'
"""
COLUMNS = ("", "start s", "first ms", "chunk ms", "fps", "latents", "grey")


def demo(request: DemoRequest = DemoRequest()) -> int:
    """Make a video with the small model that ships with the package, on 1 to 8 ranks of two executors, and compare."""
    from causalrt.tools.demo import run_demo

    console = PrintableConsole(stderr=True)
    with shown_progress() as progress:
        result = run_demo(request, on_progress=progress, on_stage=console.print)
    code = 0 if result.passed else EXIT_FAILED
    if request.json:
        say(json.dumps(result.as_dict()))
        return code
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.load_s:.1f}",
            f"{row.first_frame_ms:.0f}",
            f"{row.median_chunk_ms:.0f}",
            f"{row.frames_per_s:.0f}",
            f"{row.latent_error:.1e}",
            str(row.grey_levels),
        )
    PrintableConsole().print(table)
    say(
        "start: until the ranks are ready; first: from the prompt to the first frames; chunk: the median.\n"
        f"latents, grey (levels, of 255): the largest difference from {result.rows[0].name}.\n"
        f"{'All rows agree' if result.passed else 'ROWS DISAGREE'}: at most {result.most_grey_levels} grey level is allowed. "
        f"{result.total_s:.0f} s in all, {result.build_s:.0f} s of them building."
    )
    for path in result.files:
        say(path)
    return code
