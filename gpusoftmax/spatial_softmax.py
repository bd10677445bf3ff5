"""Spatial softmax: the expected coordinates of a feature in an image, and their backward."""

from typing import Any

from gpusoftmax import _arrays, _checks, _gradients, _replay, _rows, _transform


def spatial_softmax(
    features: Any, *, temperature: Any = 1.0, mask: Any = None, dtype: Any = None, out: Any = None
) -> Any:
    """The expected coordinates (x, y) of each feature map, under the softmax over all its pixels.

    x runs along the last axis of `features`, to the right, and comes first; y runs along the axis before it, down. Both
    are coordinates of pixels in linspace(-1, 1, size), or 0 where the size is 1.

    Parameters
    ----------
    features : array, shape (..., height, width)
        Typically (batch, channels, height, width). dtypes and kinds as in `softmax`. Any strides; where no single one
        walks the pixels of a map, as in a part of an image, that costs one copy, and takes neither a mask nor a
        temperature for each map.
    temperature : float, or array with the shape of `features` without its last two axes
        Divides the features; finite and above 0. An array has one for each map, and maps where it is not are NaN.
    mask : array of bool, shape (height, width) or that of `features`, where sizes of 1 stand for all, optional
        True keeps a pixel; the others have no probability, whatever they hold.
    dtype : dtype, optional
        Of the result; by default float32, float64 for float64.
    out : array, shape (..., 2), optional
        Where to write the result, which is then what is returned. It decides the dtype.

    Returns
    -------
    array, shape (..., 2)
        (x, y) of each map. NaN for one that holds NaN, +inf or nothing but -inf, or is masked whole. Exactly a pixel's
        coordinates (rounded to the dtype) where it has all the probability. Of a torch tensor that requires grad they
        are differentiable, any number of times.

    Raises
    ------
    TypeError
        As `softmax`.
    ValueError
        As `softmax`, whose axes are here the last two; also for maps without pixels, and for ones of more than 2^22
        pixels to a line.

    Notes
    -----
    The spatial softmax of Levine et al., arXiv:1504.00702, section 5.2, and Finn et al., arXiv:1509.06113, section 4.
    One read of `features`. Places in a line are accurate as the results of `soft_argmax`.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import spatial_softmax
    >>> spatial_softmax(np.array([[0.0, 50.0, 0.0], [0.0, 0.0, 0.0]])).round(6)
    array([ 0., -1.])
    """
    try:
        arrays, options = _transform.split(temperature, None, None, mask, None)
        return _replay.call(_spatial_softmax, (features, out, *arrays), dtype, *options)
    except _arrays.RequiresGrad as refusal:
        argument = refusal.argument
    transform = temperature, None, None, mask, None
    return _gradients.call("spatial_softmax", argument, out, transform, features, dtype)


def _spatial_softmax(features, out, temperatures, bias, mask, valid, dtype, *options):
    pixels = _arrays.logits(features, "features")
    width = _checks.image_width(pixels.shape, "features")
    axes = pixels.ndim - 2, pixels.ndim - 1
    dtype = None if dtype is None else _checks.dtype_name(dtype)
    row_dtype = "float64" if pixels.dtype == "float64" else "float32"
    coordinates = _arrays.output(out, pixels, (*pixels.shape[:-2], 2), row_dtype, dtype)
    _checks.no_overlap(coordinates, pixels, "features")
    arrays, compute_dtype = (temperatures, bias, mask, valid), _arrays.compute_dtype(pixels, coordinates)
    pixels, temperature = _transform.applied(pixels, axes, compute_dtype, arrays, options, coordinates, "features")
    kernel = _arrays.kernels(pixels.place, "spatial_softmax").spatial_softmax
    x_and_y = [_rows.per_row(_rows.part(coordinates, k), axes, pixels.ndim) for k in range(2)]
    _rows.for_rows(lambda *rows: kernel(*rows, width, temperature, pixels.place), axes, [pixels], x_and_y)
    return _arrays.result(coordinates, out)


def spatial_softmax_backward(
    features: Any,
    coordinates: Any,
    dcoordinates: Any,
    *,
    temperature: Any = 1.0,
    mask: Any = None,
    out: Any = None,
) -> Any:
    """Gradient with respect to the features of `spatial_softmax`, from its result and the gradient of that.

    For the pixel c with coordinates (x_c, y_c) and probability p_c of a map with the result (x, y)

        dfeatures_c = p_c (dx (x_c - x) + dy (y_c - y)) / temperature

    Parameters
    ----------
    features : array, shape (..., height, width)
        As given to `spatial_softmax`.
    coordinates, dcoordinates : array, shape (..., 2)
        The result of `spatial_softmax` and the gradient with respect to it: same dtype, library and device as each
        other, library and device those of `features`; any strides.
    temperature, mask
        As given to `spatial_softmax`. Pixels that are masked have the gradient 0.
    out : array, optional
        Where to write the result; may be `features` itself.

    Returns
    -------
    array, the shape, dtype, kind and device of `features`

    Raises
    ------
    TypeError, ValueError
        As `spatial_softmax`; also when the arrays differ in shape, dtype, library or device.

    Notes
    -----
    One read of `features` where a map can be held, and one write.

    Examples
    --------
    >>> import numpy as np
    >>> from gpusoftmax import spatial_softmax_backward
    >>> spatial_softmax_backward(np.zeros((1, 2)), np.zeros(2), np.array([1.0, 5.0]))
    array([[-0.5,  0.5]])
    """
    arrays, options = _transform.split(temperature, None, None, mask, None)
    return _replay.call(_spatial_softmax_backward, (features, coordinates, dcoordinates, out, *arrays), *options)


def _spatial_softmax_backward(
    features, coordinates, dcoordinates, out, temperatures, bias, mask, valid, *options
):  # fmt: skip
    pixels = _arrays.logits(features, "features")
    width = _checks.image_width(pixels.shape, "features")
    axes = pixels.ndim - 2, pixels.ndim - 1
    points, gradient = _arrays.logits(coordinates, "coordinates"), _arrays.logits(dcoordinates, "dcoordinates")
    for array, name in ((points, "coordinates"), (gradient, "dcoordinates")):
        _checks.same_home(pixels, array, "features", name)
        _checks.same_shape(array, (*pixels.shape[:-2], 2), name, f"to match features {pixels.shape}")
    _checks.same_dtype(points, gradient, "coordinates", "dcoordinates")
    result = _arrays.output(out, pixels, pixels.shape, pixels.dtype)
    arrays, dtype = (temperatures, bias, mask, valid), _arrays.compute_dtype(pixels, points, result)
    pixels, temperature = _transform.applied(pixels, axes, dtype, arrays, options, result, "features")
    _checks.temperature_fits(temperature, dtype)
    _checks.no_partial_overlap(result, pixels, "features")
    _checks.no_overlap(result, points, "coordinates")
    _checks.no_overlap(result, gradient, "dcoordinates")
    kernel = _arrays.kernels(pixels.place, "spatial_softmax").spatial_softmax_backward
    x_and_y = [_rows.part(array, k) for array in (points, gradient) for k in range(2)]
    per_row = [_rows.per_row(array, axes, pixels.ndim) for array in x_and_y]
    _rows.for_rows(lambda *rows: kernel(*rows, width, temperature, pixels.place), axes, [pixels, *per_row], [result])
    return _arrays.result(result, out)
