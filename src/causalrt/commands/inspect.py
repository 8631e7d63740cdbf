"""`causalrt inspect`: verify a bundle and show its contents."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from causalrt.commands.output import EXIT_FAILED, mebibytes, say
from causalrt.errors import ConfigError
from causalrt.options import INPUT, Json
from causalrt.terminal import PrintableConsole
from causalrt.tools.progress_bars import shown_progress

if TYPE_CHECKING:
    from causalrt.tools.inspect import BundleReport
    from causalrt.tools.inspect_engines import EngineReport, StepReport
    from causalrt.tools.inspect_kernels import KernelReport

EXAMPLES = """
causalrt inspect bundle
causalrt inspect bundle --json
causalrt inspect bundle --kernels --target sm80
"""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class InspectRequest:
    """Which bundle to show.

    Attributes:
        bundle: Folder of the bundle.
        kernels: Compile the fused kernels, and show their registers, shared memory and spills.
        target: With --kernels, a GPU architecture to compile them for, for example sm80; may be repeated. By default all that
            are known.
        json: see `Json`.
    """

    bundle: Annotated[Path, Parameter(group=INPUT)] = field(kw_only=False)
    kernels: bool = False
    target: Annotated[tuple[str, ...], Parameter(metavar="ARCH")] = ()
    json: Json = False


def inspect(request: InspectRequest) -> int:
    """Verify a bundle and show its contents."""
    from causalrt.tools.inspect import inspect_bundle

    if request.target and not request.kernels:
        raise ConfigError("--target says what to compile kernels for; add --kernels")
    with shown_progress() as progress:
        found = inspect_bundle(
            request.bundle, kernels=request.target if request.kernels else None, on_progress=progress
        )
    if request.json:
        say(json.dumps(found.as_dict()))
    else:
        PrintableConsole().print(_table(found))
    return 0 if found.has_all_constants else EXIT_FAILED


def _pairs(values: Mapping[str, object], separator: str = "=") -> str:
    return ", ".join(f"{key}{separator}{value}" for key, value in values.items())


def _table(found: "BundleReport") -> Table:
    bundle = found.bundle
    table = Table(title=str(bundle.path), show_header=False, title_justify="left")
    table.add_row("executors", ", ".join(bundle.executors))
    table.add_row("fused ops", "on" if bundle.fused_ops else "off")
    vae = {} if bundle.vae is None else bundle.vae.to_mapping()
    sizes = {key: value for key, value in vae.items() if not key.startswith("latents_")}
    table.add_row("VAE", _pairs(sizes) or "none: latents only")
    table.add_row("parameters", f"{found.parameters:,}")
    for section, values in bundle.config.as_dict().items():
        table.add_row(section, _pairs(values))
    table.add_row("layout", _pairs(found.layout))
    for number, shard in enumerate(bundle.layout.shards):
        table.add_row(f"shard {number}", _pairs(asdict(shard)))
    for name, parts in found.bytes_per_rank.items():
        table.add_row(f"MiB a rank, {name}", mebibytes(parts))
    for name, parts in found.decoder_bytes.items():
        table.add_row(f"MiB, decoder, {name}", mebibytes(parts))
    if found.graphs:
        exchanges = sum(graph.exchange_after for graph in found.graphs)
        table.add_row("onnxruntime, step", f"{len(found.graphs)} segments, {exchanges} all-to-alls")
    for engines in found.engines:
        _add_engine_rows(table, engines)
    for kernel in found.kernels or ():
        table.add_row(*_kernel_row(kernel))
    table.add_row("toolchain", _pairs(bundle.toolchain, " "))
    _add_file_rows(table, found)
    return table


def _add_file_rows(table: Table, found: "BundleReport") -> None:
    from causalrt.engines.bundle import how_to_finish

    bundle, files = found.bundle, found.files
    for name in bundle.unfinished:
        wanted = bundle.engines[name].wanted
        targets = f" for {', '.join(wanted)}" if wanted else ""
        table.add_row(name, f"engines{targets}: not built; {how_to_finish(bundle.path)}")
    table.add_row("files", f"{len(files)}, {sum(files.values()) / 2**20:,.1f} MiB")


def _add_engine_rows(table: Table, engines: "EngineReport") -> None:
    name = f"{engines.flavour} {engines.target}"
    size = sum(file.bytes for file in engines.files.values())
    table.add_row(
        name,
        f"{engines.flavour} {engines.version}, {len(engines.files)} files for every rank, {size / 2**20:,.1f} MiB, by "
        f"{engines.frontend}",
    )
    for number, step in enumerate(engines.steps):
        kind = f"{step.frames}-frame step" if number else "step"
        _add_step_rows(table, f"{name}, {kind}", step, engines.collectives)
    if engines.collectives == "engine":
        step_file, entry = list(engines.files.items())[2]
        table.add_row(f"{name}, one for all ranks", f"{step_file}, sha256 {entry.sha256[:16]}...")
    table.add_row(f"MiB a rank, {name}", mebibytes(engines.bytes_per_rank))
    builder = engines.builder_memory
    table.add_row(f"MiB, {name}, by its builder", mebibytes(builder) if builder else "not in this bundle")
    inspector = engines.inspector
    table.add_row(f"{name}, inspector", inspector.get("unavailable") or f"see --json ({len(inspector)} engines)")


def _add_step_rows(table: Table, name: str, step: "StepReport", collectives: str) -> None:
    where = "inside the engine" if collectives == "engine" else "at runtime"
    exchanges = step.collectives_in_engine + step.collectives_at_runtime
    table.add_row(
        name,
        f"{step.engines} engine(s), {sum(step.layers.values()):,} layers; {step.self_attentions} self-attentions "
        f"({step.self_attentions_with_lengths} with KV lengths), {step.cross_attentions} cross-attentions, "
        f"{step.decomposable_attentions} decomposable; {step.cache_updates} KV updates in place; "
        + "".join(f"{count} {plugin} plugins; " for plugin, count in step.plugins.items())
        + f"{exchanges} all-to-alls {where}"
        + (f" of {step.ranks_of_collectives} ranks" if step.ranks_of_collectives else ""),
    )
    tables = ", ".join(
        f"{key} {'x'.join(map(str, entry['shape']))} {'equal' if entry['equal_constants'] else 'MISSING'}"
        for key, entry in step.constants.items()
    )
    table.add_row(f"{name}, constants", tables)


def _kernel_row(kernel: "KernelReport") -> tuple[str, str]:
    rotates = kernel.rotate and kernel.kernel != "combine_splits"
    name = f"{kernel.target} {kernel.kernel}{', rotating' if rotates else ''}"
    name += ", small tiles" if kernel.small_tiles else ""
    compiled = kernel.compiled
    if isinstance(compiled, str):
        return name, f"unavailable: {compiled.splitlines()[0]}"
    blocks, splits = compiled.blocks_per_multiprocessor, kernel.kv_splits
    facts = (
        f"grid {'x'.join(map(str, compiled.grid))}" + (f" with {splits} key ranges" if splits > 1 else ""),
        f"{compiled.warps} warp(s) ({compiled.threads} threads)",
        f"{compiled.registers} registers",
        f"SPILLS {compiled.spill_bytes} bytes" if compiled.spill_bytes else "no spills",
        f"{compiled.shared_bytes:,} bytes shared",
        f"{blocks} block(s) on each of {kernel.multiprocessors} multiprocessors ({kernel.gpu})"
        if blocks
        else f"DOES NOT FIT on a multiprocessor ({kernel.gpu})",
        f"PTX {compiled.ptx_version}, {compiled.ptx_bytes / 2**10:,.0f} KiB",
        "from the cache" if compiled.cached else "compiled",
    )
    return name, ", ".join(facts)
