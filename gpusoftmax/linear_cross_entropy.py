"""The last layer of a classifier and its loss in one: cross-entropy of input @ linear_weight.T + linear_bias.

    Z = X W^T + b        L = cross_entropy(Z, target)        dX = dZ W        dW = dZ^T X        db = sum of dZ's rows

Z, of the size rows x classes, is never there as a whole. A chunk of rows of it is made in one buffer, becomes dZ in its
place by the kernel of cross_entropy_with_grad, is multiplied into the gradients, and gives way to the next. What "mean"
divides by follows from the labels, before the first chunk. After Liger's fused linear cross-entropy (Hsu et al.,
arXiv:2410.10989) and torch.nn.functional.linear_cross_entropy.
"""

from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays, _checks, _labels, _layer
from gpusoftmax._arrays import Array
from gpusoftmax.kernels.operands import NO_OPERAND, Labels, Numbers, Operand, Rows, label_code


class LinearCrossEntropyGrad(NamedTuple):
    """What `linear_cross_entropy_with_grad` returns; None for what was not asked for."""

    loss: Any
    dinput: Any
    dlinear_weight: Any
    dlinear_bias: Any


def linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    validate: bool | None = None,
    chunk_size: int | None = None,
) -> Any:
    """`cross_entropy` of the logits input @ linear_weight.T + linear_bias, which are never held as a whole.

    The definition, names and defaults of torch.nn.functional.linear_cross_entropy.

    Parameters
    ----------
    input : array, shape (..., n_features)
        float16, bfloat16, float32 or float64, of NumPy, CuPy, torch or JAX, with any strides. Not modified.
    linear_weight : array, shape (n_classes, n_features), the dtype of `input`
        The weights of the layer.
    target : array of integers, the shape of `input` without its last axis
        Class of each row, from 0 to n_classes - 1, or `ignore_index`.
    linear_bias : array, shape (n_classes,), the dtype of `input`, optional
        What is added to the logits of each row.
    weight : array, shape (n_classes,), optional
        A factor for each class, as in `cross_entropy`.
    ignore_index : int
        Rows with this label have loss 0; "mean" does not count them.
    reduction : "mean", "sum" or "none"
        "none" gives the loss of each row. "mean" is NaN where no row counts.
    label_smoothing : float, 0 to 1
        Share of the probability that is spread evenly over all classes.
    validate : bool, optional
        Whether a label that is neither a class nor `ignore_index` raises IndexError. By default it does on the CPU;
        on a GPU it would wait for the device, and the loss of such a row (and every gradient it reaches) is NaN.
    chunk_size : int, optional
        Rows whose logits are held at a time. By default as many as have 64 MiB of logits on the CPU and 256 MiB on a
        GPU, shared out evenly. Results differ by rounding: BLAS may add up in another order.

    Returns
    -------
    array or NumPy scalar, float32 (float64 for float64 input)
        A single number for "mean" and "sum", the shape of `target` for "none".

    Raises
    ------
    IndexError
        A label out of range, see `validate`; nothing has been computed.
    TypeError
        `target` not of integers; arrays of different libraries, devices or dtypes; unsupported dtypes; a torch tensor
        that requires grad; arrays of a library that is not known to multiply matrices.
    ValueError
        Shapes that do not match, no classes, an unknown reduction, or a bad chunk_size.

    Notes
    -----
    Matrices are multiplied by the library they belong to. Besides what is returned and the losses of the rows, memory
    is taken for the logits of a chunk and an eighth of that, at least 128 KiB or two rows of `linear_weight`. What BLAS
    does not take as it is, half types on the CPU for instance, is copied: the rows of a chunk, and `linear_weight` a
    part at a time.

    On the CPU half types are multiplied in float32, and so are their logits: BLAS has nothing faster for them, and the
    loss is the more accurate. On a GPU their logits have the dtype of `input`.

    The losses of the rows are added in order, so that the chunk size changes a loss only by what it does to the logits.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import linear_cross_entropy
    >>> hidden, head = np.ones((2, 3)), np.zeros((4, 3))
    >>> float(linear_cross_entropy(hidden, head, np.array([2, 0])))  # log 4
    1.3862943611198906
    """
    arrays = input, linear_weight, target, linear_bias, weight
    options = ignore_index, reduction, label_smoothing, validate, chunk_size
    return _linear_cross_entropy(*arrays, *options, 1.0, (False, False, False)).loss


