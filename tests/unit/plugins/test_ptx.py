import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from causalrt.errors import KernelError
from causalrt.plugins import ptx
from causalrt.plugins.ptx import TARGETS, compile_kernel, default_cache
from causalrt.plugins.qk_norm_rope_launch import plan

# (S, M) of the 1.3B model: 12 heads on 8 ranks, and on one.
SHAPES = {"P8": (585, 2), "P1": (4680, 1)}


def launch_of(num_rows=585, num_places=2, *, num_heads=12, head_dim=128, dtype=torch.bfloat16):
    return plan(
        num_rows=num_rows,
        num_heads=num_heads,
        head_dim=head_dim,
        num_places=num_places,
        dtype=dtype,
        eps=1e-6,
        row_strides=(num_heads * head_dim,) * 3,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("ptx")


@pytest.fixture
def compilations(monkeypatch):
    """Counts what is compiled, not taken from the cache."""
    counted = []
    compiled = ptx._ptx_from_launch

    def counting(launch, target):
        counted.append(target)
        return compiled(launch, target)

    monkeypatch.setattr(ptx, "_ptx_from_launch", counting)
    return counted


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_norm_rope_compiles_without_spills(shape, target, cache):
    compiled = compile_kernel(launch_of(*SHAPES[shape]), target=target, cache=cache)
    assert compiled.spill_bytes == 0
    assert compiled.registers * compiled.num_warps * 32 <= 65536 / 6, "fewer than 6 programs on a multiprocessor"
    assert compiled.shared_bytes <= 64  # partial sums of the warps, and nothing else: no value changes threads
    # Rows move 16 bytes at a time; what is narrower are places and cos and sin.
    assert set(re.findall(r"\b(?:ld|st)\.global\.\S+", compiled.ptx)) == {
        "ld.global.v4.b32",
        "ld.global.b32",
        "st.global.v4.b32",
    }


@pytest.mark.parametrize("target", TARGETS)
def test_ptx_is_for_the_target_takes_the_signature_and_names_no_files(target, cache):
    launch = launch_of()
    compiled = compile_kernel(launch, target=target, cache=cache)
    assert re.search(rf"^\.target sm_{target}a?$", compiled.ptx, re.MULTILINE)
    assert f".entry {compiled.name}(" in compiled.ptx
    assert compiled.name == launch.kernel.__name__
    assert len(re.findall(r"^\s*\.param ", compiled.ptx, re.MULTILINE)) == len(launch.signature)
    assert f".reqntid {32 * compiled.num_warps}\n" in compiled.ptx
    assert ".py" not in compiled.ptx
    assert compiled.ptx.count(".version 8.") == 1  # drivers of CUDA 12 read it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("num_heads", "head_dim", "num_places"), [(5, 24, 5), (40, 128, 1)])
def test_other_shapes_compile(num_heads, head_dim, num_places, dtype, cache):
    launch = launch_of(13, num_places, num_heads=num_heads, head_dim=head_dim, dtype=dtype)
    assert compile_kernel(launch, target=80, cache=cache).spill_bytes == 0


def test_second_time_comes_from_the_cache(cache, compilations):
    launch = launch_of(17)
    first = compile_kernel(launch, target=80, cache=cache)
    assert compile_kernel(launch, target=80, cache=cache) == first
    assert compilations == [80]
    assert not list(cache.glob("*.partial"))


@pytest.mark.parametrize(
    "change",
    [
        {"constexprs": launch_of(19).constexprs | {"EPS": 1e-5}},
        {"num_warps": 8},
        {"signature": launch_of(19).signature | {"out": "*fp32"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_kernel_is_compiled_anew(change, cache, compilations):
    launch = launch_of(19)
    compile_kernel(launch, target=80, cache=cache)
    compilations.clear()
    compile_kernel(replace(launch, **change), target=80, cache=cache)
    assert compilations == [80]


def test_grid_does_not_change_the_kernel(cache, compilations):
    launch = launch_of(19)
    compile_kernel(launch, target=80, cache=cache)
    compilations.clear()
    compile_kernel(replace(launch, grid=(1, 2, 3)), target=80, cache=cache)
    assert compilations == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}'])
def test_damaged_cache_entry_is_compiled_anew_and_said(content, tmp_path, caplog):
    launch = launch_of()
    first = compile_kernel(launch, target=80, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert compile_kernel(launch, target=80, cache=tmp_path) == first
    assert "damaged" in caplog.text


def test_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "causalrt" / "ptx"


def test_default_cache_is_not_in_the_working_directory_if_the_variable_is_empty(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "causalrt" / "ptx"


def test_missing_triton_says_what_to_install(monkeypatch, tmp_path):
    launch = launch_of()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match="pip install 'triton"):
        compile_kernel(launch, target=80, cache=tmp_path)


def test_interpreted_kernel_is_refused(tmp_path):
    from triton.runtime.interpreter import InterpretedFunction

    launch = launch_of()
    with pytest.raises(KernelError, match="without TRITON_INTERPRET"):
        compile_kernel(replace(launch, kernel=InterpretedFunction(launch.kernel.fn)), target=80, cache=tmp_path)


def test_what_triton_refuses_is_a_kernel_error(tmp_path):
    launch = launch_of()
    broken = replace(launch, constexprs=launch.constexprs | {"PADDED_HEADS": 12})  # no power of two
    with pytest.raises(KernelError, match="cannot compile qk_norm_rope_kernel for sm_80"):
        compile_kernel(broken, target=80, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- what the assembler says

LOG = """ptxas info    : Function properties for kernel
    {frame} bytes stack frame, {stored} bytes spill stores, {loaded} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 440 bytes cmem[0]
"""


def test_an_assembler_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(ptx, "ASSEMBLER_S", 0.5)
    hanging = tmp_path / "ptxas"
    hanging.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nexec sleep 600\n")
    hanging.chmod(0o700)
    with pytest.raises(KernelError, match=r"ptxas gave no answer within 0.5 s"):
        ptx._assembler_log(".target sm_80\n", str(hanging))
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_spills_are_read_from_the_log():
    log = LOG.format(frame=24, stored=16, loaded=20, registers=255)
    assert ptx._resources_from_log(log) == (255, 36)


def test_unknown_log_is_an_error_not_a_zero():
    with pytest.raises(KernelError, match="does not know"):
        ptx._resources_from_log("ptxas info    : Used 12 registers")
