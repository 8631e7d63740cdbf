"""The shipped demo model on the GPU, through rank and decoder processes as it is served: frames against the CPU's."""

from dataclasses import replace

from causalrt.config import override
from causalrt.demo_model import demo_files
from causalrt.export.build import build
from causalrt.measure.gpu_day.book import Book
from causalrt.recipes import recipe
from causalrt.tools.contact_sheet import SheetRow, contact_sheet
from causalrt.tools.demo import Made, compared, make_video
from causalrt.tools.demo_request import DemoRequest

TABLE = "videos of the demo model"
SHEET = "demo.png"
SAME_LEVELS = 2
"""Of 255: what is rounded to a pixel may differ where sums are made in another order."""
WAYS = (("eager", False), ("eager", True), ("inductor", False))
"""Executors, and whether they take the fused ops."""


def run(book: Book) -> None:
    """Make the video on the CPU, then by each way on the GPU; the sheet has a row for each."""
    model, device = demo_files(), book.device.type
    request = replace(DemoRequest(), chunks=2) if book.dry_run else DemoRequest()
    config = override(recipe("demo"), {"build.world_size": "1"})
    bundle = build(
        config,
        checkpoint=model.checkpoint,
        vae=model.codec,
        out=book.settings.work / "demo",
        executors=["eager"],
    )

    def made_by(executor: str, device: str, *, plugins: bool) -> Made:
        return make_video(
            request, {}, bundle, executor, device=device, plugins=plugins, on_progress=lambda *_: None, stage=""
        )

    wanted = made_by("eager", "cpu", plugins=False)
    sheet = [
        SheetRow(name="eager\nCPU", frames=wanted.frames, verdict="what the others\nare compared with", agrees=None)
    ]
    ways = WAYS[1:2] if book.dry_run else WAYS
    if book.dry_run:
        book.note("On a CPU the demo is made by the references of the fused ops alone, and two chunks long.")
    worst = 0
    for executor, plugins in ways:
        name = f"{executor}, fused ops" if plugins else executor
        with book.attempt(name):
            made = made_by(executor, device, plugins=plugins)
            found = compared((executor, 1), made, wanted)
            levels = found["grey_levels"]
            book.row(
                TABLE,
                way=name,
                device=device,
                **{
                    "largest difference, of 255": levels,
                    "mean difference, of 255": found["mean_grey_levels"],
                    "latents": found["latent_error"],
                    "start s": found["load_s"],
                    "first frames ms": found["first_frame_ms"],
                    "chunk ms": found["median_chunk_ms"],
                },
            )
            where = "GPU" if device == "cuda" else "CPU"
            verdict = f"largest difference:\n{levels} of 255 grey levels"
            sheet.append(
                SheetRow(
                    name=f"{executor}{' fused' if plugins else ''}\n{where}",
                    frames=made.frames,
                    verdict=verdict,
                    agrees=levels <= SAME_LEVELS,
                )
            )
            book.file(SHEET, contact_sheet(f"{request.prompt} ({where} against CPU)", sheet))
            worst = max(worst, levels)
            if levels > SAME_LEVELS:
                book.wrong(f"{name}: frames differ by up to {levels} of 255, allowed {SAME_LEVELS}")
            book.headline("demo", f"The demo's frames differ from the CPU's by at most {worst} of 255.")
