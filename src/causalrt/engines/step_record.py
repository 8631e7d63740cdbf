"""What a manifest says of the step's parts and of TensorRT's engines, as types, checked once when a bundle is opened.

graphs.segments    onnxruntime's parts of the step, in order
graphs.tensorrt    the parts that TensorRT's engines were built from, in order (torch-tensorrt leaves none)
engines            {flavour: {collectives, frontend, targets: {target: {version, prompt, time, step, vae, networks, names}}}}
                   or, until a GPU has finished the bundle, {flavour: {collectives, frontend, targets: {}, wanted: [target]}}

A lone first frame has parts and engines of its own: graphs.lone_segments, graphs.lone_tensorrt, lone_step beside step.
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
class TargetEngines:
    """Engines for one GPU architecture.

    Attributes:
        version: of TensorRT that built them.
        prompt: file of the prompt's engine.
        time: file of the time's engine.
        step: files of the step's engines, in order.
        lone_step: those of a lone first frame's step; none where there is no such frame.
        vae: files of the VAE's two engines, for the first latent and for the next ones; none without a VAE.
        networks: file that says what is in them.
        names: by file, our name of each tensor that the engine calls something else.
    """

    version: str
    prompt: str
    time: str
    step: tuple[str, ...]
    lone_step: tuple[str, ...] = ()
    vae: tuple[str, ...] = ()
    networks: str
    names: Mapping[str, Mapping[str, str]]

    @property
    def engine_files(self) -> tuple[str, ...]:
        """The engines of the transformer."""
        return (self.prompt, self.time, *self.step, *self.lone_step)


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


def parse_parts(plain: Any, where: str) -> tuple[StepPart, ...]:
    """The parts of a step.

    Raises:
        TypeError: something is missing or of a wrong type.
    """
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


def parse_engines(
    plain: Any, parts: tuple[StepPart, ...], lone_parts: tuple[StepPart, ...] = (), *, lone: bool = False
) -> dict[str, FlavourEngines]:
    """Engines by flavour; `parts` and `lone_parts` are those of the graphs they were built from.

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
        counts = (len(parts), len(lone_parts)) if frontend == "onnx" else (1, int(lone))
        targets = {
            target: _parse_target(files, f"{at}.targets.{target}", counts, lone=lone)
            for target, files in expect(dict, entry.get("targets"), f"{at}.targets").items()
        }
        wanted = tuple(
            expect(str, target, f"{at}.wanted") for target in expect(list, entry.get("wanted", []), f"{at}.wanted")
        )
        wrong = [target for target in (*targets, *wanted) if not re.fullmatch(r"sm\d{2,3}", target)]
        if wrong or bool(targets) == ("wanted" in entry):
            raise TypeError(f"{at}.targets must be architectures as sm80, got {wrong or list(targets) or 'none'}")
        if not targets and (not counts[0] or bool(counts[1]) != lone):
            raise TypeError(f"{at}: graphs.tensorrt has no parts of the step to build engines of")
        cut = any(part.sent or part.writes for part in (*parts, *lone_parts))
        if collectives == "engine" and (counts != (1, int(lone)) or cut):
            raise TypeError(f"{at}: the whole step is one engine, and graphs.tensorrt says otherwise")
        found[flavour] = FlavourEngines(collectives=collectives, frontend=frontend, targets=targets, wanted=wanted)
    return found


def _parse_target(plain: Any, at: str, counts: tuple[int, int], *, lone: bool) -> TargetEngines:
    expect(dict, plain, at)
    texts = {key: expect(str, plain.get(key), f"{at}.{key}") for key in ("version", "prompt", "time", "networks")}
    steps = {}
    for key, count, wanted in (("step", counts[0], True), ("lone_step", counts[1], lone)):
        names_of_step = expect(list, plain.get(key, []), f"{at}.{key}")
        steps[key] = tuple(expect(str, name, f"{at}.{key}") for name in names_of_step)
        if len(steps[key]) != count or bool(count) != wanted:
            raise TypeError(f"{at}.{key} has {len(steps[key])} engines for {count} parts of the step")
    vae = tuple(expect(str, name, f"{at}.vae") for name in expect(list, plain.get("vae", []), f"{at}.vae"))
    if len(vae) not in (0, 2):
        raise TypeError(f"{at}.vae has {len(vae)} engines, wanted 2 or none")
    names = {
        file: _names(mapping, f"{at}.names.{file}")
        for file, mapping in expect(dict, plain.get("names", {}), f"{at}.names").items()
    }
    return TargetEngines(**texts, step=steps["step"], lone_step=steps["lone_step"], vae=vae, names=names)


def files_of(engines: Mapping[str, FlavourEngines], parts: tuple[StepPart, ...]) -> Iterator[str]:
    """Every file that engines and their parts name."""
    yield from (part.file for part in parts)
    for flavour in engines.values():
        for target in flavour.targets.values():
            yield from (*target.engine_files, *target.vae, target.networks)


def _names(plain: Any, at: str) -> dict[str, str]:
    """A mapping between names that can be turned round."""
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
