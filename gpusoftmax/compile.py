"""Compiles kernels ahead of time."""

from collections.abc import Sequence
from typing import Any

from gpusoftmax import _dry_run


def compile(
    arch: str | Sequence[str] | None = None, ops: Sequence[str] | None = None, dtypes: Sequence[Any] | None = None
) -> int:
    """Fill the cache of compiled CUDA kernels, so that no later call has to compile one. Needs no GPU.

    The cache is the directory that `GPUSOFTMAX_CACHE_DIR` names, or the user's own. A process that shall only read it
    names it in `GPUSOFTMAX_CACHE_PATH`: kernels that are built into a container, for instance.

    Parameters
    ----------
    arch : str or sequence of str, optional
        Architectures such as "sm_90". By default those of this machine's GPUs.
    ops : sequence of str, optional
        Public functions, such as "softmax"; all by default. LogSumExpState comes with "logsumexp".
    dtypes : sequence of dtype, optional
        Of the arrays; by default float16, bfloat16, float32 and float64. Results of another dtype than the input's are
        compiled when they are first asked for.

    Returns
    -------
    int
        How many kernels are ready now.

    Raises
    ------
    ValueError
        An unknown op or architecture, or no `arch` where there is no GPU.
    RuntimeError
        There is no cache directory that can be used.

    Examples
    --------
    >>> import gpusoftmax
    >>> gpusoftmax.compile("sm_90", ops=["logsumexp"], dtypes=[])
    0
    """
    images = _dry_run.images(arch, ops, dtypes)
    for image in images:
        image.make()
    return len(images)
