"""What calls on a GPU take beside what is always installed."""

from importlib import metadata

_DISTRIBUTIONS = ("numba-cuda", "cuda-core")


def check() -> None:
    """Raise RuntimeError if something is missing. Without numba-cuda, Numba's own numba.cuda would be found instead,
    which cannot compile these kernels and says something else.
    """
    for name in _DISTRIBUTIONS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise RuntimeError(
                f"kernels for a GPU take {name}, which is not installed: pip install 'gpusoftmax[cu13]', or [cu12] for "
                f"a CUDA 12 driver"
            ) from None
