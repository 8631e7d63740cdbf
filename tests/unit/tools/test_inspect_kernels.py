import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from causalrt.cli import main
from causalrt.config import override
from causalrt.errors import ConfigError, KernelError
from causalrt.export.random_weights import random_weights
from causalrt.layout import layout_from_config
from causalrt.plugins import ptx
from causalrt.plugins.kernel_launch import KernelLaunch
from causalrt.plugins.plugin_specs import SMALL_TILES, SPECS
from causalrt.plugins.ptx import TARGETS, CompiledKernel
from causalrt.plugins.qk_norm_rope import write_rows
from causalrt.plugins.rope_attention import run_kernel
from causalrt.recipes import recipe
from causalrt.tools import inspect_kernels
from causalrt.tools.inspect_kernels import (
    GPUS,
    blocks_per_multiprocessor,
    gpu_from_target,
    plan_kernels,
    targets_from_names,
)

pytest.importorskip("triton")


def describe_kernels(config, **given):
    return [report.as_dict() for report in inspect_kernels.describe_kernels(config, **given)]


def make_config(name="wan_1_3b_480p", **build):
    changes = {f"build.{field}": str(value) for field, value in ({"precision": "bfloat16"} | build).items()}
    return override(recipe(name), changes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("ptx")


# ---- the launches are those of the plugins and of the ops

LAYOUTS = [("tiny", 1, "balanced"), ("tiny", 2, "balanced"), ("wan_1_3b_480p", 1, "balanced")]
LAYOUTS += [("wan_1_3b_480p", 8, plan) for plan in ("balanced", "padded", "grouped")]


def made_tensors(config):
    """Inputs of both ops by the names of the plugins' inputs, slots whole; without data."""
    layout, model, dtype = layout_from_config(config), config.model, getattr(torch, config.build.precision)
    row, table = (layout.local_tokens, model.dim), (1, layout.local_tokens, model.head_dim // 2)
    shapes = {"q": row, "k": row, "v": row, "norm_q": row[1:], "norm_k": row[1:]}
    shapes["received"] = (layout.world_size, layout.scatter_rows, model.head_dim)
    for number, shard in enumerate(layout.shards):
        for kind in "kv":
            shapes[f"{kind}_slots_{number}"] = (1, shard.num_heads, config.slot_rows, model.head_dim)
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    tensors |= {name: torch.empty(table, device="meta") for name in ("cos", "sin")}
    tensors["destinations"] = torch.from_numpy(layout.scatter_destinations()).to("meta")
    tensors["kv_rows"] = torch.empty(1, dtype=torch.int64, device="meta")
    return layout, tensors


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "ranks", "head_plan"), LAYOUTS, ids=str)
def test_launches_are_those_of_the_plugins(name, ranks, head_plan, target):
    config = make_config(name, world_size=ranks, head_plan=head_plan)
    layout, tensors = made_tensors(config)
    planned = plan_kernels(config, GPUS[target])
    numbers = {"num_heads": config.model.num_heads, "eps": config.model.eps, "dtype": 16}
    numbers |= {"out_rows": layout.world_size * layout.scatter_rows, "num_tokens": layout.num_tokens}
    numbers |= {"gather_rows": layout.gather_rows, "kv_splits": planned[-1].kv_splits}
    numbers |= {f"split_{number}": shard.split for number, shard in enumerate(layout.shards)}
    parts = (planned[-1].kv_splits, layout.world_size, layout.gather_rows, config.model.head_dim)
    tensors |= {"parts": torch.empty(parts, device="meta"), "log_sums": torch.empty(parts[:3], device="meta")}
    specs = {spec.name: spec for spec in SPECS}
    for kernel in planned:
        spec = specs[kernel.name]
        inputs = {key: tensors[key] for key in spec.inputs}
        given = {key: numbers[key] for key in spec.attributes}
        assert kernel.launch == spec.plan(inputs, given, target, SMALL_TILES if kernel.small_tiles else 0)
    assert len(planned) == (3 if name == "tiny" else 6)
    assert sum(kernel.small_tiles for kernel in planned) == (1 if name == "tiny" else 2)


