"""Kernels for NVIDIA Hopper GPUs, in Pallas Mosaic GPU."""
