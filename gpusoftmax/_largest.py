"""The call that finds the column of the largest logit: argmax, and where the softmax at temperature 0 is 1."""

from gpusoftmax import _arrays, _checks, _rows, _transform


def argmax(x, out, temperatures, bias, mask, valid, axis, keepdims, *options):
    """Along one axis, or all of them: what an index along several would mean has no answer for a caller."""
    _checks.axis_or_all(axis, _arrays.logits(x, "x").ndim)
    return along_axes(x, out, temperatures, bias, mask, valid, axis, keepdims, *options)


def along_axes(x, out, temperatures, bias, mask, valid, axis, keepdims, *options):
    """Columns are counted in C order of the axes."""
    logits = _arrays.logits(x, "x")
    axes = _checks.axes(axis, logits.ndim)
    _checks.some_columns(logits.shape, axes, "x")
    indices = _arrays.output(out, logits, _rows.without_axes(logits, axes, keepdims), "int64")
    _checks.no_overlap(indices, logits, "x")
    arrays, dtype = (temperatures, bias, mask, valid), _arrays.compute_dtype(logits)
    logits, _ = _transform.applied(logits, axes, dtype, arrays, options, indices)
    kernel = _arrays.kernels(logits.place, "argmax").argmax
    per_row = _rows.per_row(indices, axes, logits.ndim)
    _rows.for_rows(lambda *rows: kernel(*rows, logits.place), axes, [logits], [per_row])
    return _arrays.result(indices, out)
