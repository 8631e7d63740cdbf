"""The shipped demo model on the GPU, through rank and decoder processes as in serving: its frames against those of the CPU."""

from dataclasses import replace

from causalrt.config import override
from causalrt.demo_model import demo_files
from causalrt.export.build import build
from causalrt.measure.gpu_day.recorder import Recorder
from causalrt.recipes import recipe
from causalrt.tools.arguments import DemoRequest
from causalrt.tools.contact_sheet import SheetRow, contact_sheet
from causalrt.tools.demo import DemoRow, Made, compared, make_video

TABLE = "videos of the demo model"
SHEET = "demo.png"
SAME_LEVELS = 2
"""Allowed difference in grey levels, of 255: rounding to pixels may differ where sums are taken in another order."""
VARIANTS = (("eager", False), ("eager", True), ("inductor", False))
"""Executors, and whether they use the fused ops."""


def run(recorder: Recorder) -> None:
    """Make the video on the CPU, then with each variant on the GPU; the contact sheet has a row for each."""
    model, device = demo_files(), recorder.device.type
    request = replace(DemoRequest(), chunks=2) if recorder.dry_run else DemoRequest()
    config = override(recipe("demo"), {"build.world_size": "1"})
    bundle = build(
        config,
        checkpoint=model.checkpoint,
        vae=model.codec,
        out=recorder.settings.work / "demo",
        executors=["eager"],
    )

    def made_by(executor: str, device: str, *, fused_ops: bool) -> Made:
        return make_video(
            request, {}, bundle, executor, device=device, fused_ops=fused_ops, on_progress=lambda *_: None, stage=""
        )

    wanted = made_by("eager", "cpu", fused_ops=False)
    sheet = [SheetRow(name="eager\nCPU", frames=wanted.frames, verdict="reference", agrees=None)]
    variants = VARIANTS[1:2] if recorder.dry_run else VARIANTS
    if recorder.dry_run:
        recorder.note("On a CPU the demo runs only with the references of the fused ops, and is two chunks long.")
    worst = 0
    where = "GPU" if device == "cuda" else "CPU"
    for executor, fused_ops in variants:
        name = f"{executor}, fused ops" if fused_ops else executor
        with recorder.attempt(name):
            made = made_by(executor, device, fused_ops=fused_ops)
            levels = _record(recorder, name, compared((executor, 1), made, wanted))
            row = f"{executor}{' fused' if fused_ops else ''}\n{where}"
            verdict = f"largest difference:\n{levels} of 255 grey levels"
            sheet.append(SheetRow(name=row, frames=made.frames, verdict=verdict, agrees=levels <= SAME_LEVELS))
            recorder.file(SHEET, contact_sheet(f"{request.prompt} ({where} against CPU)", sheet))
            worst = max(worst, levels)
            recorder.headline("demo", f"The demo's frames differ from the CPU's by at most {worst} of 255.")


def _record(recorder: Recorder, name: str, found: DemoRow) -> int:
    """Record the comparison of one variant, and return its largest difference in grey levels."""
    levels = found.grey_levels
    recorder.row(
        TABLE,
        variant=name,
        device=recorder.device.type,
        **{
            "largest difference, of 255": levels,
            "mean difference, of 255": found.mean_grey_levels,
            "latents": found.latent_error,
            "start s": found.load_s,
            "first frames ms": found.first_frame_ms,
            "chunk ms": found.median_chunk_ms,
        },
    )
    if levels > SAME_LEVELS:
        recorder.wrong(f"{name}: frames differ by up to {levels} of 255, allowed {SAME_LEVELS}")
    return levels
