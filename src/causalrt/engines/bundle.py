"""The bundle: the folder that a build writes and the runtime loads.

    manifest.json         schema, config, fused_ops, vae, steps, engines, toolchain, and every other file with bytes and sha256
    weights.safetensors   all weights, once, in the build's precision
    vae.safetensors       those of the VAE, if the bundle has one
    *.onnx                graphs; their weights are references into weights.safetensors
    *.engine              TensorRT engines by flavour and target, the same for every rank; *-networks.json says what is in them

A bundle may lack engines that only the GPU that runs them can build. It is then unfinished for that executor, and other
executors run it. No file holds a path, so a bundle may be copied between machines.

A bundle is written to a temporary folder beside the target, which is then renamed, so that readers never see an incomplete one.
Its files may be links to regular files anywhere, as in the cache of the Hugging Face hub; what they point to is hashed.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from causalrt.atomic_files import atomic_folder
from causalrt.config import Config, config_from_dict
from causalrt.engines.kinds import EXECUTORS, executor_kind
from causalrt.engines.step_record import FlavourEngines, StepGraphs, files_of, parse_engines, parse_steps, step_entries
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.engines.toolchain import toolchain_versions
from causalrt.errors import BuildError, BundleError, CheckpointError, ConfigError
from causalrt.layout import Layout, layout_from_config
from causalrt.model.codecs.protocol import CodecConfig
from causalrt.model.codecs.registry import vae_config_from_mapping
from causalrt.plain import from_plain
from causalrt.regular_files import regular_file

SCHEMA = 5
MAX_NAME = 200
"""Most characters of a file name in a bundle; no build writes longer ones, and some file systems refuse them."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
PROMPT_GRAPH, TIME_GRAPH = "prompt.onnx", "time.onnx"
FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS = "vae-first.onnx", "vae-next.onnx", "vae.safetensors"
REBUILD = "build the bundle again with `causalrt build`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle whose manifest has been checked.

    Attributes:
        path: its folder.
        config: what it was built from.
        layout: layout of step 0, derived from `config`.
        fused_ops: whether self-attention consists of the fused ops.
        vae: sizes of the VAE (or the constants of a cosine transform), or None if the bundle was built without one.
        executors: names of the executors that can run it.
        steps: graphs of each kind of step, numbered as in `config.video.step_frames`.
        engines: TensorRT's engines by flavour, including those that are still to be built (`unfinished`).
        digest: sha256 of the manifest, which lists every file with its sha256; bundles with equal digests are the same.
        hashes: sha256 of every file.
        sizes: bytes of every file.
        modified_ns: when each file was last written, as found when the bundle was opened; None for one that is missing.
        toolchain: package versions at build time.
    """

    path: Path
    config: Config
    layout: Layout
    fused_ops: bool
    vae: CodecConfig | None
    executors: tuple[str, ...]
    steps: tuple[StepGraphs, ...]
    engines: Mapping[str, FlavourEngines]
    digest: str
    hashes: Mapping[str, str]
    sizes: Mapping[str, int]
    modified_ns: Mapping[str, int | None] = field(compare=False)
    toolchain: Mapping[str, str]

    @property
    def unfinished(self) -> tuple[str, ...]:
        """TensorRT flavours whose engines are still to be built, on a GPU."""
        return tuple(name for name, record in self.engines.items() if not record.targets)

    def why_not(self, executor: str) -> str | None:
        """Return why `executor` cannot run the bundle, and what to do about it; None if it can."""
        if not executor_kind(executor).compiled or executor in self.executors:
            return None
        if executor in self.unfinished:
            return f"the {executor} engines of {self.path} are not built; {how_to_finish(self.path)}"
        return f"{self.path} was built for {', '.join(self.executors)}; build again with `--executor {executor}`"


def how_to_finish(path: Path) -> str:
    """Advice for a bundle that lacks engines."""
    return f"finish the bundle on the GPU that will run it with `causalrt build --finish {shlex.quote(str(path))}`"


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of the bytes of a tensor on the CPU, in hex."""
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def record_digest(record: Mapping[str, Any]) -> str:
    """sha256, in hex, of a record as JSON, without its `digest` entry."""
    plain = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_bundle(target: Path, *, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `target` if the block succeeds, and remove it otherwise.

    Raises:
        BuildError: the target exists, the place cannot be written, or the disk is or becomes full.
    """
    target = target.absolute()
    if target.exists() and not overwrite:
        raise BuildError(f"{target} exists already; choose another folder or pass --overwrite")
    if target.exists() and not (target / MANIFEST).is_file():
        raise BuildError(f"{target} exists and is no bundle; it is not overwritten, choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes:
            raise BuildError(
                f"no disk space: the bundle needs {needed_bytes:,} bytes and {target.parent} has {free:,} free; "
                "free some or choose another folder"
            )
        with atomic_folder(target, replaces=MANIFEST if overwrite else None) as work:
            yield work
    except OSError as error:
        raise BuildError(
            f"cannot write a bundle to {target}, what was there is as it was: {error}; make room, or choose a writable folder"
        ) from error


def _bundle_from_manifest(path: Path, manifest: Mapping[str, Any]) -> Bundle:
    """Check what the digest cannot show: types, layouts that this version would not plan, and files that no hash covers.

    Raises:
        CheckpointError, ConfigError, KeyError, TypeError: the manifest is not one that a build writes.
    """
    config = config_from_dict(manifest["config"])
    _check_types(manifest)
    if config.video.time_index == "relative" and not manifest["fused_ops"]:
        raise TypeError("fused_ops is false, but video.time_index=relative needs the fused ops")
    steps = parse_steps(manifest["steps"], config)
    vae = None if manifest["vae"] is None else vae_config_from_mapping(manifest["vae"])
    if vae is not None and vae.z_dim != config.model.latent_channels:
        raise TypeError(
            f"the VAE has {vae.z_dim} channels, and model.latent_channels is {config.model.latent_channels}"
        )
    engines = parse_engines(manifest["engines"], steps)
    _check_executors(manifest["executors"], steps, engines)
    _check_files(manifest["files"], steps, engines, has_vae=vae is not None)
    return Bundle(
        path=path,
        config=config,
        layout=layout_from_config(config),
        fused_ops=manifest["fused_ops"],
        vae=vae,
        executors=tuple(manifest["executors"]),
        steps=steps,
        engines=engines,
        digest=manifest["digest"],
        hashes={name: entry["sha256"] for name, entry in manifest["files"].items()},
        sizes={name: entry["bytes"] for name, entry in manifest["files"].items()},
        modified_ns={name: _modified_ns(path / name) for name in manifest["files"]},
        toolchain=manifest["toolchain"],
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileEntry:
    bytes: int
    sha256: str


def _check_types(manifest: Mapping[str, Any]) -> None:
    from_plain(Mapping[str, _FileEntry], manifest["files"], "files")
    from_plain(Mapping[str, str], manifest["toolchain"], "toolchain")
    from_plain(tuple[str, ...], manifest["executors"], "executors")
    from_plain(bool, manifest["fused_ops"], "fused_ops")
    executors = manifest["executors"]
    if "eager" not in executors or not all(name in EXECUTORS for name in executors):
        raise TypeError(f"executors must be names that this version has, eager among them, got {executors!r}")


def _check_executors(
    executors: Sequence[str], steps: Sequence[StepGraphs], engines: Mapping[str, FlavourEngines]
) -> None:
    built = {name for name, record in engines.items() if record.targets}
    runs_segments = any(EXECUTORS[name].graphs == "segments" for name in executors)
    if built != FLAVOURS.keys() & set(executors) or any(bool(step.segments) != runs_segments for step in steps):
        raise TypeError(f"executors {executors} do not fit the graphs and engines")


def _check_files(
    files: Mapping[str, Any], steps: Sequence[StepGraphs], engines: Mapping[str, FlavourEngines], *, has_vae: bool
) -> None:
    """Check that all files that the bundle's executors need are listed, and that no engine is empty."""
    if any(bool(target.vae) != has_vae for record in engines.values() for target in record.targets.values()):
        raise TypeError("a VAE has two engines for each target, and there are none without it")
    segments = [part.file for step in steps for part in step.segments]
    needed = [WEIGHTS, *segments, *(part.file for step in steps for part in step.tensorrt), *files_of(engines)]
    if segments or not all(record.targets for record in engines.values()):
        needed += [PROMPT_GRAPH, TIME_GRAPH]
    if has_vae:
        needed += [VAE_WEIGHTS, *((FIRST_GRAPH, NEXT_GRAPH) if segments or engines else ())]
    empty = [name for name in files_of(engines) if files.get(name, {}).get("bytes") == 0]
    if empty:
        raise TypeError(f"engines without a byte: {', '.join(empty)}")
    unlisted = [name for name in needed if name not in files]
    if unlisted:
        raise TypeError(f"it does not list files that its executors need: {', '.join(map(repr, unlisted))}")


def write_manifest(
    folder: Path,
    *,
    config: Config,
    fused_ops: bool,
    executors: tuple[str, ...],
    steps: Sequence[StepGraphs],
    engines: Mapping[str, Any],
    vae: CodecConfig | None = None,
    toolchain: Mapping[str, str] | None = None,
) -> None:
    """Hash every file in `folder` and write the manifest, as the last step of a build.

    `toolchain` defaults to the installed versions.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "config": config.as_dict(),
        "fused_ops": fused_ops,
        "vae": None if vae is None else vae.to_mapping(),
        "executors": list(executors),
        "steps": step_entries(config, steps),
        "engines": dict(engines),
        "toolchain": toolchain_versions() if toolchain is None else dict(toolchain),
        "files": files,
    }
    manifest["digest"] = record_digest(manifest)
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Read and check a bundle; read it again if it is replaced meanwhile.

    Args:
        path: the bundle's folder.
        verify: hash every file. Ranks skip this, since their parent has done it.

    Raises:
        BundleError: not a bundle, of another schema, incomplete, truncated, or changed since it was built.
    """
    path = Path(path).absolute()
    while True:
        bundle = _read_manifest(path)
        problems = _file_problems(bundle, verify=verify)
        now = _read_manifest(path)
        if (now.digest, now.modified_ns) != (bundle.digest, bundle.modified_ns):
            continue  # it was replaced while it was read, by a build or a copy
        if problems:
            raise BundleError(f"{path} is damaged; {REBUILD}, or copy it again:\n  " + "\n  ".join(problems))
        return bundle


def reopen_bundle(path: Path, digest: str) -> Bundle:
    """Open a bundle that another process has verified, and check that its manifest still has this digest.

    Raises:
        BundleError: the bundle is gone, or another one is in its place.
    """
    bundle = open_bundle(path, verify=False)
    if bundle.digest != digest:
        raise BundleError(_replaced(path))
    return bundle


@contextlib.contextmanager
def unchanged(bundle: Bundle) -> Iterator[None]:
    """Make sure that whatever the block and its child processes opened belongs to `bundle`.

    Raises:
        BundleError: the bundle was replaced, or one of its files written, since it was opened. Raised at the end of the block,
            also in place of an error that the block ended with, since a replacement can cause errors of any kind.
    """
    try:
        yield
    except Exception:
        _check_unchanged(bundle)
        raise
    _check_unchanged(bundle)


def _check_unchanged(bundle: Bundle) -> None:
    try:
        now = _read_manifest(bundle.path)
    except BundleError as error:
        raise BundleError(_replaced(bundle.path)) from error
    if (now.digest, now.modified_ns) != (bundle.digest, bundle.modified_ns):
        raise BundleError(_replaced(bundle.path))


def _replaced(path: Path) -> str:
    return f"{path} was replaced or changed while it was being read; try again when it is complete"


def _modified_ns(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None


def _read_manifest(path: Path) -> Bundle:
    """Read the manifest alone."""
    try:
        text = regular_file(path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST}; make one with `causalrt build`") from None
    except OSError as error:
        raise BundleError(f"{path / MANIFEST} cannot be read: {error}; {REBUILD}") from error
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} cannot be read ({error}); {REBUILD}") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise BundleError(f"{path} has manifest schema {schema!r}, this version reads {SCHEMA}; {REBUILD}")
    if manifest.get("digest") != record_digest(manifest):
        raise BundleError(f"{path / MANIFEST} was changed after the build; {REBUILD}")
    try:
        return _bundle_from_manifest(path, manifest)
    except (CheckpointError, ConfigError, KeyError, TypeError) as error:
        raise BundleError(f"{path / MANIFEST} is not valid: {error}; {REBUILD}") from error


def _file_problems(bundle: Bundle, *, verify: bool) -> list[str]:
    problems = []
    for name, size in bundle.sizes.items():
        if name in ("", "..") or len(name) > MAX_NAME or Path(name).name != name:
            problems.append(f"{name}: not a plain file name")
            continue
        try:
            file = regular_file(bundle.path / name)
            found = file.stat().st_size
            if found != size:
                problems.append(f"{name}: {found:,} bytes, expected {size:,}")
            elif verify and file_digest(file) != bundle.hashes[name]:
                problems.append(f"{name}: contents changed since the build (sha256 differs)")
        except FileNotFoundError:
            problems.append(f"{name}: missing, or a link to nothing")
        except OSError as error:
            problems.append(f"{name}: cannot be read: {error}")
    return problems
