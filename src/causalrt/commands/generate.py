"""`causalrt generate`: make a video from a prompt."""

import json

from causalrt.commands.output import say
from causalrt.tools.arguments import GenerateRequest
from causalrt.tools.progress_bars import shown_progress

EXAMPLES = """
causalrt generate bundle --prompt 'a fox in the snow' \\
    --text-encoder Wan2.1-T2V-1.3B --out fox.mp4
causalrt generate bundle --prompt 'it runs' --given fox.mp4 \\
    --text-encoder Wan2.1-T2V-1.3B --out more.mp4
causalrt generate bundle --prompt-embeds prompt.safetensors --seed 1 \\
    --out latents.safetensors
"""


def generate(request: GenerateRequest) -> int:
    """Generate a video, or its latents, from a prompt."""
    from causalrt.tools.generate import generate

    with shown_progress() as progress:
        report = generate(request, on_progress=progress)
    if request.json:
        say(json.dumps(report.as_dict()))
        return 0
    say(f"{report.out}: {report.unit} {report.shape}")
    for name, first in report.first.items():
        stages = ", ".join(f"{stage.replace('_', ' ')} {ms:.0f}" for stage, ms in first.stages_ms.items())
        say(f"first {report.unit}, {name}: {first.total_ms:.0f} ms ({stages})")
    last = report.chunks[-1]
    say(f"last chunk: {last.latency_ms:.0f} ms, {last.queue_ms:.0f} of them waiting for the context pass before it")
    return 0
