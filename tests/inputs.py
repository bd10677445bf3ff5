"""Logits, labels and memory layouts for the tests. Rows run along the last axis; everything follows from `seed`.

Small-variance noise alone hides bugs (at 128k columns a kernel that writes only the target's gradient passes with it),
so each family aims at one weakness:

    spread      normal, std 5                        the ordinary case
    peaked      normal + 3 outliers x20 per row      a few columns carry the row
    flat        one value per row                    the longest sums; row 1 holds -log(V), whose logsumexp is near 0
    masked      spread with -inf in every structure  -inf - -inf in lanes, warps, tiles, chunks and merges
    huge        near the dtype's limit               overflow of x - max; finite sentinels in place of -inf
    ties        the maximum occurs many times        s - 1 must count them
    offset      spread + 1e4                         cancellation in lse - x
    confident   maximum ahead by 5 ... 80            loss of s - 1
    sorted      ascending                            every chunk raises the maximum
"""

import math

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))

# Less for the half types, whose neighbouring values should there be no further apart than about 0.5.
OFFSETS = {"float16": 1e3, "bfloat16": 1e2, "float32": 1e4, "float64": 1e4}

# What is masked in a row: column c goes when (c // span) % period is in a random half of 0 ... period - 1.
# period None: as many as the row has spans, so whole spans go, independently of each other.
STRUCTURES = {
    "random": (1, None),
    "lanes": (1, 32),
    "vector lanes": (4, 32),
    "half vector lanes": (8, 32),
    "warps": (32, 8),
    "vector warps": (128, 8),
    "tiles": (256, None),
    "chunks": (1024, None),
}


def make(family, shape, dtype, seed=0, **options):
    """Logits of one family. `masked` takes the options of `mask`, and `whole_rows`: how many rows to mask entirely."""
    dtype = np.dtype(dtype)
    *batch, n_cols = shape
    rng = np.random.default_rng([seed, *family.encode()])
    rows = np.empty((math.prod(batch), n_cols))
    if rows.size:
        rows[:] = FAMILIES[family](rng, rows.shape, dtype, **options)
    return rows.astype(dtype).reshape(shape)


def _spread(rng, shape, dtype):
    return 5 * rng.standard_normal(shape)


def _peaked(rng, shape, dtype):
    rows = rng.standard_normal(shape)
    for row in rows:
        outliers = rng.choice(len(row), min(3, len(row)), replace=False)
        row[outliers] = 20 * np.abs(row[outliers])
    return rows


def _flat(rng, shape, dtype):
    value = 5 * rng.standard_normal((shape[0], 1))
    value[1:2] = -np.log(shape[1])
    return np.broadcast_to(value, shape)


def _masked(rng, shape, dtype, *, whole_rows=0, **structure):
    rows = _spread(rng, shape, dtype)
    rows[mask(shape, rng=rng, **structure)] = -np.inf
    rows[:whole_rows] = -np.inf
    return rows


def _huge(rng, shape, dtype):
    limit = float(ml_dtypes.finfo(dtype).max)
    rows = rng.uniform(0.5, 0.999, shape) * limit
    signs = rng.choice([-1.0, 1.0], shape)
    signs[1::3], signs[2::3] = -1, 1  # a row's maximum may itself be near -limit
    return rows * signs


def _ties(rng, shape, dtype):
    rows = np.round(2 * rng.standard_normal(shape))
    for number, row in enumerate(rows):
        n_ties = round(len(row) ** (number % 4 / 4)) + 1  # from a pair, far apart, to hundreds
        row[rng.choice(len(row), min(n_ties, len(row)), replace=False)] = row.max() + 1
    return rows


def _offset(rng, shape, dtype):
    return _spread(rng, shape, dtype) + OFFSETS[dtype.name]


def _confident(rng, shape, dtype):
    rows = rng.standard_normal(shape)
    gaps = np.linspace(5, 80, shape[0]) if shape[0] > 1 else [30.0]
    for row, gap in zip(rows, gaps, strict=True):
        row[rng.integers(len(row))] = row.max() + gap
    return rows


def _sorted(rng, shape, dtype):
    return np.sort(_spread(rng, shape, dtype), axis=1)


FAMILIES = {
    "spread": _spread,
    "peaked": _peaked,
    "flat": _flat,
    "masked": _masked,
    "huge": _huge,
    "ties": _ties,
    "offset": _offset,
    "confident": _confident,
    "sorted": _sorted,
}


def every_family(n_rows, n_cols, dtype, seed=0, *, without=()):
    """`n_rows` rows of each family in one array, in the order of FAMILIES: one launch in place of nine."""
    names = [family for family in FAMILIES if family not in without]
    return np.concatenate([make(family, (n_rows, n_cols), dtype, seed) for family in names])


def mask(shape, *, rng=None, structure=None, span=None, period=None, groups=None):
    """True where a logit is to be -inf; every row keeps at least one column.

    Parameters
    ----------
    shape : (n_rows, n_cols)
    structure : name in STRUCTURES, "head", "tail" (all but a few columns at the other end) or "but one".
        Without any option, rows take all of these in turn.
    span, period : a structure of one's own, read as in STRUCTURES.
    groups : which of the `period` groups are masked, in place of a random half.
    """
    rng = np.random.default_rng(0) if rng is None else rng
    names = [structure] if structure is not None else [*STRUCTURES, "head", "tail", "but one"]
    masked = np.zeros(shape, bool)
    for number, row in enumerate(masked):
        if span is not None:
            row[:] = _masked_spans(len(row), span, period, groups, rng)
        else:
            row[:] = _masked_structure(len(row), names[number % len(names)], rng)
        if row.all() and len(row):
            row[rng.integers(len(row))] = False
    return masked


