"""Time and peak memory of the streaming VAE at full size, with random weights: decoding in eager, and the engine build.

    nice -n 19 python benchmarks/vae.py decode
    nice -n 19 python benchmarks/vae.py decode --chunks 2 --dtype bfloat16
    nice -n 19 python benchmarks/vae.py build --dtype bfloat16 --target sm80

The peak is VmHWM of this process over the measured part; the baseline is what is resident before it, weights included.
CPU seconds are those of all threads, and say more where the cores are shared.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.export.engine_worker import build_engine
from causalrt.export.random_encoders import random_vae
from causalrt.export.vae import vae_engine_requests, write_vae
from causalrt.model.codecs.registry import cache_bytes
from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.model.codecs.wan_vae import StreamingDecoder


def status_bytes(field: str) -> int:
    """A memory figure of this process from /proc/self/status, such as VmHWM or VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def measured_decode(vae: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Time and measure the decoding of some chunks; the first has fewer frames."""
    sizes = {"latent_height": args.latent_height, "latent_width": args.latent_width}
    chunks = torch.randn(args.chunks, 3, 16, args.latent_height, args.latent_width)
    decoder = StreamingDecoder(vae)
    state = decoder.open()
    baseline_bytes = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the resident memory
    seconds, cpu_seconds, frames = [], [], []
    for latents in chunks:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        frames.append(state.decode(latents).shape[0])
        seconds.append(round(time.perf_counter() - start_s, 1))
        cpu_seconds.append(round(time.process_time() - start_cpu_s, 1))
    return {
        "frames": frames,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "baseline_mib": baseline_bytes >> 20,
        "peak_mib": status_bytes("VmHWM") >> 20,
        "cache_mib": cache_bytes(decoder.config, **sizes, dtype=vae.dtype) >> 20,
    }


def measured_build(vae: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Time writing the graphs and building their engines."""
    seconds: dict[str, float] = {}
    sizes: dict[str, int] = {}
    Path("/proc/self/clear_refs").write_text("5")
    with tempfile.TemporaryDirectory(prefix="causalrt-bench-", dir=args.scratch) as name:
        folder = args.out or Path(name)
        folder.mkdir(exist_ok=True)
        start_s = time.perf_counter()
        write_vae(vae, folder, lambda *_: None, latent_height=args.latent_height, latent_width=args.latent_width)
        seconds["graphs"] = round(time.perf_counter() - start_s, 1)
        for request in vae_engine_requests(f"tensorrt_rtx-{args.target}"):
            start_s = time.perf_counter()
            build_engine(FLAVOURS["tensorrt_rtx"], args.target, request, folder, None)
            seconds[request.engine] = round(time.perf_counter() - start_s, 1)
        sizes = {file.name: file.stat().st_size >> 10 for file in sorted(folder.iterdir())}
    return {"target": args.target, "seconds": seconds, "file_kib": sizes, "peak_mib": status_bytes("VmHWM") >> 20}


def main() -> None:
    """Measure what the command line asks for, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "build"])
    parser.add_argument("--base-dim", type=int, default=96, help="channels at full resolution; Wan2.1 has 96")
    parser.add_argument("--latent-height", type=int, default=60)
    parser.add_argument("--latent-width", type=int, default=104)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunks", type=int, default=1, help="of 3 latents, to decode")
    parser.add_argument("--target", default="sm80", help="to build for")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where the build writes")
    parser.add_argument("--out", type=Path, help="keep what was built here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vae = random_vae(VaeConfig(base_dim=args.base_dim), seed=0, dtype=getattr(torch, args.dtype))
    found = (measured_decode if args.what == "decode" else measured_build)(vae, args)
    parameters = sum(parameter.numel() for parameter in vae.parameters())
    print(
        json.dumps({"what": args.what, "dtype": args.dtype, "threads": args.threads, "parameters": parameters} | found)
    )


if __name__ == "__main__":
    main()
