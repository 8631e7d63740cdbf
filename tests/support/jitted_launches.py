"""Kernels through Triton's own launcher, a stand-in in the place of its driver: what torch would run. Its test starts it.

A JSON line for each launch: grid, stream, bytes of shared memory, and whether the instructions are those of the PTX that is
compiled ahead of time. A process of its own, since a driver is one for all kernels of a process.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from causalrt.plugins import qk_norm_rope_launch
from causalrt.plugins.ptx import compile_kernel
from causalrt.plugins.rope_attention_launch import plan, tiles_for
from causalrt.plugins.shard_blocks import blocks_from_shares
from support.rope_attention_cases import make_layout

STREAM = 77
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "i64": torch.int64, "i32": torch.int32}


class Driver:
    """What Triton asks of a driver; launches are kept."""

    def __init__(self, target):
        self.target, self.launches = target, []
        self.utils = SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: ("module", "function", 100, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, source, metadata):
        def launch(grid_x, grid_y, grid_z, stream, function, *rest):
            self.launches.append({"grid": [grid_x, grid_y, grid_z], "stream": stream, "shared_bytes": metadata.shared})

        return launch

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)


def planned(target, world_size):
    """(name, launch) at 1.3B."""
    dtype, local_tokens = torch.bfloat16, 4680 // world_size
    rows = {"num_rows": local_tokens, "num_heads": 12, "head_dim": 128, "num_places": 2, "dtype": dtype}
    yield "qk_norm_rope", qk_norm_rope_launch.plan(**rows, eps=1e-6, row_strides=(1536,) * 3)
    layout = make_layout("balanced", 12, world_size, 4680)
    blocks = blocks_from_shares(
        (world_size, layout.scatter_rows, 128),
        num_tokens=4680,
        num_heads=[shard.num_heads for shard in layout.shards],
        splits=[shard.split for shard in layout.shards],
    )
    for whole, rotate, kv_splits in ((True, False, 1), (False, True, 3)):
        made = plan(
            blocks,
            dtype=dtype,
            slot_rows=32760,
            whole_slots=whole,
            rotate=rotate,
            num_multiprocessors=1,
            tiles=tiles_for(target, dtype=dtype, head_dim=128, rotate=rotate),
            kv_splits=kv_splits,
        )
        yield f"rope_attention, whole {whole}, rotate {rotate}", made.attend
        if made.combine is not None:
            yield "combine_splits", made.combine


def instructions(ptx, target, folder):
    """As Triton's assembler makes them; names and debug sections left out."""
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    name = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    ptxas = Path(get_ptxas(target).path)
    subprocess.run([ptxas, f"--gpu-name={name}", source, "-o", cubin], check=True)
    code = subprocess.run([ptxas.with_name("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*;)", code, re.MULTILINE)


def main(target, world_size, folder):
    active = Driver(target)
    driver.set_active(active)
    for name, launch in planned(target, world_size):
        tensors = {name: torch.empty(64, dtype=TYPES[kind[1:]]) for name, kind in launch.signature.items()}
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        jitted = launch.kernel[launch.grid](**tensors, **launch.constexprs, **options)
        ahead = compile_kernel(launch, target=target, cache=folder)
        ours, embedded = (instructions(ptx, target, folder) for ptx in (jitted.asm["ptx"], ahead.ptx))
        (found,) = active.launches
        active.launches.clear()
        found |= {"name": name, "instructions": len(ours), "same": ours == embedded}
        found |= {"planned": {"grid": list(launch.grid), "shared_bytes": ahead.shared_bytes, "stream": STREAM}}
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
