"""Spatial softmax: the expected coordinates of a feature in an image."""

from typing import Any

from gpusoftmax import _arrays, _checks, _replay


def spatial_softmax(features: Any, *, temperature: float = 1.0, dtype: Any = None, out: Any = None) -> Any:
    """The expected coordinates (x, y) of each feature map, under the softmax over all its pixels.

    x runs along the last axis of `features`, to the right, and comes first; y runs along the axis before it, down. Both
    are coordinates of pixels in linspace(-1, 1, size), or 0 where the size is 1.

    Parameters
    ----------
    features : array, shape (..., height, width)
        Typically (batch, channels, height, width). dtypes and kinds as in `softmax`. Any strides; where no single one
        walks the pixels of a map, that costs one copy.
    temperature : float
        Divides the features; finite and above 0.
    dtype : dtype, optional
        Of the result; by default float32, float64 for float64.
    out : array, shape (..., 2), optional
        Where to write the result, which is then what is returned. It decides the dtype.

    Returns
    -------
    array, shape (..., 2)
        (x, y) of each map. NaN for one that holds NaN, +inf or nothing but -inf. Exactly a pixel's coordinates (rounded
        to the dtype) where it has all the probability.

    Raises
    ------
    TypeError
        As `softmax`.
    ValueError
        As `softmax`; also for maps without pixels, and for ones of more than 2^24 pixels to a line.

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
    return _replay.call(_spatial_softmax, (features, out), temperature, dtype)


def _spatial_softmax(features, out, temperature, dtype):
    pixels = _arrays.logits(features, "features")
    width = _checks.image_width(pixels.shape, "features")
    axes = pixels.ndim - 2, pixels.ndim - 1
    temperature = _checks.temperature(temperature)
    dtype = None if dtype is None else _checks.dtype_name(dtype)
    row_dtype = "float64" if pixels.dtype == "float64" else "float32"
    coordinates = _arrays.output(out, pixels, (*pixels.shape[:-2], 2), row_dtype, dtype)
    _checks.no_overlap(coordinates, pixels, "features")
    kernel = _arrays.kernels(pixels.place, "spatial_softmax").spatial_softmax
    x_and_y = [_arrays.per_row(_arrays.part(coordinates, k), axes, pixels.ndim) for k in range(2)]
    _arrays.for_rows(lambda *rows: kernel(*rows, width, temperature, pixels.place), axes, [pixels], x_and_y)
    return _arrays.result(coordinates, out)