def _masked_structure(n_cols, name, rng):
    columns = np.arange(n_cols)
    if name == "head":
        return columns < n_cols - rng.integers(1, 9)
    if name == "tail":
        return columns >= rng.integers(1, 9)
    if name == "but one":
        return np.ones(n_cols, bool)
    return _masked_spans(n_cols, *STRUCTURES[name], None, rng)


def _masked_spans(n_cols, span, period, groups, rng):
    period = -(-n_cols // span) if period is None else period
    groups = rng.permutation(period)[: (period + 1) // 2] if groups is None else groups
    return np.isin((np.arange(n_cols) // span) % period, groups)


# Labels


def targets(n_rows, n_cols, *, ignore_index=-100, share_ignored=0.0, dtype=np.int64, seed=0):
    """Random labels, the first and the last column among them, with `share_ignored` of the rows ignored."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_cols, n_rows).astype(dtype)
    labels[:1], labels[1:2] = n_cols - 1, 0
    if share_ignored:  # an unsigned type may not hold ignore_index
        labels[rng.choice(n_rows, round(n_rows * share_ignored), replace=False)] = ignore_index
    return labels


def targets_at_max(logits):
    """The first maximum of each row (last axis): the rows with the smallest losses."""
    return np.argmax(logits.astype(np.float64), axis=-1)


def targets_unmasked(logits, seed=0):
    """Random labels among the columns above -inf, so that every loss is finite."""
    scores = np.random.default_rng(seed).random(logits.shape)
    return np.argmax(np.where(logits > -np.inf, scores, -1), axis=-1)


# Layouts


def layouts(array):
    """Views of the same values in different memory: a list of (name, view), view.reshape(array.shape) equals array.

    `array` is (n_rows, n_cols). What lies around a view in its buffer is NaN. Zero-stride views come only with rows
    (or columns) that are all equal, views of three and four dimensions only where n_rows divides by 4.
    """
    n_rows, n_cols = array.shape
    itemsize = array.dtype.itemsize
    views = [
        ("C", array.copy(order="C")),
        ("F", array.copy(order="F")),
        ("row slice", _placed(array, (n_rows + 3, n_cols), np.s_[2:-1])),
        ("column slice", _placed(array, (n_rows, n_cols + 5), np.s_[:, 3:-2])),
        ("step 2", _placed(array, (2 * n_rows, 2 * n_cols), np.s_[::2, 1::2])),
        ("reversed", _placed(array, array.shape, np.s_[::-1, ::-1])),
        ("padded pitch", _placed(array, (n_rows, n_cols + 7), np.s_[:, :n_cols])),
        ("odd offset", _at_odd_offset(array)),
        ("size-1 dims", _with_size_one_dims(array)),
        ("read-only", _read_only(array)),
    ]
    if n_rows and _same_bits(array, array[:1]):
        views.append(("0-stride rows", as_strided(array[:1].copy(), array.shape, (0, itemsize))))
    if n_cols and _same_bits(array, array[:, :1]):
        views.append(("0-stride columns", as_strided(array[:, 0].copy(), array.shape, (itemsize, 0))))
    if n_rows and n_rows % 4 == 0:
        half, part = n_rows // 2, n_rows // 4
        views += [
            # stride(-1) is 1 and the rows are dense, yet not in the order of one row stride
            ("transposed", array.reshape(2, half, n_cols).transpose(1, 0, 2).copy().transpose(1, 0, 2)),
            ("3-D", _placed(array.reshape(2, half, n_cols), (2, half + 1, n_cols), np.s_[:, 1:])),
            ("4-D", _placed(array.reshape(2, 2, part, n_cols), (2, 3, part + 1, n_cols + 1), np.s_[:, 1:, 1:, 1:])),
        ]
    return views


def _placed(array, buffer_shape, where):
    buffer = np.full(buffer_shape, -1 if array.dtype.kind == "i" else np.nan, array.dtype)
    view = buffer[where]
    view[...] = array
    return view


def _at_odd_offset(array):
    """First element one itemsize past a 16-byte boundary: aligned for the type, for no vector load."""
    itemsize = array.dtype.itemsize
    raw = np.full(array.nbytes + 32, 0xFF, np.uint8)  # 0xFF bytes are a NaN in every float type
    start = (itemsize - raw.ctypes.data) % 16
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _with_size_one_dims(array):
    """Strides of axes of length 1 mean nothing; these would lead far outside the buffer."""
    dense = array.copy()
    row, column = dense.strides
    return as_strided(dense, (1, len(dense), 1, array.shape[1]), (-9973 * column, row, 7 * column, column))


def _read_only(array):
    view = array.copy()
    view.flags.writeable = False
    return view


def _same_bits(array, part):
    return array.tobytes() == np.ascontiguousarray(np.broadcast_to(part, array.shape)).tobytes()
