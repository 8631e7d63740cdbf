"""The packages whose versions a bundle records, since it depends on them."""

from collections.abc import Mapping
from importlib import metadata

TOOLCHAIN: Mapping[str, tuple[str, ...]] = {
    "causalrt": ("causalrt",),
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt-rtx": ("tensorrt-rtx",),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
}
"""The distributions that provide each package, the preferred one first."""


def toolchain_versions() -> dict[str, str]:
    """Installed versions of the packages that a bundle depends on; missing packages are left out."""
    found = {}
    for name, distributions in TOOLCHAIN.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            break
    return found
