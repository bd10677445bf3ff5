"""Numba kernels for the CPU, one operation per file."""
