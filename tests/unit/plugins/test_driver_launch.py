"""What `tests/gpu/driver_launch.py` hands to the driver, seen by a library that is compiled against CUDA's own header."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.driver_launch import CTYPES, PROTOTYPES, DriverError, Kernel, pack, parameter_types

PTX = """
.visible .entry other(
	.param .u64 other_param_0
)
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .f32 kernel_param_2,
	.param .u64 kernel_param_3
)
.reqntid 128
{ ret; }
"""
LIBRARY = r"""
#include <cuda.h>
#include <string.h>

unsigned long long seen[20];
char text[4096];
int refuse;

CUresult CUDAAPI cuGetErrorString(CUresult error, const char **message) {
    *message = error == CUDA_ERROR_INVALID_PTX ? "no such instruction" : "out of luck";
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int count, CUjit_option *options,
                                    void **values) {
    if (count != 2 || options[0] != CU_JIT_ERROR_LOG_BUFFER || options[1] != CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
        return CUDA_ERROR_INVALID_VALUE;
    strncpy(text, image, sizeof text - 1);
    if (refuse) {
        strncpy(values[0], "ptxas fatal: line 7", (size_t)values[1]);
        return CUDA_ERROR_INVALID_PTX;
    }
    *module = (CUmodule)0x7000000000000001;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (module != (CUmodule)0x7000000000000001 || strcmp(name, "kernel")) return CUDA_ERROR_NOT_FOUND;
    *function = (CUfunction)0x7000000000000002;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (function != (CUfunction)0x7000000000000002) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    seen[0] = value;
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                                unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,
                                CUstream stream, void **parameters, void **extra) {
    if (function != (CUfunction)0x7000000000000002 || extra) return CUDA_ERROR_INVALID_HANDLE;
    unsigned long long sizes[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, (unsigned long long)stream};
    memcpy(seen + 1, sizes, sizeof sizes);
    seen[9] = *(unsigned long long *)parameters[0];
    seen[10] = *(unsigned int *)parameters[1];
    memcpy(seen + 11, parameters[2], sizeof(float));
    seen[12] = *(unsigned long long *)parameters[3];
    return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    seen[13] = (unsigned long long)module;
    return CUDA_SUCCESS;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    triton, compiler = pytest.importorskip("triton"), shutil.which("gcc") or shutil.which("cc")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if compiler is None or not (include / "cuda.h").exists():
        pytest.skip("needs a C compiler, and the cuda.h that Triton brings")
    source = tmp_path_factory.mktemp("driver") / "driver.c"
    source.write_text(LIBRARY)
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        f"-I{include}",
        source,
        "-o",
        source.with_suffix(".so"),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(source.with_suffix(".so"))


def numbers(library):
    return list((ctypes.c_ulonglong * 20).in_dll(library, "seen"))


def test_launch_hands_over_what_it_was_given(library):
    x, y, stream = torch.zeros(3), torch.zeros(5), 0x7FFF_0000_1234
    kernel = Kernel(PTX, "kernel", shared_bytes=131072, library=library)
    assert (ctypes.c_char * 4096).in_dll(library, "text").value.decode() == PTX
    kernel.launch([x, 7, 0.5, y], grid=(300, 2, 3), block=(128, 1, 4), shared_bytes=98304, stream=stream)
    half = int.from_bytes(bytes(ctypes.c_float(0.5)), "little")
    wanted = [131072, 300, 2, 3, 128, 1, 4, 98304, stream, x.data_ptr(), 7, half, y.data_ptr()]
    assert numbers(library)[:13] == wanted
    assert numbers(library)[13] == 0
    del kernel
    assert numbers(library)[13] == 0x7000000000000001


def test_refusals_say_what_the_driver_says(library):
    refuse = ctypes.c_int.in_dll(library, "refuse")
    refuse.value = 1
    try:
        with pytest.raises(
            DriverError, match=r"cuModuleLoadDataEx: error 218, no such instruction: ptxas fatal: line 7"
        ):
            Kernel(PTX, "kernel", shared_bytes=0, library=library)
    finally:
        refuse.value = 0
    with pytest.raises(DriverError, match=r"cuModuleGetFunction: error 500, out of luck"):
        Kernel(PTX, "other", shared_bytes=0, library=library)


def test_every_call_has_a_prototype():
    assert all(PROTOTYPES.values())


def test_types_are_those_of_the_entry():
    assert parameter_types(PTX, "kernel") == [CTYPES[name] for name in ("u64", "u32", "f32", "u64")]
    assert parameter_types(PTX, "other") == [ctypes.c_uint64]
    with pytest.raises(ValueError, match="no entry kern"):
        parameter_types(PTX, "kern")
    with pytest.raises(ValueError, match="not packed here"):
        parameter_types(PTX.replace(".param .f32", ".param .align 64 .b8"), "kernel")


@pytest.mark.parametrize(
    ("kind", "argument", "error"),
    [
        ("u32", torch.zeros(1), TypeError),
        ("u32", 1.0, TypeError),
        ("u32", True, TypeError),
        ("f32", 1, TypeError),
        ("u32", 2**32, OverflowError),
        ("s32", 2**31, OverflowError),
        ("u64", -1, OverflowError),
    ],
)
def test_what_does_not_fit_is_refused(kind, argument, error):
    with pytest.raises(error, match="argument 0"):
        pack([CTYPES[kind]], [argument])


def test_count_is_checked():
    with pytest.raises(ValueError, match="takes 1 arguments, got 2"):
        pack([ctypes.c_uint64], [torch.zeros(1), torch.zeros(1)])
