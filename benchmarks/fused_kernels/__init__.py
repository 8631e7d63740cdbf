"""What `gpu_kernels.py` measures: cases of the fused kernels, their times, verdicts and picture."""
