"""`causalrt inspect`: verify a bundle and show its contents."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from causalrt.commands.output import EXIT_FAILED, mebibytes, say
from causalrt.errors import ConfigError
from causalrt.options import INPUT, Json
from causalrt.terminal import PrintableConsole
from causalrt.tools.progress_bars import shown_progress

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
    steps = [step for engines in found["engines"] for step in engines["steps"]]
    tables = [table for step in steps for table in step["constants"].values()]
    code = 0 if all(table["equal_constants"] for table in tables) else EXIT_FAILED
    if request.json:
        say(json.dumps(found))
        return code
    config, layout = found["config"], found["layout"]
    table = Table(title=found["path"], show_header=False, title_justify="left")
    table.add_row("executors", ", ".join(found["executors"]))
    table.add_row("plugins", found["plugins"])
    vae = {key: value for key, value in (found["vae"] or {}).items() if not key.startswith("latents_")}
    table.add_row("VAE", ", ".join(f"{key}={value}" for key, value in vae.items()) or "none: latents only")
    table.add_row("parameters", f"{found['parameters']:,}")
    for section, values in config.items():
        table.add_row(section, ", ".join(f"{key}={value}" for key, value in values.items()))
    table.add_row("layout", ", ".join(f"{key}={value}" for key, value in layout.items() if key != "balanced"))
    for number, shard in enumerate(layout["balanced"]):
        table.add_row(f"shard {number}", ", ".join(f"{key}={value}" for key, value in shard.items()))
    for name, parts in found["bytes_per_rank"].items():
        sizes = mebibytes(parts)
        table.add_row(f"MiB a rank, {name}", sizes)
    for name, parts in found["decoder_bytes"].items():
        sizes = mebibytes(parts)
        table.add_row(f"MiB, decoder, {name}", sizes)
    if found["graphs"]:
        exchanges = sum(graph["exchange_after"] for graph in found["graphs"])
        table.add_row("onnxruntime, step", f"{len(found['graphs'])} segments, {exchanges} all-to-alls")
    for engines in found["engines"]:
        _add_engine_rows(table, engines)
    for kernel in found.get("kernels", ()):
        table.add_row(*_kernel_row(kernel))
    table.add_row("toolchain", ", ".join(f"{key} {value}" for key, value in found["toolchain"].items()))
    for name, unfinished in found["unfinished"].items():
        targets = f" for {', '.join(unfinished['targets'])}" if unfinished["targets"] else ""
        table.add_row(name, f"engines{targets}: not built; {unfinished['to_do']}")
    table.add_row("files", f"{len(found['files'])}, {sum(found['files'].values()) / 2**20:,.1f} MiB")
    PrintableConsole().print(table)
    return code


def _add_engine_rows(table: Table, engines: dict[str, Any]) -> None:
    name = f"{engines['flavour']} {engines['target']}"
    files, sizes = engines["files"], engines["bytes_per_rank"]
    table.add_row(
        name,
        f"{engines['flavour']} {engines['version']}, {len(files)} files for every rank, "
        f"{sum(file['bytes'] for file in files.values()) / 2**20:,.1f} MiB, by {engines['frontend']}",
    )
    for number, step in enumerate(engines["steps"]):
        kind = f"{step['frames']}-frame step" if number else "step"
        _add_step_rows(table, f"{name}, {kind}", step, engines["collectives"])
    if engines["collectives"] == "engine":
        step_file, entry = list(files.items())[2]
        table.add_row(f"{name}, one for all ranks", f"{step_file}, sha256 {entry['sha256'][:16]}...")
    table.add_row(
        f"MiB a rank, {name}",
        ", ".join(f"{key.replace('_bytes', '')} {value / 2**20:,.1f}" for key, value in sizes.items()),
    )
    builder = engines["builder_memory"]
    table.add_row(
        f"MiB, {name}, by its builder",
        ", ".join(f"{key.removesuffix('_bytes')} {value / 2**20:,.1f}" for key, value in builder.items())
        if builder
        else "not in this bundle",
    )
    inspector = engines["inspector"]
    table.add_row(f"{name}, inspector", inspector.get("unavailable") or f"see --json ({len(inspector)} engines)")


def _add_step_rows(table: Table, name: str, step: dict[str, Any], collectives: str) -> None:
    where = "inside the engine" if collectives == "engine" else "at runtime"
    exchanges = step["collectives_in_engine"] + step["collectives_at_runtime"]
    table.add_row(
        name,
        f"{step['engines']} engine(s), {sum(step['layers'].values()):,} layers; {step['self_attentions']} self-attentions "
        f"({step['self_attentions_with_lengths']} with KV lengths), {step['cross_attentions']} cross-attentions, "
        f"{step['decomposable_attentions']} decomposable; {step['cache_updates']} KV updates in place; "
        + "".join(f"{count} {plugin} plugins; " for plugin, count in step["plugins"].items())
        + f"{exchanges} all-to-alls {where}"
        + (f" of {step['ranks_of_collectives']} ranks" if step["ranks_of_collectives"] else ""),
    )
    tables = ", ".join(
        f"{key} {'x'.join(map(str, entry['shape']))} {'equal' if entry['equal_constants'] else 'MISSING'}"
        for key, entry in step["constants"].items()
    )
    table.add_row(f"{name}, constants", tables)


def _kernel_row(kernel: dict[str, Any]) -> tuple[str, str]:
    name = f"{kernel['target']} {kernel['kernel']}" + (
        ", rotating" if kernel["rotate"] and kernel["kernel"] != "combine_splits" else ""
    )
    name += ", small tiles" if kernel["small_tiles"] else ""
    if "unavailable" in kernel:
        return name, f"unavailable: {kernel['unavailable'].splitlines()[0]}"
    blocks, splits = kernel["blocks_per_multiprocessor"], kernel["kv_splits"]
    facts = (
        f"grid {'x'.join(map(str, kernel['grid']))}" + (f" with {splits} key ranges" if splits > 1 else ""),
        f"{kernel['warps']} warp(s) ({kernel['threads']} threads)",
        f"{kernel['registers']} registers",
        f"SPILLS {kernel['spill_bytes']} bytes" if kernel["spill_bytes"] else "no spills",
        f"{kernel['shared_bytes']:,} bytes shared",
        f"{blocks} block(s) on each of {kernel['multiprocessors']} multiprocessors ({kernel['gpu']})"
        if blocks
        else f"DOES NOT FIT on a multiprocessor ({kernel['gpu']})",
        f"PTX {kernel['ptx_version']}, {kernel['ptx_bytes'] / 2**10:,.0f} KiB",
        "from the cache" if kernel["cached"] else "compiled",
    )
    return name, ", ".join(facts)