def linear_cross_entropy_with_grad(
    input: Any,
    linear_weight: Any,
    target: Any,
    *,
    linear_bias: Any = None,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    validate: bool | None = None,
    chunk_size: int | None = None,
    grad_scale: Any = 1.0,
    return_dinput: bool = True,
    return_dlinear_weight: bool = True,
    return_dlinear_bias: bool = True,
) -> LinearCrossEntropyGrad:
    """`linear_cross_entropy` and its gradients with respect to the input, the weights and the bias of the layer.

    Each chunk of logits is made once and becomes its gradient in place: three products of matrices, as many as with all
    logits at hand.

    Parameters
    ----------
    input, linear_weight, target, linear_bias, weight, ignore_index, reduction, label_smoothing, validate, chunk_size
        As in `linear_cross_entropy`.
    grad_scale : float, or array of floats, the shape of `target`
        Multiplies the gradients (not the loss): the loss scale of mixed-precision training, for instance. One number
        for each row is the gradient with respect to its loss, as backpropagation has it for "none".
    return_dinput, return_dlinear_weight, return_dlinear_bias : bool
        Which gradients to compute; without a `linear_bias` there is none of it. The first two cost a product each.

    Returns
    -------
    LinearCrossEntropyGrad
        A named tuple of arrays, of the kind and on the device of `input`, or None for what was not asked for:

        loss : array or NumPy scalar
            As `linear_cross_entropy` returns it.
        dinput : the shape and dtype of `input`
            grad_scale times the gradient of the loss ("none": of the sum of the losses). Exactly 0 in ignored rows.
        dlinear_weight : the shape and dtype of `linear_weight`
            Ignored rows add nothing to it, whatever they hold.
        dlinear_bias : the shape and dtype of `linear_bias`
            Likewise.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`.

    Notes
    -----
    Gradients of the weights and the bias are summed over the chunks in float32 (float64 for float64). Half types take
    float32 arrays of their size for that, and are rounded once, at the end.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import linear_cross_entropy_with_grad
    >>> hidden, head = np.ones((1, 3)), np.zeros((4, 3))
    >>> linear_cross_entropy_with_grad(hidden, head, np.array([2])).dlinear_weight
    array([[ 0.25,  0.25,  0.25],
           [ 0.25,  0.25,  0.25],
           [-0.75, -0.75, -0.75],
           [ 0.25,  0.25,  0.25]])
    """
    arrays = input, linear_weight, target, linear_bias, weight
    options = ignore_index, reduction, label_smoothing, validate, chunk_size
    wanted = return_dinput, return_dlinear_weight, return_dlinear_bias and linear_bias is not None
    return _linear_cross_entropy(*arrays, *options, grad_scale, wanted)


