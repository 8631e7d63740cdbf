"""A torch profile of one chunk step: the kernels that take its time, and a trace for a viewer."""

import functools
import gzip
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from causalrt.measure.gpu_day.parts.steps import step_bundle
from causalrt.measure.gpu_day.recorder import Recorder
from causalrt.measure.gpu_day.steps import MakeExecutor, StepSession, eager, inductor, noise_of

MOST_BYTES = 16 * 2**20
SHOWN_OPS = 15


def run(recorder: Recorder) -> None:
    """Profile a step over all KV rows in eager, then in inductor."""
    bundle = step_bundle(recorder)
    x = noise_of(bundle, recorder.device)
    makers: dict[str, MakeExecutor] = {"eager": eager()}
    if recorder.dry_run:
        recorder.note("On a CPU only eager is profiled.")
    else:
        makers["inductor"] = inductor()
    for name, make in makers.items():
        with recorder.attempt(name), torch.no_grad():
            session = StepSession(make, bundle, recorder.device)
            video = bundle.config.video
            last = video.horizon_frames - video.chunk_frames
            for first in range(0, last + 1, video.chunk_frames):
                session.bind(first)
                session.step(x, first)
                session.commit(first)
            session.bind(last)
            session.step(x, last)
            _profile(recorder, name, functools.partial(session.timed_step, x, last))
            del session


def _profile(recorder: Recorder, name: str, step: Callable[[], float]) -> None:
    on_gpu = recorder.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        milliseconds = step()
    path = recorder.settings.work / f"trace-{name}.json"
    found.export_chrome_trace(str(path))
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    if len(packed) < MOST_BYTES:
        recorder.file(f"trace-{name}.json.gz", packed)
    else:
        recorder.note(f"The trace of {name} is left out: it has {len(packed) / 2**20:.0f} MiB, and 16 are the most.")
    times = [(each, _device_us(each) if on_gpu else each.self_cpu_time_total) for each in found.key_averages()]
    times = sorted((pair for pair in times if pair[1] > 0), key=lambda pair: -pair[1])
    busy_ms = sum(us for _, us in times) / 1e3
    recorder.fact(f"{name}: milliseconds of the profiled step", round(milliseconds, 3))
    recorder.fact(f"{name}: milliseconds in {'kernels' if on_gpu else 'ops'}", round(busy_ms, 3))
    for each, us in times[:SHOWN_OPS]:
        share = us / 1e3 / busy_ms
        recorder.row(f"{name}: what takes the time", name=each.key[:100], calls=each.count, ms=us / 1e3, share=share)
    if times:
        first, us = times[0]
        recorder.headline(
            name,
            f"In a profiled step of {name}, {first.key[:60]} takes {us / 1e3 / busy_ms:.0%} of the time in kernels.",
        )


def _device_us(event: Any) -> float:
    """Microseconds of a kernel on the GPU; 0 for ops of the host, which contain kernels."""
    return float(event.self_device_time_total) if event.device_type == DeviceType.CUDA else 0.0
