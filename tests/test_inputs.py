"""The inputs are what they say they are."""

import numpy as np
import pytest

from tests import inputs

SHAPE = (12, 300)


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("family", sorted(inputs.FAMILIES))
def test_families(family, dtype):
    logits = inputs.make(family, SHAPE, dtype)
    assert logits.shape == SHAPE and logits.dtype == dtype
    assert logits.tobytes() == inputs.make(family, SHAPE, dtype).tobytes()
    assert logits.tobytes() != inputs.make(family, SHAPE, dtype, seed=1).tobytes()
    wide = logits.astype(np.float64)
    assert np.isfinite(wide).all() or family == "masked"
    assert np.isfinite(wide).any(axis=1).all()


@pytest.mark.parametrize("family", sorted(inputs.FAMILIES))
def test_any_shape(family):
    for shape in ((0, 5), (3, 0), (1, 1), (2, 3, 4), (7,)):
        assert inputs.make(family, shape, np.float32).shape == shape


def test_every_family():
    logits = inputs.every_family(2, 50, np.float16, seed=3, without=["spread"])
    assert logits.shape == (2 * (len(inputs.FAMILIES) - 1), 50) and logits.dtype == np.float16
    assert logits[-2:].tobytes() == inputs.make("sorted", (2, 50), np.float16, seed=3).tobytes()


def test_confident_gaps():
    logits = np.sort(inputs.make("confident", SHAPE, np.float64), axis=1)
    gaps = logits[:, -1] - logits[:, -2]
    assert 5 <= gaps.min() < 7 and gaps.max() >= 80


def test_masks_of_ones_own():
    mask = inputs.mask((2, 64), span=4, period=4, groups=[0, 2])
    np.testing.assert_array_equal(mask[1].reshape(4, 4, 4).all(axis=2), [[True, False, True, False]] * 4)
    assert inputs.mask((3, 64), structure="but one").sum() == 3 * 63
    assert inputs.mask((3, 64), structure="head")[:, :50].all()
    assert np.isneginf(inputs.make("masked", SHAPE, np.float32, whole_rows=2)).all(axis=1).sum() == 2


def test_targets():
    labels = inputs.targets(40, 9, ignore_index=3, share_ignored=0.5)
    assert (labels == 3).sum() >= 20
    assert {0, 8} <= set(inputs.targets(2, 9, dtype=np.uint8))
    logits = inputs.make("masked", SHAPE, np.float16)
    for chosen in (inputs.targets_unmasked(logits), inputs.targets_at_max(logits)):
        assert np.isfinite(np.take_along_axis(logits, chosen[:, None], axis=1)).all()


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_layouts(dtype):
    constant = np.full((4, 6), 1.5, dtype)
    for array, missing in (
        (inputs.make("spread", (8, 6), dtype), {"0-stride rows", "0-stride columns"}),
        (inputs.make("flat", (4, 6), dtype), {"0-stride rows"}),
        (constant, set()),
    ):
        views = dict(inputs.layouts(array))
        assert len(views) == 15 - len(missing) and not missing & views.keys()
        for view in views.values():
            assert view.reshape(array.shape).tobytes() == array.tobytes()
    strides = {view.strides for view in views.values()}
    assert len(strides) == 12  # C, row slice, odd offset and read-only share theirs
    assert views["odd offset"].ctypes.data % 16 == dtype.itemsize
    assert not views["read-only"].flags.writeable
