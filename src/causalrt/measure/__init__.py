"""Measuring executors, kernels and whole machines: `causalrt bench` and `causalrt gpu-day`."""
