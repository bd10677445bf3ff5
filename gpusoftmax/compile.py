"""Compiles kernels ahead of time."""

from collections.abc import Sequence
from typing import Any

from gpusoftmax import _dry_run


def compile(
    arch: str | Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[Any] | None = None,
    **options: Any,
) -> int:
    """Fill the cache of compiled CUDA kernels, so that no later call has to compile one. Needs no GPU.

    Without options, kernels of calls whose logits go through no transform. What logits go through is compiled into the
    kernels, which are others then: name it, in one call of this function for each kind of call.

    The cache is the directory that `GPUSOFTMAX_CACHE_DIR` names, or the user's own. A process that shall only read it
    names it in `GPUSOFTMAX_CACHE_PATH`: kernels that are built into a container, for instance. The directory is made
    for its owner alone; what root has made is read by processes of other users after `chmod -R a+rX`.

    Parameters
    ----------
    arch : str or sequence of str, optional
        Architectures such as "sm_90". By default those of this machine's GPUs.
    ops : sequence of str, optional
        Public functions, such as "softmax"; all by default. LogSumExpState comes with "logsumexp".
    dtypes : sequence of dtype, optional
        Of the arrays; by default float16, bfloat16, float32 and float64. Kernels of results of another dtype than the
        input's are compiled when they are first asked for, unless the options have the dtype of `out`.
    **options
        Further arguments of the calls of `ops`, which must be named then: `temperature`, `bias`, `softcap`, `mask`,
        `n_valid`, `top_p`, `return_entropy`, ..., as `explain` takes them: instead of an array its dtype. The kernels
        serve such calls with any number of rows and columns, along any one axis, and arrays of any shape. A number may
        be another one, but beside a bias or softcap a temperature of 1 and others have kernels of their own.

    Returns
    -------
    int
        How many kernels are ready now.

    Raises
    ------
    ValueError
        An unknown op or architecture, no `arch` where there is no GPU, or options without `ops`.
    TypeError
        Options that one of the ops does not take.
    RuntimeError
        There is no cache directory that can be used, or numba-cuda or cuda-core is not installed.

    Examples
    --------
    >>> import gpusoftmax
    >>> gpusoftmax.compile("sm_90", ops=["logsumexp"], dtypes=[])
    0

    What sampling takes where each row has a temperature and a mask of bits, as those of grammar engines:

    >>> masked = {"temperature": "float32", "mask": "int32", "top_p": 0.9}
    >>> gpusoftmax.compile("sm_90", ["sample"], ["bfloat16"], **masked)  # doctest: +SKIP
    2
    """
    images = _dry_run.images(arch, ops, dtypes, **options)
    for image in images:
        image.make()
    return len(images)
