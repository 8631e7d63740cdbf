"""`causalrt compare`: certify a bundle, or replay a recorded rollout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from causalrt.commands.output import EXIT_FAILED, say
from causalrt.errors import ConfigError
from causalrt.progress import Progress
from causalrt.proof.arguments import CompareRequest
from causalrt.tools.progress_bars import shown_progress

EXAMPLES = """
causalrt compare bundle --checkpoint self_forcing_dmd.pt --out certificate
causalrt compare --recorded tests/data/golden/B.safetensors \\
    --executor onnxruntime --world-size 8
causalrt compare --recorded tests/data/golden/B.safetensors \\
    --executor tensorrt_rtx --world-size 8 --emulate
"""


def compare(request: CompareRequest = CompareRequest()) -> int:
    """Certify that a bundle computes what eager does, or replay a recorded rollout; exit with 0 only if all agrees."""
    if (request.bundle is None) == (request.recorded is None):
        raise ConfigError("give a bundle, to certify it, or --recorded FILE, to replay a recording; one of the two")
    with shown_progress() as progress:
        if request.recorded is not None:
            result = _replay(request, request.recorded, progress)
            passed, text = result["passed"], json.dumps(result) if request.json else _as_text(result)
        else:
            from causalrt.proof.command import run

            passed, text = run(request, on_progress=progress)
    say(text)
    return 0 if passed else EXIT_FAILED


def _replay(request: CompareRequest, recorded: Path, on_progress: Progress) -> dict[str, Any]:
    from causalrt.engines.tensorrt_flavour import FLAVOURS
    from causalrt.proof.compare import compare_emulated, compare_recorded

    executor = request.executor or "onnxruntime"
    options: dict[str, Any] = {
        "executor": executor,
        "world_size": 1 if request.world_size is None else request.world_size,
        "head_plan": request.head_plan or "balanced",
        "plugins": request.fused_ops == "on",
        "time_index": request.time_index or "global",
        "on_progress": on_progress,
    }
    if not request.emulate:
        if request.dtype or request.collectives:
            raise ConfigError(
                "--dtype and --collectives are for --emulate: recordings are float32, and so are their replays"
            )
        return compare_recorded(recorded, cuda_graphs=request.cuda_graphs == "on", **options)
    if executor not in FLAVOURS:
        raise ConfigError(f"--emulate is for --executor {' or '.join(FLAVOURS)}; {executor} runs here as it is")
    return compare_emulated(
        recorded, collectives=request.collectives or "engine", precision=request.dtype or "float32", **options
    )


def _as_text(result: Mapping[str, Any]) -> str:
    lines = []
    if "emulated" in result:
        lines.append(f"{result['emulated']}; {result['collectives']} collectives, {result['precision']}")
    for name, error in result["max_abs_error"].items():
        lines.append(f"{name:8} {error:.2e}  at {result['worst'][name]}")
    for name, error in result.get("rms_error", {}).items():
        lines.append(f"{name:8} {error:.2e}  relative rms; eager's {result['eager_rms_error'][name]:.2e}")
    bound = (
        f"tolerance {result['tolerance']:.0e}"
        if "tolerance" in result
        else f"at most {result['eager_ratio']} x eager's rms"
    )
    verdict = "passed" if result["passed"] else "FAILED"
    return "\n".join([*lines, f"{verdict}: {result['executor']}, {result['world_size']} rank(s), {bound}"])