@pytest.mark.parametrize("time_index", ["global", "relative"])
@pytest.mark.parametrize(("name", "ranks", "head_plan"), LAYOUTS, ids=str)
def test_an_a100_launches_what_is_planned_for_it(name, ranks, head_plan, time_index, monkeypatch):
    config = override(make_config(name, world_size=ranks, head_plan=head_plan), {"video.time_index": time_index})
    layout, tensors = made_tensors(config)
    launched = []
    monkeypatch.setattr(KernelLaunch, "run", lambda launch, *arguments: launched.append(launch))
    out = torch.empty(layout.world_size * layout.scatter_rows, config.model.head_dim, device="meta")
    names = ("q", "k", "v", "norm_q", "norm_k", "cos", "sin", "destinations")
    write_rows(out.to(tensors["q"].dtype), *(tensors[key] for key in names), config.model.eps)
    table = torch.empty(config.slot_rows, config.model.head_dim // 2, device="meta")
    rotation = [tensors["kv_rows"], table, table] if time_index == "relative" else []
    run_kernel(  # on no GPU, it plans for an A100
        tensors["received"],
        [tensors[key] for key in tensors if "_slots_" in key],
        tensors["kv_rows"],
        rotation,
        [shard.num_heads for shard in layout.shards],
        [shard.split for shard in layout.shards],
        layout.num_tokens,
    )
    planned = [kernel.launch for kernel in plan_kernels(config, GPUS[80])]
    assert len(launched) == (2 if name == "tiny" else 3)
    assert all(launch in planned for launch in launched)


def test_attention_rotates_in_relative_time():
    config = override(make_config(world_size=8), {"video.time_index": "relative"})
    found = [(kernel.name, kernel.rotate) for kernel in plan_kernels(config, GPUS[80])]
    assert found[:3] == [("qk_norm_rope", False), ("rope_attention_2", True), ("rope_attention_split_2", True)]
    assert [name for name, _ in found[3:]] == ["combine_splits"]


# ---- what they compile to


def assert_fits_without_spills(found):
    for kernel in found:
        assert kernel["spill_bytes"] == 0, kernel
        assert kernel["blocks_per_multiprocessor"] >= 1, kernel


@pytest.mark.parametrize("target", [80, 90])
def test_nothing_spills_at_1_3b(target, cache):
    found = describe_kernels(make_config(world_size=2), targets=[target], cache=cache)
    assert_fits_without_spills(found)
    assert [(kernel["kernel"], kernel["small_tiles"]) for kernel in found] == [
        ("qk_norm_rope", False),
        ("rope_attention_1", False),
        ("rope_attention_1", True),
        ("rope_attention_split_1", False),
        ("rope_attention_split_1", True),
        ("combine_splits", False),
    ]
    assert all(kernel["shared_bytes"] <= 48 * 1024 for kernel in found if kernel["small_tiles"])


@pytest.mark.slow
@pytest.mark.parametrize("head_plan", ["balanced", "padded", "grouped"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_at_1_3b_on_any_ranks(target, ranks, head_plan, cache):
    config = make_config(world_size=ranks, head_plan=head_plan)
    config = override(config, {"video.time_index": "relative"})  # with it, all kernels
    assert_fits_without_spills(describe_kernels(config, targets=[target], cache=cache))


def test_entries_are_json_and_agree_with_the_ptx(tmp_path):
    config = make_config("tiny", precision="float32")
    first, second = describe_kernels(config, targets=[80], cache=tmp_path)
    assert json.loads(json.dumps([first, second])) == [first, second]
    assert (first["kernel"], first["grid"]) == ("qk_norm_rope", [config.tokens_per_chunk, 1, 1])
    kept = {entry["name"]: entry for entry in map(json.loads, (path.read_text() for path in tmp_path.iterdir()))}
    whole = kept["rope_attention_kernel"]
    assert (second["target"], second["kv_splits"], second["rotate"]) == ("sm80", 1, False)
    assert f".version {second['ptx_version']}\n" in whole["ptx"]
    assert f".reqntid {second['threads']}\n" in whole["ptx"]
    assert second["ptx_bytes"] == len(whole["ptx"])
    assert (second["registers"], second["shared_bytes"]) == (whole["registers"], whole["shared_bytes"])


def test_second_time_comes_from_the_cache(tmp_path, monkeypatch):
    calls, config = [], make_config("tiny")
    given = {"targets": [80], "cache": tmp_path, "on_progress": lambda *call: calls.append(call)}
    first = describe_kernels(config, **given)
    assert not any(kernel.pop("cached") for kernel in first)
    assert calls[0] == ("kernels", 0, len(first))
    assert calls[-1] == ("kernels", len(first), len(first))
    calls.clear()
    monkeypatch.setattr(ptx, "_ptx_from_launch", lambda launch, target: pytest.fail("compiled anew"))
    second = describe_kernels(config, **given)
    assert all(kernel.pop("cached") for kernel in second)
    assert second == first
    assert calls == []


# From `cuda_occupancy.h` of CUDA 13.0: target, registers, warps, bytes of shared memory, blocks.
OCCUPANCY = [
    (80, 252, 8, 98304, 1),
    (80, 64, 4, 16, 8),
    (80, 72, 4, 16, 7),  # seven warps on each scheduler
    (80, 36, 1, 0, 32),
    (80, 128, 8, 163 * 1024, 1),
    (80, 128, 8, 163 * 1024 + 1, 0),
    (90, 96, 8, 65536, 2),
    (90, 32, 8, 227 * 1024, 1),
    (120, 36, 1, 0, 24),
    (120, 16, 4, 0, 12),
    (120, 255, 16, 0, 0),
]


@pytest.mark.parametrize(("target", "registers", "warps", "shared", "blocks"), OCCUPANCY)
def test_blocks_that_fit_are_those_of_cuda(target, registers, warps, shared, blocks):
    compiled = CompiledKernel(
        name="kernel",
        target=target,
        ptx="",
        num_warps=warps,
        shared_bytes=shared,
        registers=registers,
        spill_bytes=0,
    )
    assert blocks_per_multiprocessor(compiled, GPUS[target]) == blocks


def test_the_gpu_at_hand_counts_where_it_is_of_the_target(monkeypatch):
    here = SimpleNamespace(name="H20", multi_processor_count=78)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    assert gpu_from_target(90) == replace(GPUS[90], name="H20", num_multiprocessors=78)
    assert gpu_from_target(80) == GPUS[80]


# ---- what cannot be had


def test_targets_are_named_or_all():
    assert targets_from_names([]) == TARGETS == tuple(GPUS)
    assert targets_from_names(["sm90", "sm80", "sm90"]) == (90, 80)
    with pytest.raises(ConfigError, match="'sm75'; take some of sm80, sm90, sm120"):
        targets_from_names(["sm80", "sm75"])


def test_missing_triton_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match="pip install 'triton"):
        describe_kernels(make_config("tiny"), targets=[80], cache=tmp_path)


def test_what_the_kernel_cannot_address_is_unavailable(cache):
    config = override(make_config(), {"video.horizon_frames": "1023"})
    normalise, attend = describe_kernels(config, targets=[80], cache=cache)
    assert normalise["spill_bytes"] == 0
    assert attend["kernel"] == "rope_attention_1"
    assert "use more ranks or a shorter window" in attend["unavailable"]


def test_what_triton_refuses_is_unavailable_and_prints_nothing(monkeypatch, tmp_path, capsys):
    def refuse(*arguments, **options):
        sys.stdout.write("please shard the reproducer")
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("triton.compile", refuse)
    found = describe_kernels(make_config("tiny"), targets=[80, 120], cache=tmp_path)
    assert len(found) == 6
    assert all(f"for sm_{kernel['target'][2:]}: no such instr" in kernel["unavailable"] for kernel in found)
    assert capsys.readouterr().out == ""


def test_a_target_without_assembler_is_unavailable(monkeypatch, tmp_path):
    def missing(target):
        raise RuntimeError("Cannot find ptxas-blackwell")

    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", missing)
    found = describe_kernels(make_config("tiny"), targets=[120], cache=tmp_path)
    assert all("no assembler for sm_120" in kernel["unavailable"] for kernel in found)


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match="set XDG_CACHE_HOME"):
        describe_kernels(make_config("tiny"), targets=[80], cache=tmp_path / "file")


# ---- the command


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    save_file(dict(random_weights(recipe("tiny").model, seed=0)), folder / "model.safetensors")
    flags = ["--recipe", "tiny", "--checkpoint", str(folder / "model.safetensors"), "--dtype", "bf16"]
    assert main(["build", *flags, "--executor", "eager", "--out", str(folder / "bundle")]) == 0
    return str(folder / "bundle")


def test_inspect_shows_kernels_if_asked(bundle, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["inspect", bundle, "--json"]) == 0
    printed = capsys.readouterr()
    assert "kernels" not in json.loads(printed.out)
    assert printed.err == ""

    assert main(["inspect", bundle, "--kernels", "--target", "sm80", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["kernels"]
    assert [kernel["kernel"] for kernel in found] == ["qk_norm_rope", "rope_attention_1", "rope_attention_1"]
    assert [kernel["small_tiles"] for kernel in found] == [False, False, True]
    assert "3/3" in printed.err

    monkeypatch.setenv("COLUMNS", "240")
    assert main(["inspect", bundle, "--kernels", "--target", "sm80"]) == 0
    printed = capsys.readouterr()
    assert "sm80 rope_attention_1 " in printed.out
    assert "sm80 rope_attention_1, small tiles" in printed.out
    assert "no spills" in printed.out
    assert "from the cache" in printed.out
    assert printed.err == ""


def test_spills_and_what_does_not_fit_are_said_and_no_failure(bundle, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "240")
    assert main(["inspect", bundle, "--kernels", "--target", "sm80"]) == 0
    for path in (tmp_path / "causalrt" / "ptx").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"spill_bytes": 96, "shared_bytes": 2**20}))
    capsys.readouterr()
    assert main(["inspect", bundle, "--kernels", "--target", "sm80"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("SPILLS 96 bytes") == printed.count("DOES NOT FIT") == 3


def test_inspect_refuses_an_unknown_target(bundle, capsys):
    assert main(["inspect", bundle, "--kernels", "--target", "sm75"]) == 2
    assert "sm80, sm90, sm120" in capsys.readouterr().err
