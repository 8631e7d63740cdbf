"""Advice on a machine that `doctor` has examined: sentences, and commands to type."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from causalrt.engines.tensorrt_flavour import FLAVOURS, recommended_executor

ENOUGH_SHARED_MEMORY_GIB = 1.0
"""Containers have 64 MiB by default, which is too little for NCCL's buffers with several ranks."""
BUILD = "causalrt build --recipe wan_1_3b_480p --checkpoint self_forcing_dmd.pt --vae Wan2.1_VAE.pth"
GPU_DAY = "causalrt gpu-day --budget 570 --out gpu-day"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Whether an executor or a builder works on a machine.

    Attributes:
        ok: whether it works.
        detail: its version, or why it does not work and what to do about it.
        on_gpus: whether it is known to work on the GPUs, for an executor that may leave them unused.
        problem: what stands in the way of using the whole machine; None if nothing does.
    """

    ok: bool
    detail: str
    on_gpus: bool = False
    problem: str | None = None


def advise(machine: Mapping[str, Any], gpus: Mapping[str, Any], can: Mapping[str, Ability]) -> dict[str, Any]:
    """Say what a machine can do and what comes next.

    Args:
        machine: `machine` of `doctor.examine`.
        gpus: `gpus` of `doctor.examine`.
        can: an ability for each entry of `can` of `doctor.examine`.

    Returns:
        `gpus_usable`: False if the machine has GPUs, and CUDA does not work on all of them. `summary`: what the machine can
        do. `problems`: what stands in the way of more, each with its remedy. `commands`: what to type, each with its purpose.
    """
    working = [gpu for gpu in gpus["found"] if gpu["fault"] is None]
    faults = _gpu_problems(gpus)
    if working:
        summary, commands = _with_gpus(working, can)
    else:
        summary, commands = _without_gpu(machine["threads"], can, has_gpu=bool(faults))
    problems = [ability.problem for ability in can.values() if ability.problem]
    return {
        "gpus_usable": not faults,
        "summary": summary,
        "problems": [*faults, *problems, *_exchange_problems(machine, gpus, working)],
        "commands": [{"command": command, "purpose": purpose} for command, purpose in commands],
    }


def _with_gpus(working: Sequence[Mapping[str, Any]], can: Mapping[str, Ability]) -> tuple[str, list[tuple[str, str]]]:
    kinds = Counter((gpu["name"], gpu["target"]) for gpu in working)
    names = ", ".join(f"{number} x {name} ({target})" for (name, target), number in kinds.items())
    runs = [name for name in ("eager", "inductor") if can[f"run {name}"].ok]
    if can["build and run onnxruntime"].on_gpus:
        runs.append("onnxruntime")
    ranks = len(working) if can["run several ranks on GPUs"].ok else 1
    summary = f"This machine has {names}. It runs {_listed(runs)} on {_up_to(ranks)}."
    flavour = recommended_executor(working[0]["target"])
    commands = [(GPU_DAY, "tries everything on these GPUs within ten minutes, and writes a report; start with this")]
    if flavour == "inductor":
        summary += f" NVIDIA documents neither TensorRT for {working[0]['target']}."
        return summary, [*commands, (f"{BUILD} --world-size {ranks} --out bundle", "builds for eager and inductor")]
    target = f" --target {working[0]['target']}" if flavour == "tensorrt_rtx" else ""
    where = "any machine" if flavour == "tensorrt_rtx" else "this machine"
    summary += f" The compiled executor for these GPUs is {flavour}, whose engines are built on {where}."
    if not can[f"run {flavour} engines"].ok:
        summary += f" It does not run yet: {can[f'run {flavour} engines'].detail}."
    build = f"{BUILD} --world-size {ranks} --executor {flavour}{target} --out bundle"
    return summary, [*commands, (build, f"builds {flavour} engines for {_ranks(ranks)}")]


def _without_gpu(threads: int, can: Mapping[str, Ability], *, has_gpu: bool) -> tuple[str, list[tuple[str, str]]]:
    runs = ["eager"] + [
        name
        for name, need in (("inductor", "run inductor"), ("onnxruntime", "build and run onnxruntime"))
        if can[need].ok
    ]
    ranks = threads if can["run several ranks on CPUs"].ok else 1
    lacks = "No GPU of this machine can be used yet" if has_gpu else "This machine has no NVIDIA GPU"
    summary = f"{lacks}. On the CPU it runs {_listed(runs)}, best on {_up_to(ranks)}."
    commands = [("causalrt demo", "makes a video with the small model that ships with the package")]
    if has_gpu:
        return summary, [("causalrt doctor", "examines the machine again, once the problem is solved"), *commands]
    if can["build tensorrt_rtx engines"].ok:
        targets = ", ".join(FLAVOURS["tensorrt_rtx"].listed)
        summary += f" It can also build TensorRT-RTX engines for RTX cards in other machines ({targets})."
        build = f"{BUILD} --executor tensorrt_rtx --target sm89 --out bundle"
        commands.append((build, "builds TensorRT-RTX engines for an RTX 4090"))
    return summary, commands


def _gpu_problems(gpus: Mapping[str, Any]) -> list[str]:
    """Why GPUs of this machine cannot be used; empty if they can, or if it has none."""
    driver, cuda, needed = gpus["driver"], gpus["torch_cuda"], gpus["needed_driver"]
    if not gpus["counted"]:
        return [] if driver is None else [_none_counted(gpus)]
    if gpus["fault"]:
        problem = (
            f"{_gpus(gpus['counted'])} by NVML, and CUDA does not start: {gpus['fault']}; driver {driver or 'unknown'}"
        )
        if needed is None:
            return [problem]
        problem += f", torch's CUDA {cuda} needs driver {needed} or newer"
        if driver is not None and int(driver.partition(".")[0]) < needed:
            problem += (
                ". Update the driver, or install a build of torch for an older CUDA (CUDA 12 needs driver 525 or newer)"
            )
        return [problem]
    broken = [
        f"GPU {gpu['index']} ({gpu['name']}) does not work: {gpu['fault']}" for gpu in gpus["found"] if gpu["fault"]
    ]
    if len(gpus["found"]) < gpus["counted"]:
        broken.append(
            f"{_gpus(gpus['counted'])} by NVML, and CUDA shows {len(gpus['found'])} of them: with MIG it shows one slice; set "
            "CUDA_VISIBLE_DEVICES to what a process is to use"
        )
    return broken


def _none_counted(gpus: Mapping[str, Any]) -> str:
    here = f"NVIDIA's driver {gpus['driver']} is here, and "
    if gpus["torch_cuda"] is None:
        return f"{here}the torch installed is a build without CUDA; install one with CUDA, as PyPI has it"
    if gpus["visible_devices"] is not None:
        return f"{here}CUDA_VISIBLE_DEVICES={gpus['visible_devices']!r} hides its GPUs; unset it to use them"
    reason = f" ({gpus['fault']})" if gpus["fault"] else ""
    return (
        f"{here}torch counts no GPU{reason}; see whether nvidia-smi lists one, whether this user may open /dev/nvidia*, and "
        "whether a container was started with `--gpus all`"
    )


def _exchange_problems(
    machine: Mapping[str, Any], gpus: Mapping[str, Any], working: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What slows or prevents the exchange between the ranks on several GPUs."""
    if len(working) < 2:
        return []
    problems = []
    shared = machine["shared_memory_gib"]
    if shared is not None and shared < ENOUGH_SHARED_MEMORY_GIB:
        problems.append(
            f"/dev/shm has {shared} GiB, too little for NCCL; start the container with `--ipc=host` or `--shm-size=8g`"
        )
    if any("MIG" in gpu["name"] for gpu in working):
        problems.append("NCCL does not work between slices of MIG; run one rank, or switch MIG off")
    apart = gpus["without_peer_access"]
    if apart:
        pairs = ", ".join(f"{first} and {second}" for first, second in apart[:4])
        more = f" and {len(apart) - 4} other pairs" if len(apart) > 4 else ""
        problems.append(
            f"GPUs {pairs}{more} cannot read each other's memory: exchanges go through the host, which is slow"
        )
    return problems


def _gpus(number: int) -> str:
    return f"{number} GPU{'' if number == 1 else 's'}"


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def _up_to(number: int) -> str:
    return f"up to {number} ranks" if number > 1 else "one rank"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
