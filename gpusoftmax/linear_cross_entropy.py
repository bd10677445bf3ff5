"""The last layer of a classifier and its loss in one: cross-entropy of input @ linear_weight.T + linear_bias.

    Z = X W^T + b        L = cross_entropy(Z, target)        dX = dZ W        dW = dZ^T X        db = sum of dZ's rows

Z, of the size rows x classes, is never there as a whole. A chunk of rows of it is made in one buffer, becomes dZ in its
place by the kernel of cross_entropy_with_grad, is multiplied into the gradients, and gives way to the next. What "mean"
divides by follows from labels and weights, before the first chunk. After Liger's fused linear cross-entropy (Hsu et
al., arXiv:2410.10989) and torch.nn.functional.linear_cross_entropy.
"""

from typing import Any, NamedTuple

import numpy as np

from gpusoftmax import _arrays, _checks, _compilers, _gradients, _labels, _layer, _loss, _loss_rows, _rows, _transform
from gpusoftmax._arrays import Array
from gpusoftmax._loss import CrossEntropy
from gpusoftmax._loss_rows import LossRows


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
    z_loss: float = 0.0,
    row_weight: Any = None,
    normalizer: Any = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_lse: bool = False,
    return_correct: bool = False,
    validate: bool | None = None,
    chunk_size: int | None = None,
) -> Any:
    """`cross_entropy` of the logits input @ linear_weight.T + linear_bias, which are never held as a whole.

    The definition, names and defaults of torch.nn.functional.linear_cross_entropy, with what `cross_entropy` has more.

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
    z_loss : float
        Adds z_loss * lse**2 to the loss of a row, with its weights: weight[target] and row_weight.
    row_weight : array, the shape of `target`, optional
        A factor for each row, gradients included. "mean" divides by its sum, times weight[target]. A row of weight 0
        takes no part, as one with `ignore_index`.
    normalizer : float, or array of one element, optional
        What "mean" divides by instead: the number of tokens in all parts of a batch, for instance.
    temperature : float
        Divides the logits; finite and above 0.
    softcap : float, optional
        Then replaces each logit z by softcap * tanh(z / softcap).
    return_z_loss, return_lse, return_correct : bool
        What else to return.
    validate : bool, optional
        Whether a label that is neither a class nor `ignore_index` raises IndexError. By default it does on the CPU;
        on a GPU it would wait for the device, and the loss of such a row (and every gradient it reaches) is NaN.
    chunk_size : int, optional
        Rows whose logits are held at a time. By default as many as have 64 MiB of logits on the CPU and 256 MiB on a
        GPU, shared out evenly. Results differ by rounding: BLAS may add up in another order.

    Returns
    -------
    array or NumPy scalar, float32 (float64 for float64 input)
        The loss: a single number for "mean" and "sum", the shape of `target` for "none". Differentiable where torch's
        `input`, `linear_weight` or `linear_bias` require grad, see gpusoftmax.torch.
    CrossEntropy
        If more is asked for, a named tuple as `cross_entropy` returns it: loss, z_loss, lse and n_correct.

    Raises
    ------
    IndexError
        A label out of range, see `validate`; nothing has been computed.
    TypeError
        `target` not of integers; arrays of different libraries, devices or dtypes; unsupported dtypes; a `weight`,
        `row_weight`, `normalizer` or `temperature` that requires grad; a temperature for each row; arrays of a library
        that is not known to multiply matrices.
    ValueError
        Shapes that do not match, no classes, an unknown reduction, a `normalizer` without "mean", a bad temperature,
        softcap or chunk_size.

    Notes
    -----
    Matrices are multiplied by the library they belong to. Besides what is returned, and what is told of each row before
    it is summed, memory is taken for the logits of a chunk and an eighth of that, at least 128 KiB or two rows of
    `linear_weight`. What BLAS does not take as it is, half types on the CPU for instance, is copied: the rows of a
    chunk, and `linear_weight` a part at a time.

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
    wanted = bool(return_z_loss), bool(return_lse), bool(return_correct)
    options = ignore_index, reduction, label_smoothing, z_loss
    through, last = (temperature, softcap), (validate, chunk_size)
    placed = input, linear_weight, target, linear_bias, weight, row_weight, normalizer
    try:
        return _linear_cross_entropy(*placed, *options, *through, wanted, *last, 1.0, (False, False, False)).loss
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    return _gradients.call("linear_cross_entropy", argument, None, (), *placed, *options, *through, wanted, *last)


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
    z_loss: float = 0.0,
    row_weight: Any = None,
    normalizer: Any = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_lse: bool = False,
    return_correct: bool = False,
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
    z_loss, row_weight, normalizer, temperature, softcap
        As in `linear_cross_entropy`, gradients included.
    return_z_loss, return_lse, return_correct : bool
        As in `linear_cross_entropy`, whose named tuple then takes the place of the loss.
    grad_scale : float, or array of floats, the shape of `target`
        Multiplies the gradients (not the loss): the loss scale of mixed-precision training, for instance. One number
        for each row is the gradient with respect to its loss, as backpropagation has it for "none".
    return_dinput, return_dlinear_weight, return_dlinear_bias : bool
        Which gradients to compute; without a `linear_bias` there is none of it. The first two cost a product each.

    Returns
    -------
    LinearCrossEntropyGrad
        A named tuple of arrays, of the kind and on the device of `input`, or None for what was not asked for:

        loss : array, NumPy scalar or CrossEntropy
            As `linear_cross_entropy` returns it.
        dinput : the shape and dtype of `input`
            grad_scale times the gradient of the loss ("none": of the sum of the losses). Exactly 0 in rows that are
            ignored or have the weight 0.
        dlinear_weight : the shape and dtype of `linear_weight`
            Such rows add nothing to it, whatever they hold.
        dlinear_bias : the shape and dtype of `linear_bias`
            Likewise.

    Raises
    ------
    IndexError, TypeError, ValueError
        As `linear_cross_entropy`; TypeError also for torch tensors that require grad.

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
    told = bool(return_z_loss), bool(return_lse), bool(return_correct)
    options = ignore_index, reduction, label_smoothing, z_loss, temperature, softcap, told, validate, chunk_size
    placed = input, linear_weight, target, linear_bias, weight, row_weight, normalizer
    wanted = return_dinput, return_dlinear_weight, return_dlinear_bias and linear_bias is not None
    return _linear_cross_entropy(*placed, *options, grad_scale, wanted)


@_compilers.left_alone
def _linear_cross_entropy(
    input, linear_weight, target, linear_bias, weight, row_weight, normalizer, ignore_index, reduction, label_smoothing,
    z_loss, temperature, softcap, told, validate, chunk_size, grad_scale, wanted,
) -> LinearCrossEntropyGrad:  # fmt: skip
    """told: whether z_loss, lse and n_correct are wanted; wanted: which gradients are."""
    x, layer_weight, bias = _checked_layer(input, linear_weight, linear_bias)
    n_classes, dtype = layer_weight.shape[0], _arrays.compute_dtype(x)
    row_scale = None
    if getattr(grad_scale, "ndim", 0):
        grad_scale, row_scale = 1.0, _beside(grad_scale, "grad_scale", x, x.shape[:-1], "one number for each row")
    grad_scale = _checks.scalar(grad_scale, "grad_scale")
    chunk_size = _checks.chunk_size(chunk_size)
    _checks.reduction(reduction)
    normalizer, divide_by = _loss.split_normalizer(normalizer)
    _checks.only_for(normalizer is not None or divide_by is not None, "normalizer", reduction == "mean", reduction)
    if normalizer is not None:
        normalizer = _loss.normalizer_array(normalizer, x, "input", dtype, None)
    options = ignore_index, label_smoothing, z_loss, validate
    rows = _checked_loss(x, n_classes, (target, weight, row_weight), options, temperature, softcap)

    over = _loss_rows.sums(rows, reduction, None, normalizer, divide_by)
    _checks.scale_fits(grad_scale, over.divide_by, divide_by is not None, dtype)
    made = _loss_rows.new_results(rows, reduction, told, dtype)
    gradients = [
        _arrays.empty(x, like.shape, like.dtype) if is_wanted else None
        for like, is_wanted in zip((x, layer_weight, bias), wanted, strict=True)
    ]
    with np.errstate(all="ignore"), _arrays.current_device(x):
        idle = _labels.idle_rows(rows.labels, rows.ignore_index, rows.row_weight) if any(wanted) else None
        for chunk, logits in _layer.chunks(x, layer_weight, bias, gradients, row_scale, idle, chunk_size):
            some, of_rows = _part(rows, made.of_rows, chunk, logits)
            _loss_rows.measure(some, over, of_rows, grad_scale, logits if any(wanted) else None)
    loss, *others = _loss_rows.finished(rows, over, made)
    results = (None if array is None else _arrays.result(array) for array in gradients)
    return LinearCrossEntropyGrad(CrossEntropy(loss, *others) if any(told) else loss, *results)


def _checked_layer(input: Any, linear_weight: Any, linear_bias: Any) -> tuple[Array, Array, Array | None]:
    x, weight = _arrays.logits(input, "input"), _arrays.logits(linear_weight, "linear_weight")
    _checks.same_home(x, weight, "input", "linear_weight")
    _checks.same_dtype(x, weight, "input", "linear_weight")
    _checks.layer(x.shape, weight.shape)
    n_classes, _ = weight.shape
    _checks.class_count(n_classes, "linear_weight")
    _checks.column_count(n_classes)
    bias = _beside(linear_bias, "linear_bias", x, (n_classes,), "one number for each class")
    if bias is not None:
        _checks.same_dtype(x, bias, "input", "linear_bias")
    return x, weight, bias


def _checked_loss(
    x: Array, n_classes: int, given: tuple[Any, Any, Any], options: tuple, temperature: Any, softcap: Any
) -> LossRows:
    """The rows of the logits, which are not there: those of `rows.x` tell their shape, where they would be, and what
    they go through. Labels and weights of rows have one axis.
    """
    target, weight, row_weight = given
    ignore_index, label_smoothing, z_loss, validate = options
    batch_shape, axes, dtype = x.shape[:-1], (x.ndim - 1,), _arrays.compute_dtype(x)
    labels = _arrays.wrap(target, "target")
    _checks.same_home(x, labels, "input", "target")
    _checks.integer(labels.dtype, "target")
    _checks.same_shape(labels, batch_shape, "target", f"to match input {x.shape} without its last axis")
    weight = _beside(weight, "weight", x, (n_classes,), "one factor for each class")
    row_weight = _beside(row_weight, "row_weight", x, batch_shape, "one factor for each row")
    ignore_index, z_loss = _checks.ignore_index(ignore_index), _checks.z_loss(z_loss)
    label_smoothing = _checks.label_smoothing(label_smoothing)
    _checks.factor_fits(z_loss, "z_loss", dtype)
    logits = x._replace(shape=(*batch_shape, n_classes), dtype=dtype)
    (temperatures, *arrays), through = _transform.split(temperature, None, softcap, None, None)
    if temperatures is not None:
        _checks.temperature(temperatures)  # says that it is none
    logits, temperature = _transform.applied(logits, axes, dtype, (None, *arrays), through)
    _checks.temperature_fits(temperature, dtype)
    _checks.multiplies_matrices(x)

    labels = _arrays.reshaped(labels, (labels.size,), "target")
    if _labels.are_checked(x, validate):
        all_rows, all_labels, _ = _rows.all_labels(labels, n_classes)
        _labels.check(x, all_rows, all_labels, ignore_index)
    ignore_index = _labels.index_as_read(ignore_index, labels.dtype)
    if weight is not None:
        weight = _rows.contiguous(weight, dtype)
    if row_weight is not None:
        row_weight = _arrays.reshaped(_rows.contiguous(row_weight, dtype), labels.shape, "row_weight")
    numbers = dtype, ignore_index, label_smoothing, z_loss
    return LossRows(logits, axes, *numbers, weight, labels, None, None, row_weight, temperature)


def _beside(given: Any, name: str, x: Array, shape: tuple[int, ...], reason: str) -> Array | None:
    if given is None:
        return None
    array = _arrays.logits(given, name)
    _checks.same_home(x, array, "input", name)
    _checks.same_shape(array, shape, name, reason)
    return array


def _part(rows: LossRows, of_rows: dict[str, Array], chunk: slice, logits: Array) -> tuple[LossRows, dict[str, Array]]:
    """Some of the rows, whose logits are there now, and the arrays for what is told of them."""
    labels, row_weight = (
        None if array is None else _rows.rows_of(array, chunk) for array in (rows.labels, rows.row_weight)
    )
    x = logits._replace(transform=rows.x.transform)
    some = rows._replace(x=x, axes=(1,), labels=labels, row_weight=row_weight)
    flat = {name: array._replace(shape=rows.labels.shape, strides=(1,)) for name, array in of_rows.items()}
    return some, {name: _rows.rows_of(array, chunk) for name, array in flat.items()}
