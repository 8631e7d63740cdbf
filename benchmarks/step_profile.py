"""The time of a chunk step in ONNX Runtime by kind of op and by number of filled KV rows, from its own profiler.

    python benchmarks/step_profile.py BUNDLE [--threads 2] [--steps 8]

For bundles of one rank, whose step is one graph; inputs are random. Products and attentions are a step's floor: what `causalrt
bench` calls its roofline is how fast they are alone.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from onnx import TensorProto
from rich.console import Console
from rich.table import Table

from causalrt.engines.bundle import Bundle, open_bundle
from causalrt.engines.tensor_names import is_callers
from causalrt.layout import history_lengths, slots_from_config

TYPES = {"tensor(float)": (torch.float32, TensorProto.FLOAT), "tensor(int64)": (torch.int64, TensorProto.INT64)}
KINDS = {"MultiHeadAttention": "attention", "Attention": "attention", "Gemm": "products", "MatMul": "products"}
SHOWN = 0.002
"""Smallest share of a step that has a row."""


def profile(bundle: Bundle, filled_rows: int, *, steps: int, folder: Path) -> dict[str, float]:
    """Median milliseconds of a step by kind of op; `step` is all of it, with the time between ops."""
    import onnxruntime as ort  # after causalrt, which turns its telemetry off

    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(
        str(bundle.path / bundle.steps[0].segments[0].file), options, providers=["CPUExecutionProvider"]
    )
    binding, tensors = session.io_binding(), {}
    for output, values in ((False, session.get_inputs()), (True, session.get_outputs())):
        for value in values:
            dtype, kind = TYPES[value.type]
            shape = [size if isinstance(size, int) else filled_rows for size in value.shape]
            name = value.name.removesuffix(".written") if is_callers(value.name) else value.name
            if name not in tensors:
                tensors[name] = (
                    torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
                )
            bind = binding.bind_output if output else binding.bind_input
            bind(value.name, "cpu", 0, kind, shape, tensors[name].data_ptr())
    for _ in range(steps + 1):
        session.run_with_iobinding(binding)
    events = json.loads(Path(session.end_profiling()).read_text())
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")
    found: dict[str, list[float]] = defaultdict(list)
    for start, length in runs[1:]:
        spent = defaultdict(float, step=length / 1e3)
        for event in events:
            if event["name"].endswith("_kernel_time") and start <= event["ts"] < start + length:
                op = event["args"]["op_name"]
                spent[KINDS.get(op, op)] += event["dur"] / 1e3
        for group, ms in spent.items():
            found[group].append(ms)
    return {group: statistics.median(times) for group, times in found.items()}


def main() -> None:
    """Profile the step over each KV length of the bundle."""
    import onnxruntime as ort

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    if (segments := len(bundle.steps[0].segments)) != 1:
        parser.error(f"the step of {arguments.bundle} has {segments} segments; build one for onnxruntime and one rank")
    ort.set_global_thread_pool_sizes(arguments.threads, 1)
    config = bundle.config
    slots = slots_from_config(config)
    frames = sorted({slots.valid_frames(start) for start in history_lengths(config)})
    with tempfile.TemporaryDirectory(prefix="causalrt-profile-") as folder:
        columns = [
            profile(bundle, each * config.tokens_per_frame, steps=arguments.steps, folder=Path(folder))
            for each in frames
        ]
    table = Table("ms of a step over", *(f"{each} frames" for each in frames))
    largest = {kind: max(column.get(kind, 0.0) / column["step"] for column in columns) for kind in columns[0]}
    for kind in sorted((kind for kind in largest if largest[kind] >= SHOWN), key=lambda kind: -largest[kind]):
        table.add_row(kind, *(f"{column[kind]:.1f} ({column[kind] / column['step']:.1%})" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
