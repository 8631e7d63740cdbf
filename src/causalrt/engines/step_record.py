"""What a manifest says of the step graphs and of TensorRT's engines, as types, checked once when a bundle is opened.

steps[i]    {frames, layout, segments, tensorrt} of each kind of step, numbered as in `video.step_frames`:
            segments are ONNX Runtime's parts of the step, and tensorrt are the parts that TensorRT's engines are built from,
            both in order; torch-tensorrt leaves none
engines     {flavour: {collectives, frontend, targets: {target: {version, prompt, time, steps, vae, networks, names}}}}
            or, until a GPU has finished the bundle, {flavour: {collectives, frontend, targets: {}, wanted: [target]}};
            steps[i] lists the engines of step i in order
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from causalrt.engines.tensorrt_flavour import FLAVOURS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPart:
    """A part of the step, and what follows it.

    Attributes:
        file: its graph.
        sent: the output to exchange when it has run, or None if no exchange follows.
        received: the name under which later parts read what the exchange brought.
        writes: outputs that go to staging, and the name under which later parts read the slots that hold them.
    """

    file: str
    sent: str | None = None
    received: str | None = None
    writes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGraphs:
    """The graphs of one kind of step; either tuple is empty in a bundle that was not built for those who run it.

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
        names: by file, our name of each tensor that the engine calls something else.
    """

    version: str
    prompt: str
    time: str
    steps: tuple[tuple[str, ...], ...]
    vae: tuple[str, ...] = ()
    networks: str
    names: Mapping[str, Mapping[str, str]]

    @property
    def engine_files(self) -> tuple[str, ...]:
        """The engines of the transformer."""
        return (self.prompt, self.time, *(file for files in self.steps for file in files))


@dataclass(frozen=True, kw_only=True, slots=True)
class FlavourEngines:
    """Engines of one flavour, or what they are to be built for.

    Attributes:
        collectives: who exchanges between ranks, `engine` or `runtime`.
        frontend: what handed the step to TensorRT, `onnx` or `torch-tensorrt`.
        targets: engines by architecture, as `sm80`; none if they are not built yet.
        wanted: the architectures that engines are still to be built for; if none is named, any GPU will do.
    """

    collectives: str
    frontend: str
    targets: Mapping[str, TargetEngines]
    wanted: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """What the manifest says of them."""
        targets = {target: asdict(engines) for target, engines in self.targets.items()}
        wanted = {} if targets else {"wanted": list(self.wanted)}
        return {"collectives": self.collectives, "frontend": self.frontend, "targets": targets, **wanted}


def parse_steps(plain: Any, count: int) -> tuple[StepGraphs, ...]:
    """The graphs of each kind of step, of which there must be `count`.

    Raises:
        TypeError: something is missing or of a wrong type.
    """
    steps = expect(list, plain, "steps")
    if len(steps) != count:
        raise TypeError(f"steps must have {count} entries, one for each kind of step, got {len(steps)}")
    return tuple(
        StepGraphs(
            segments=_parse_parts(expect(dict, entry, f"steps[{number}]").get("segments"), f"steps[{number}].segments"),
            tensorrt=_parse_parts(entry.get("tensorrt"), f"steps[{number}].tensorrt"),
        )
        for number, entry in enumerate(steps)
    )


def _parse_parts(plain: Any, where: str) -> tuple[StepPart, ...]:
    parts = []
    for number, entry in enumerate(expect(list, plain, where)):
        at = f"{where}[{number}]"
        expect(dict, entry, at)
        sent, received = (entry.get(key) for key in ("sent", "received"))
        if (sent is None) != (received is None) or not all(isinstance(v, str | None) for v in (sent, received)):
            raise TypeError(f"{at}: sent and received must both be names, or both null")
        writes = _names(entry.get("writes", {}), f"{at}.writes")
        parts.append(
            StepPart(file=expect(str, entry.get("file"), f"{at}.file"), sent=sent, received=received, writes=writes)
        )
    return tuple(parts)


def parse_engines(plain: Any, steps: tuple[StepGraphs, ...]) -> dict[str, FlavourEngines]:
    """Engines by flavour; `steps` are the graphs that they were built from.

    Raises:
        TypeError: something is missing, of a wrong type, or does not fit the rest.
    """
    found = {}
    for flavour, entry in expect(dict, plain, "engines").items():
        at = f"engines.{flavour}"
        if flavour not in FLAVOURS:
            raise TypeError(f"{at}: no such flavour; this version has {', '.join(FLAVOURS)}")
        collectives, frontend = (expect(dict, entry, at).get(key) for key in ("collectives", "frontend"))
        if collectives not in ("engine", "runtime") or frontend not in ("onnx", "torch-tensorrt"):
            raise TypeError(f"{at}: collectives {collectives!r} or frontend {frontend!r} is not known")
        if collectives == "runtime" and frontend != "onnx":
            raise TypeError(f"{at}: {frontend} leaves no graphs for collectives at runtime")
        counts = [len(step.tensorrt) if frontend == "onnx" else 1 for step in steps]
        targets = {
            target: _parse_target(files, f"{at}.targets.{target}", counts)
            for target, files in expect(dict, entry.get("targets"), f"{at}.targets").items()
        }
        wanted = _texts(entry.get("wanted", []), f"{at}.wanted")
        wrong = [target for target in (*targets, *wanted) if not re.fullmatch(r"sm\d{2,3}", target)]
        if wrong or bool(targets) == ("wanted" in entry):
            raise TypeError(f"{at}.targets must be architectures as sm80, got {wrong or list(targets) or 'none'}")
        if not all(counts):
            raise TypeError(f"{at}: steps have no graphs to build engines of")
        cut = any(part.sent or part.writes for step in steps for part in step.tensorrt)
        if collectives == "engine" and (any(count != 1 for count in counts) or cut):
            raise TypeError(f"{at}: each step is one engine, and its graphs were cut into several parts")
        found[flavour] = FlavourEngines(collectives=collectives, frontend=frontend, targets=targets, wanted=wanted)
    return found


def _parse_target(plain: Any, at: str, counts: list[int]) -> TargetEngines:
    expect(dict, plain, at)
    texts = {key: expect(str, plain.get(key), f"{at}.{key}") for key in ("version", "prompt", "time", "networks")}
    steps = tuple(_texts(names, f"{at}.steps") for names in expect(list, plain.get("steps"), f"{at}.steps"))
    if (found := [len(files) for files in steps]) != counts:
        raise TypeError(f"{at}.steps has {found} engines for {counts} parts of the steps")
    vae = _texts(plain.get("vae", []), f"{at}.vae")
    if len(vae) not in (0, 2):
        raise TypeError(f"{at}.vae has {len(vae)} engines, wanted 2 or none")
    names = {
        file: _names(mapping, f"{at}.names.{file}")
        for file, mapping in expect(dict, plain.get("names", {}), f"{at}.names").items()
    }
    return TargetEngines(**texts, steps=steps, vae=vae, names=names)


def files_of(engines: Mapping[str, FlavourEngines]) -> Iterator[str]:
    """Every file that belongs to engines."""
    for flavour in engines.values():
        for target in flavour.targets.values():
            yield from (*target.engine_files, *target.vae, target.networks)


def _texts(plain: Any, at: str) -> tuple[str, ...]:
    return tuple(expect(str, text, at) for text in expect(list, plain, at))


def _names(plain: Any, at: str) -> dict[str, str]:
    """A mapping between names, no two of which are given the same one."""
    mapping = {key: expect(str, value, at) for key, value in expect(dict, plain, at).items()}
    if len(set(mapping.values())) != len(mapping):
        raise TypeError(f"{at} gives one name to two tensors")
    return mapping


def expect(kind: type[T], value: Any, at: str) -> T:
    """`value`, if it is of just this type (a truth value is no number).

    Raises:
        TypeError: it is not; `at` says where.
    """
    if type(value) is not kind:
        raise TypeError(f"{at} must be a {kind.__name__}, got {value!r:.80}")
    return value
