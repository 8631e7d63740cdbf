"""The manifest's records of the step graphs and of TensorRT's engines, as types, checked once when a bundle is opened.

steps[i]    {frames, layout, segments, tensorrt} of each kind of step, numbered as in `video.step_frames`:
            segments are ONNX Runtime's parts of the step, and tensorrt are the parts that TensorRT's engines are built from,
            both in order; torch-tensorrt leaves none
engines     {flavour: {collectives, frontend, targets: {target: {version, prompt, time, steps, vae, networks, names}}}}
            or, until a GPU has finished the bundle, {flavour: {collectives, frontend, targets: {}, wanted: [target]}};
            steps[i] lists the engines of step i in order
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from causalrt.config import Config
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.layout import Layout, layouts_from_config
from causalrt.plain import from_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPart:
    """A part of a step, and what follows it.

    Attributes:
        file: file of its graph.
        sent: the output to exchange when it has run, or None if no exchange follows.
        received: the name under which later parts read what the exchange brought.
        writes: outputs that go to staging -> the name under which later parts read the slots that hold them.
    """

    file: str
    sent: str | None = None
    received: str | None = None
    writes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.sent is None) != (self.received is None):
            raise TypeError("sent and received must both be names, or both null")
        _check_names(self.writes, "writes")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGraphs:
    """The graphs of one kind of step; either tuple is empty in a bundle that was not built for the executors that need it.

    Attributes:
        segments: ONNX Runtime's parts of the step, in order.
        tensorrt: the parts that TensorRT's engines are built from, in order.
    """

    segments: tuple[StepPart, ...] = ()
    tensorrt: tuple[StepPart, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetEngines:
    """Engines for one GPU architecture.

    Attributes:
        version: version of the TensorRT that built them.
        prompt: file of the prompt's engine.
        time: file of the time's engine.
        steps: for each kind of step, the files of its engines in order.
        vae: files of the VAE's two engines, for the first latent and for the next ones; empty without a VAE.
        networks: file that describes the networks the engines were built from.
        names: by file, our name of each tensor that has another name in the engine.
    """

    version: str
    prompt: str
    time: str
    steps: tuple[tuple[str, ...], ...]
    vae: tuple[str, ...] = ()
    networks: str
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.vae) not in (0, 2):
            raise TypeError(f"vae has {len(self.vae)} engines, wanted 2 or none")
        for file, names in self.names.items():
            _check_names(names, f"names of {file}")

    @property
    def engine_files(self) -> tuple[str, ...]:
        """The engines of the transformer."""
        return (self.prompt, self.time, *(file for files in self.steps for file in files))


@dataclass(frozen=True, kw_only=True, slots=True)
class FlavourEngines:
    """Engines of one flavour, or what they are to be built for.

    Attributes:
        collectives: who exchanges between ranks.
        frontend: what handed the step to TensorRT.
        targets: engines by architecture, as `sm80`; empty until they are built.
        wanted: architectures that engines are still to be built for; empty means whatever GPU finishes the bundle.
    """

    collectives: Literal["engine", "runtime"]
    frontend: Literal["onnx", "torch-tensorrt"]
    targets: Mapping[str, TargetEngines]
    wanted: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """The entry of the manifest."""
        targets = {target: asdict(engines) for target, engines in self.targets.items()}
        wanted = {} if targets else {"wanted": list(self.wanted)}
        return {"collectives": self.collectives, "frontend": self.frontend, "targets": targets, **wanted}


def step_entries(config: Config, steps: Sequence[StepGraphs]) -> list[dict[str, Any]]:
    """The manifest's entries of the kinds of step."""
    sizes = zip(config.video.step_frames, layouts_from_config(config), steps, strict=True)
    return [{"frames": frames, "layout": _layout_entry(layout), **asdict(step)} for frames, layout, step in sizes]


def _layout_entry(layout: Layout) -> dict[str, Any]:
    return {
        "local_tokens": layout.local_tokens,
        "scatter_rows": layout.scatter_rows,
        "gather_rows": layout.gather_rows,
        "shards": [[s.num_heads, s.first_head, s.split, s.query_rows] for s in layout.shards],
    }


def parse_steps(plain: Any, config: Config) -> tuple[StepGraphs, ...]:
    """Read the manifest's entries of the kinds of step.

    Raises:
        TypeError: a part is missing or of a wrong type, or this version would plan another layout for the config.
    """
    steps: tuple[StepGraphs, ...] = from_plain(tuple[StepGraphs, ...], plain, "steps")
    wanted = len(config.video.step_frames)
    if len(steps) != wanted:
        raise TypeError(f"steps must have {wanted} entries, one for each kind of step, got {len(steps)}")
    for number, (found, planned) in enumerate(zip(plain, step_entries(config, steps), strict=True)):
        for key in ("frames", "layout"):
            if found.get(key) != planned[key]:
                raise TypeError(f"steps[{number}] has {key} {found.get(key)}, this version plans {planned[key]}")
    return steps


def parse_engines(plain: Any, steps: Sequence[StepGraphs]) -> dict[str, FlavourEngines]:
    """Read the manifest's engines by flavour; `steps` are the graphs that they were built from.

    Raises:
        TypeError: a part is missing, of a wrong type, or does not fit the rest.
    """
    found: dict[str, FlavourEngines] = from_plain(Mapping[str, FlavourEngines], plain, "engines")
    for flavour, record in found.items():
        at = f"engines.{flavour}"
        if flavour not in FLAVOURS:
            raise TypeError(f"{at}: no such flavour; this version has {', '.join(FLAVOURS)}")
        if record.collectives == "runtime" and record.frontend != "onnx":
            raise TypeError(f"{at}: {record.frontend} leaves no graphs for collectives at runtime")
        wrong = [target for target in (*record.targets, *record.wanted) if not re.fullmatch(r"sm\d{2,3}", target)]
        if wrong or bool(record.targets) == ("wanted" in plain[flavour]):
            raise TypeError(
                f"{at}.targets must be architectures as sm80, got {wrong or list(record.targets) or 'none'}"
            )
        _check_parts(record, steps, at)
    return found


def _check_parts(record: FlavourEngines, steps: Sequence[StepGraphs], at: str) -> None:
    """Check that each step has an engine for each of its parts."""
    counts = [len(step.tensorrt) if record.frontend == "onnx" else 1 for step in steps]
    for target, engines in record.targets.items():
        if (found := [len(files) for files in engines.steps]) != counts:
            raise TypeError(f"{at}.targets.{target}.steps has {found} engines for {counts} parts of the steps")
    if not all(counts):
        raise TypeError(f"{at}: steps have no graphs to build engines of")
    cut = any(part.sent or part.writes for step in steps for part in step.tensorrt)
    if record.collectives == "engine" and (any(count != 1 for count in counts) or cut):
        raise TypeError(f"{at}: each step is one engine, and its graphs were cut into several parts")


def files_of(engines: Mapping[str, FlavourEngines]) -> Iterator[str]:
    """Every file that belongs to engines."""
    for flavour in engines.values():
        for target in flavour.targets.values():
            yield from (*target.engine_files, *target.vae, target.networks)


def _check_names(names: Mapping[str, str], what: str) -> None:
    if len(set(names.values())) != len(names):
        raise TypeError(f"{what} gives one name to two tensors")
