"""The parts of a GPU day, the most important first. Each is a module here with a function `run(recorder)`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part of a GPU day: it may take `limit_s` seconds, and is not started when fewer than `least_s` are left."""

    name: str
    module: str
    summary: str
    limit_s: float
    least_s: float
    dry_environment: Callable[[], Mapping[str, str]] = dict


def interpreting() -> Mapping[str, str]:
    """The environment in which Triton interprets kernels; empty where its interpreter does not work with this numpy."""
    from importlib import metadata  # slow to import, and every command line imports this module

    try:
        triton, numpy = (tuple(map(int, metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    except metadata.PackageNotFoundError:
        return {}
    return {} if triton < (3, 7) and numpy >= (2, 4) else {"TRITON_INTERPRET": "1"}


def _part(name: str, summary: str, *, limit_s: float, least_s: float) -> Part:
    return Part(
        name=name,
        module=f"{__name__}.{name}",
        summary=summary,
        limit_s=limit_s,
        least_s=least_s,
        dry_environment=interpreting if name == "kernels" else dict,
    )


PARTS = (
    _part("doctor", "what the machine is, and what can be built and run on it", limit_s=30, least_s=5),
    _part(
        "golden",
        "recorded rollouts B, J and R in eager and inductor, with the fused ops and without, captured and not: largest errors",
        limit_s=130,
        least_s=20,
    ),
    _part(
        "demo",
        "the shipped demo model on the GPU: its frames against the CPU's, and a contact sheet",
        limit_s=70,
        least_s=20,
    ),
    _part(
        "ranks",
        "2, 3 and 8 ranks as threads on one GPU: the recorded rollouts, and the exchange's self-test",
        limit_s=70,
        least_s=10,
    ),
    _part(
        "kernels",
        "the fused kernels: errors against float64, times beside SDPA and copies",
        limit_s=90,
        least_s=20,
    ),
    _part(
        "steps",
        "a chunk step of the 1.3B model with random weights at every KV length: eager, inductor, fused ops; host waits",
        limit_s=240,
        least_s=40,
    ),
    _part("decoder", "a chunk through the small decoder and through Wan's", limit_s=45, least_s=10),
    _part("trace", "a profile of one chunk step, and the kernels that take its time", limit_s=60, least_s=15),
    _part("exchange", "all-to-alls between the GPUs: latency and self-test", limit_s=60, least_s=15),
    _part(
        "engines",
        "TensorRT of either flavour: small engines, captured and not, then two layers of the 1.3B model",
        limit_s=200,
        least_s=30,
    ),
)
"""In the order in which they run. With the usual budget, the first five leave almost three minutes or more for the sixth."""
