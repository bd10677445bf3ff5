"""Kernels of gpusoftmax: `cpu/<op>.py` and `cuda/<op>.py` hold one operation each; see kernels/README.md."""
