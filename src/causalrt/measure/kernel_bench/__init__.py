"""The fused kernels beside what torch has, on one GPU, for `benchmarks/gpu_kernels.py` and `gpu-day`."""
