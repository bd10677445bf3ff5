"""Host half of the CUDA kernels, one operation per file: signature, plan, launch. Imports no Numba."""