def _linear_cross_entropy(
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    ignore_index,
    reduction,
    label_smoothing,
    validate,
    chunk_size,
    grad_scale,
    wanted,
) -> LinearCrossEntropyGrad:
    x = _arrays.logits(input, "input")
    layer_weight = _arrays.logits(linear_weight, "linear_weight")
    labels = _arrays.wrap(target, "target")
    row_scale = grad_scale if getattr(grad_scale, "ndim", 0) else None
    grad_scale = _checks.scalar(grad_scale, "grad_scale") if row_scale is None else 1.0
    bias, class_weight, row_scale = (
        None if array is None else _arrays.logits(array, name)
        for array, name in ((linear_bias, "linear_bias"), (weight, "weight"), (row_scale, "grad_scale"))
    )
    for array, name in (
        (layer_weight, "linear_weight"),
        (labels, "target"),
        (bias, "linear_bias"),
        (class_weight, "weight"),
        (row_scale, "grad_scale"),
    ):
        if array is not None:
            _checks.same_home(x, array, "input", name)
    for array, name in ((layer_weight, "linear_weight"), (bias, "linear_bias")):
        if array is not None:
            _checks.same_dtype(x, array, "input", name)
    _checks.integer(labels.dtype, "target")
    _checks.layer(x.shape, layer_weight.shape)
    n_classes, _ = layer_weight.shape
    _checks.class_count(n_classes, "linear_weight")
    _checks.column_count(n_classes)
    batch_shape = x.shape[:-1]
    _checks.same_shape(labels, batch_shape, "target", f"to match input {x.shape} without its last axis")
    if row_scale is not None:
        _checks.same_shape(row_scale, batch_shape, "grad_scale", "one number for each row")
    if bias is not None:
        _checks.same_shape(bias, (n_classes,), "linear_bias", "one number for each class")
    if class_weight is not None:
        _checks.same_shape(class_weight, (n_classes,), "weight", "one factor for each class")
    _checks.reduction(reduction)
    label_smoothing = _checks.label_smoothing(label_smoothing)
    ignore_index = _checks.ignore_index(ignore_index)
    chunk_size = _checks.chunk_size(chunk_size)
    _checks.multiplies_matrices(x)

    kernels, of_batch = _arrays.kernels(x.place, "cross_entropy"), _arrays.kernels(x.place, "batch")
    labels = _arrays.reshaped(labels, (labels.size,), "target")
    all_rows = _rows_of(labels, slice(0, labels.size), n_classes)
    if _labels.are_checked(x, validate):
        _labels.check(x, *all_rows, ignore_index)

    dtype = _arrays.compute_dtype(x)
    nothing = Numbers(0, dtype)
    if class_weight is not None:
        class_weight = _arrays.contiguous(class_weight, dtype)
    weights = nothing if class_weight is None else _arrays.numbers(class_weight)
    # The small results that later kernels read stay referenced until those have been started.
    weight_sum = _arrays.empty(x, (1,), dtype) if class_weight is not None and label_smoothing else None
    if weight_sum is not None:
        of_batch.total(n_classes, weights, nothing, _arrays.numbers(weight_sum), x.place)
    normaliser = _arrays.empty(x, (1,), dtype) if reduction == "mean" else None
    if normaliser is not None:
        of_batch.normalise(*all_rows, 1, weights, nothing, _arrays.numbers(normaliser), ignore_index, x.place)
    sums = [nothing if array is None else _arrays.numbers(array) for array in (weight_sum, normaliser)]

    losses = _arrays.empty(x, batch_shape, dtype)
    gradients = [
        _arrays.empty(x, like.shape, like.dtype) if is_wanted else None
        for like, is_wanted in zip((x, layer_weight, bias), wanted, strict=True)
    ]
    ignored = _labels.ignored(labels, ignore_index) if any(wanted) else None
    with np.errstate(all="ignore"), _arrays.current_device(x):
        for chunk, logits in _layer.chunks(x, layer_weight, bias, gradients, row_scale, ignored, chunk_size):
            rows, label_rows = _rows_of(labels, chunk, n_classes)
            loss_rows = Operand(losses.pointer + chunk.start * losses.itemsize, 0, 1, 0, dtype)
            logit_rows = Operand(logits.pointer, 0, n_classes, 1, logits.dtype)
            kernels.cross_entropy(
                rows,
                logit_rows,
                label_rows,
                loss_rows,
                logit_rows if any(wanted) else NO_OPERAND,
                weights,
                *sums,
                ignore_index,
                label_smoothing,
                grad_scale,
                x.place,
            )
    loss = losses
    if reduction != "none":
        loss = _arrays.empty(x, (), dtype)
        of_batch.total(losses.size, _arrays.numbers(losses), sums[1], _arrays.numbers(loss), x.place)
    results = (None if array is None else _arrays.result(array) for array in (loss, *gradients))
    return LinearCrossEntropyGrad(*results)


def _rows_of(labels: Array, chunk: slice, n_classes: int) -> tuple[Rows, Labels]:
    """Some of the rows, which have one label each, for a kernel."""
    n_rows, (stride,) = chunk.stop - chunk.start, labels.strides
    pointer = labels.pointer + chunk.start * stride * labels.itemsize
    return Rows(n_rows, max(n_rows, 1), n_classes), Labels(pointer, 0, stride, label_code(labels.dtype))
