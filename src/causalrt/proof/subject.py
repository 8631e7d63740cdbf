"""What a certificate is about: the bundle, byte by byte, and what ran."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from causalrt.engines.bundle import MANIFEST, Bundle, file_digest
from causalrt.engines.toolchain import toolchain_versions
from causalrt.proof.rollouts import RolloutPlan


def describe_subject(
    bundle: Bundle, executor: str, plan: RolloutPlan, *, device: str, emulated: bool
) -> dict[str, Any]:
    """In plain JSON types."""
    build = bundle.config.build
    return {
        "bundle": {
            "path": str(bundle.path),
            "manifest_sha256": file_digest(bundle.path / MANIFEST),
            "files": dict(bundle.hashes),
            "toolchain": dict(bundle.toolchain),
            "plugins": bundle.fused_ops,
        },
        "executor": f"{executor} (emulated by onnxruntime)" if emulated else executor,
        "world_size": build.world_size,
        "head_plan": build.head_plan,
        "precision": build.precision,
        "device": device,
        "plan": {
            "num_chunks": plan.num_chunks,
            "evicted_chunk": plan.evicted_chunk,
            "switch_chunk": plan.switch_chunk,
            "seed": plan.seed,
            "prompt_seeds": [plan.seed, plan.seed + 1],
            "looked_inside": [f"chunk {chunk} {label}" for chunk, label in plan.places],
        },
        "versions": toolchain_versions()
        | {name: metadata.version(name) for name in ("polygraphy", "numpy")}
        | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {platform.system()}",
        "commit": commit(),
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """Of the source tree that this package is run from, marked if files in it have changed; None if it is installed."""
    root = Path(__file__).parents[4]
    if not (root / ".git").exists():
        return None
    try:
        text = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return text or None
