"""Which rows there are, which are left out and why, and what is refused before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from causalrt.config import Config, override
from causalrt.engines.kinds import EXECUTORS
from causalrt.errors import BundleError, ConfigError, ExecutorError, OutOfMemoryError
from causalrt.export.build import build
from causalrt.export.random_weights import random_weights
from causalrt.measure.bench import replicas as module
from causalrt.measure.bench.arguments import BenchRequest
from causalrt.measure.bench.replicas import Source, bundles_of, check_all_fit, choose_replicas, sources_of, why_not
from causalrt.recipes import recipe
from causalrt.tools.doctor import examine

CPU = BenchRequest(device="cpu", threads=4)


def machine(*missing: str) -> dict[str, Any]:
    """A machine that can do everything but what is missing."""
    return {name: {"ok": name not in missing, "detail": f"no {name} here"} for name in examine()["can"]}


def sources(*world_sizes: int, changes: dict[str, str] | None = None, **request: Any) -> list[Source]:
    config = override(recipe("tiny"), changes or {})
    return sources_of(config, BenchRequest(device="cpu", threads=4, world_sizes=world_sizes, **request), Path("folder"))


def test_cores_are_divided_among_ranks() -> None:
    sides, left_out = choose_replicas(
        sources(1, 2, 4), BenchRequest(executors=("eager",), device="cpu", threads=4), machine()
    )
    assert [(side.name, side.threads) for side in sides] == [("eager 1x4", 4), ("eager 2x2", 2), ("eager 4x1", 1)]
    assert left_out == []


def test_everything_is_tried_and_what_cannot_run_says_why() -> None:
    sides, left_out = choose_replicas(sources(1), CPU, machine("run inductor"))
    assert [side.executor for side in sides] == ["eager", "onnxruntime"]
    reasons = {each.executor: each.reason for each in left_out}
    assert set(reasons) == set(EXECUTORS) - {"eager", "onnxruntime"}
    assert reasons["inductor"] == "no run inductor here"
    assert "bf16" in reasons["tensorrt"]


def test_what_is_asked_for_and_cannot_run_is_an_error() -> None:
    request = BenchRequest(executors=("eager", "inductor"), world_sizes=(1,), device="cpu")
    with pytest.raises(ExecutorError, match="no run inductor here"):
        choose_replicas(sources(1), request, machine("run inductor"))
    with pytest.raises(ExecutorError, match="this version has"):
        choose_replicas(sources(1), BenchRequest(executors=("eagr",)), machine())


def test_nothing_to_measure() -> None:
    with pytest.raises(ExecutorError, match="nothing to measure"):
        choose_replicas(sources(2), CPU, machine("run several ranks on CPUs"))


def test_onnxruntime_wants_float32_on_a_cpu() -> None:
    (source,) = sources(1, changes={"build.precision": "bfloat16"})
    assert "float32 only" in (why_not("onnxruntime", source, "cpu", machine()) or "")
    assert why_not("eager", source, "cpu", machine()) is None


def test_plugins_on_and_off_where_that_is_open() -> None:
    request = BenchRequest(executors=("eager", "onnxruntime"), fused_ops="both", device="cpu", threads=4)
    sides, _ = choose_replicas(sources(1, fused_ops="both"), request, machine())
    assert [(side.executor, side.fused_ops) for side in sides] == [
        ("eager", False),
        ("eager", True),
        ("onnxruntime", False),
    ]
    relative = sources(1, changes={"video.time_index": "relative"})
    sides, _ = choose_replicas(relative, BenchRequest(executors=("eager",), fused_ops="both", device="cpu"), machine())
    assert [side.fused_ops for side in sides] == [True]


# ---- bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("bundles")
    made: dict[tuple[Config, int], Path] = {}

    def make(seed: int = 0, **changes: str) -> Path:
        config = override(recipe("tiny"), {name.replace("__", "."): value for name, value in changes.items()})
        if (config, seed) not in made:
            path = folder / f"{len(made)}"
            checkpoint = path.with_suffix(".safetensors")
            save_file(dict(random_weights(config.model, seed=seed)), checkpoint)
            made[config, seed] = build(config, checkpoint=checkpoint, out=path, executors=["eager"])
        return made[config, seed]

    return make


def test_bundles_are_of_one_world_size_each(bundle: Callable[..., Path]) -> None:
    both = [bundle(), bundle(build__world_size="2")]
    assert [source.config.build.world_size for source in bundles_of(BenchRequest(bundles=both))] == [1, 2]
    assert [source.config.build.world_size for source in bundles_of(BenchRequest(bundles=both, world_sizes=(2,)))] == [
        2
    ]
    with pytest.raises(BundleError, match=r"no bundle for 3 rank.*1, 2.*--world-size 3"):
        bundles_of(BenchRequest(bundles=both, world_sizes=(1, 3)))


def test_bundles_of_other_work_are_refused(bundle: Callable[..., Path]) -> None:
    for other in (bundle(video__window_frames="9"), bundle(seed=1), bundle(build__precision="bfloat16")):
        with pytest.raises(ConfigError, match="not the same work"):
            bundles_of(BenchRequest(bundles=[bundle(), other]))


def test_a_bundle_has_what_it_was_built_for(bundle: Callable[..., Path]) -> None:
    opened = bundles_of(BenchRequest(bundles=[bundle()]))
    sides, left_out = choose_replicas(opened, CPU, machine("run inductor"))
    assert [side.executor for side in sides] == ["eager"]
    assert "--executor onnxruntime" in {each.executor: each.reason for each in left_out}["onnxruntime"]
    with pytest.raises(ExecutorError, match="--executor onnxruntime"):
        choose_replicas(opened, BenchRequest(executors=("onnxruntime",), device="cpu"), machine())


def test_a_row_has_a_name_of_its_own(bundle: Callable[..., Path], tmp_path: Path) -> None:
    link = tmp_path / "same"
    link.symlink_to(bundle())
    opened = bundles_of(BenchRequest(bundles=[bundle(), link]))
    sides, _ = choose_replicas(opened, BenchRequest(executors=("eager",), device="cpu"), machine())
    assert len({side.name for side in sides}) == 2


# ---- memory


def test_all_sides_must_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, _ = choose_replicas(sources(1, 2), BenchRequest(executors=("eager",), device="cpu", threads=2), machine())
    needs = [module._needed_bytes(side, vae=False) for side in sides]
    monkeypatch.setattr(module, "available_bytes", lambda: sum(needs))
    check_all_fit(sides, vae=False)
    monkeypatch.setattr(module, "available_bytes", lambda: sum(needs) - 1)
    check_all_fit(sides[:1], vae=False)
    with pytest.raises(OutOfMemoryError, match=r"eager 2x1 .*--executors or --world-sizes"):
        check_all_fit(sides, vae=False)
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    check_all_fit(sides, vae=False)


def test_gpus_are_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    can = machine()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    request = BenchRequest(executors=("eager", "tensorrt"), device="cuda")
    config = override(recipe("tiny"), {"build.precision": "bfloat16"})
    found = sources_of(config, request, Path("folder"))
    sides, _ = choose_replicas(found, request, can)
    assert all(side.cuda_graphs == (side.executor == "tensorrt") for side in sides)
    both = BenchRequest(executors=("eager", "inductor"), world_sizes=(1,), device="cuda", cuda_graphs="both")
    inductor, _ = choose_replicas(found[:1], both, can)
    assert [(s.name, s.cuda_graphs) for s in inductor] == [
        ("eager P=1", False),
        ("inductor-graphs P=1", False),
        ("inductor P=1", True),
    ]
    assert [side.name for side in sides] == ["eager P=1", "eager P=4", "tensorrt P=1", "tensorrt P=4"]
