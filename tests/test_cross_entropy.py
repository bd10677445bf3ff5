"""cross_entropy and its fused gradient: bounds, options, labels and layouts on every target."""

import itertools
import math

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.cross_entropy import _with_divisor
from gpusoftmax.kernels.cuda.plan import PART_ROWS
from tests import inputs, oracle, tolerances

N_COLS = [
    1,  # one class: loss 0, gradient 0
    31,  # less than a warp, less than a vector strip
    512,  # all that the smallest block holds
    4099,  # five chunks of the GPU, three of the CPU; rows of 16-byte vectors never align
]
ROW_DTYPE = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def run(target, logits, labels, weight=None, **options):
    """Loss and gradient of NumPy arrays, back as NumPy arrays."""
    weight = None if weight is None else target.array(weight)
    return target.get(gpusoftmax.cross_entropy_with_grad(target.array(logits), target.array(labels), weight, **options))


def run_loss(target, logits, labels, weight=None, **options):
    weight = None if weight is None else target.array(weight)
    return target.get(gpusoftmax.cross_entropy(target.array(logits), target.array(labels), weight, **options))


def check(loss, dlogits, logits, labels, weight=None, grad_scale=1.0, **options):
    assert loss.dtype == ROW_DTYPE[logits.dtype.name] and dlogits.dtype == logits.dtype
    tolerances.check_loss(loss, logits, labels, weight, **options)
    tolerances.check_dlogits(dlogits, logits, labels, weight, grad_scale=grad_scale, **options)


def mixed_labels(logits, seed=0):
    """By turns a label that is not masked, the most likely one, and any: it may be masked, its loss infinite."""
    kinds = [inputs.targets_unmasked(logits, seed), inputs.targets_at_max(logits), inputs.targets(*logits.shape)]
    return np.choose(np.arange(len(logits)) % 3, kinds)


def class_weights(n_cols, dtype, zeros=False):
    rng = np.random.default_rng(n_cols)
    weight = rng.uniform(0.1, 3, n_cols)
    if zeros:
        weight[rng.random(n_cols) < 0.3] = 0
        weight[:1] = 0
        weight[-1:] = 2
    return weight.astype("float64" if dtype == "float64" else "float32")


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", N_COLS)
def test_matches_oracle(target, dtype, n_cols):
    logits = inputs.every_family(2, n_cols, dtype, seed=n_cols)
    labels = mixed_labels(logits)
    loss, dlogits = run(target, logits, labels, reduction="none")
    check(loss, dlogits, logits, labels, reduction="none")
    assert loss[np.isfinite(loss)].min() >= 0


# ---------------------------------------------------------------- options

# Every pair of values of two options occurs in a row (test_all_pairs_of_options_occur).
DTYPE = ["float16", "bfloat16", "float32", "float64"]
COLUMNS = [2, 31, 300, 4099]
REDUCTION = ["mean", "sum", "none"]
WEIGHT = [None, "positive", "some 0"]
SMOOTHING = [0.0, 0.1, 1.0]
IGNORED = [
    "nothing",
    "-100",
    "class 0",  # ignore_index may be a class
    "all",
]
SCALE = [1.0, 1024.0, -0.5]
OPTIONS = [DTYPE, COLUMNS, REDUCTION, WEIGHT, SMOOTHING, IGNORED, SCALE]
CASES = [
    ("bfloat16", 2, "mean", None, 0.1, "all", -0.5),
    ("bfloat16", 2, "none", "some 0", 1.0, "all", -0.5),
    ("bfloat16", 31, "sum", "positive", 0.1, "-100", -0.5),
    ("bfloat16", 300, "none", "positive", 1.0, "-100", -0.5),
    ("bfloat16", 4099, "mean", None, 1.0, "class 0", 1024.0),
    ("bfloat16", 4099, "sum", "some 0", 0.0, "nothing", 1.0),
    ("float16", 2, "none", "positive", 1.0, "-100", -0.5),
    ("float16", 2, "sum", None, 1.0, "class 0", -0.5),
    ("float16", 31, "mean", None, 0.1, "class 0", -0.5),
    ("float16", 31, "mean", "some 0", 0.0, "nothing", 1024.0),
    ("float16", 300, "mean", "some 0", 0.1, "all", 1024.0),
    ("float16", 300, "sum", None, 0.1, "class 0", 1024.0),
    ("float16", 4099, "mean", "positive", 0.1, "all", 1.0),
    ("float32", 2, "mean", None, 0.0, "all", 1.0),
    ("float32", 31, "none", "some 0", 1.0, "class 0", 1.0),
    ("float32", 300, "none", "positive", 0.1, "nothing", -0.5),
    ("float32", 4099, "sum", "positive", 0.1, "-100", 1024.0),
    ("float64", 2, "none", None, 1.0, "nothing", 1024.0),
    ("float64", 31, "sum", None, 0.1, "all", -0.5),
    ("float64", 300, "mean", None, 0.0, "-100", 1.0),
    ("float64", 300, "none", "positive", 0.0, "class 0", -0.5),
    ("float64", 4099, "none", "some 0", 0.1, "-100", -0.5),
]


def test_all_pairs_of_options_occur():
    for one, two in itertools.combinations(range(len(OPTIONS)), 2):
        occurring = {(case[one], case[two]) for case in CASES}
        assert occurring == set(itertools.product(OPTIONS[one], OPTIONS[two]))


@pytest.mark.parametrize(("dtype", "n_cols", "reduction", "weight", "smoothing", "ignored", "scale"), CASES)
def test_options(target, dtype, n_cols, reduction, weight, smoothing, ignored, scale):
    # One infinite loss would hide all others in a sum: masked and huge rows are in test_edge_cases.py.
    logits = inputs.every_family(2, n_cols, dtype, without=["masked", "huge"])
    labels = inputs.targets(len(logits), n_cols, share_ignored={"-100": 0.3, "all": 1}.get(ignored, 0))
    weight = None if weight is None else class_weights(n_cols, dtype, zeros=weight == "some 0")
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "ignore_index": 0 if ignored == "class 0" else -100,
    }
    loss, dlogits = run(target, logits, labels, weight, grad_scale=scale, **options)
    check(loss, dlogits, logits, labels, weight, scale, **options)
    if n_cols != 4099:
        assert run_loss(target, logits, labels, weight, **options).tobytes() == loss.tobytes()


@pytest.mark.parametrize("reduction", REDUCTION)
def test_all_ignored(target, reduction):
    logits = np.full((4, 40), np.nan, np.float32)
    loss, dlogits = run(target, logits, np.full(4, -100), reduction=reduction)
    expected = {"mean": np.nan, "sum": 0.0, "none": np.zeros(4)}[reduction]
    np.testing.assert_array_equal(loss, expected)
    assert not dlogits.any()


@pytest.mark.parametrize("ignore_index", [-100, 3, 2**63 - 1, -(2**63)])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(target, ignore_index):
    logits = inputs.make("spread", (4, 40), np.float32)
    logits[1:3] = [[np.nan], [np.inf]]
    labels = np.array([5, ignore_index, ignore_index, 39])
    loss, dlogits = run(target, logits, labels, reduction="sum", ignore_index=ignore_index, label_smoothing=0.1)
    check(loss, dlogits, logits, labels, reduction="sum", ignore_index=ignore_index, label_smoothing=0.1)
    assert math.isfinite(loss) and not dlogits[1:3].any() and dlogits[[0, 3]].all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_valid_rows_of_total_weight_zero(target, smoothing):
    """As in torch: the mean is NaN, also where smoothing makes the sum above it positive."""
    logits = inputs.make("spread", (4, 40), np.float32)
    labels = np.array([7, 7, -100, 7])
    weight = class_weights(40, "float32")
    weight[7] = 0
    loss, dlogits = run(target, logits, labels, weight, label_smoothing=smoothing)
    assert np.isnan(loss)
    assert np.isnan(dlogits[[0, 1, 3]]).all() and not dlogits[2].any()
    loss, dlogits = run(target, logits, labels, weight, label_smoothing=smoothing, reduction="sum")
    check(loss, dlogits, logits, labels, weight, label_smoothing=smoothing, reduction="sum")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_a_label_without_weight_that_cannot_be(target, label_smoothing):
    """0 inf is 0: what a vocabulary is padded with, as a label. Where the row holds a NaN, the loss is."""
    logits, weight = inputs.make("spread", (3, 40), np.float32), class_weights(40, "float32")
    labels = np.array([39, 38, 39])
    logits[:, -2:], weight[-2:] = -np.inf, 0
    logits[2, 5] = np.nan
    loss, dlogits = run(target, logits, labels, weight, reduction="none", label_smoothing=label_smoothing)
    smoothed = oracle.full_cross_entropy(logits[:2], np.full((2, 40), label_smoothing / 40), weight)
    np.testing.assert_allclose(loss[:2], smoothed.loss.astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(dlogits[:2], smoothed.dlogits.astype(np.float32), atol=1e-6)
    assert np.isnan(loss[2]) and np.isnan(dlogits[2]).any()


@pytest.mark.parametrize("n_cols", [40, 4099])
def test_smoothing_over_masked_classes_without_weight(target, n_cols):
    """0 inf is 0 here, too: classes that a vocabulary is padded with add nothing. One that has a weight is infinite."""
    logits = inputs.make("spread", (3, n_cols), np.float32)
    labels, weight = np.array([3, 0, 7]), class_weights(n_cols, "float32")
    logits[:, -9:], weight[-9:] = -np.inf, 0
    logits[2, 5] = -np.inf
    loss, dlogits = run(target, logits, labels, weight, reduction="none", label_smoothing=0.1)
    expected = oracle.full_cross_entropy(logits, labels, weight, label_smoothing=0.1)
    np.testing.assert_allclose(loss, expected.loss.astype(np.float32), rtol=1e-6)
    np.testing.assert_allclose(dlogits, expected.dlogits.astype(np.float32), atol=1e-6)
    assert np.isfinite(loss[:2]).all() and loss[2] == np.inf and not dlogits[:, -9:].any()


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_grad_scale_multiplies_the_gradient_alone(target, dtype):
    logits, labels = inputs.make("spread", (3, 40), dtype), inputs.targets(3, 40)
    loss, dlogits = run(target, logits, labels, reduction="sum")
    scaled_loss, scaled = run(target, logits, labels, reduction="sum", grad_scale=256.0)
    assert scaled_loss.tobytes() == loss.tobytes()
    # A power of two only shifts the exponent, except of what was rounded as a subnormal before.
    normal = np.abs(dlogits.astype(np.float64)) >= float(tolerances.FORMATS[dtype.name].tiny)
    assert normal.any() and np.array_equal(scaled[normal], (dlogits * dtype.type(256))[normal])
    assert not run(target, logits, labels, reduction="sum", grad_scale=0.0)[1].any()


def test_weight_in_the_dtype_of_half_logits():
    logits, labels = inputs.make("spread", (5, 40), np.float16), inputs.targets(5, 40)
    weight = class_weights(40, "float32").astype(np.float16)
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(logits, labels, weight)
    check(loss, dlogits, logits, labels, weight)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_confident_rows(target, dtype):
    """Gaps of 5 ... 80 at 1000 classes. torch gives 0 from 17 on in float32; the truth at 30 is 9.35e-11."""
    gaps = np.arange(5, 81, 5)
    logits = np.zeros((len(gaps), 1000), dtype)
    logits[:, 500] = gaps
    loss = run_loss(target, logits, np.full(len(gaps), 500), reduction="none")
    unit = 2.0**-53 if dtype == np.float64 else 2.0**-24
    for value, gap in zip(loss.tolist(), gaps.tolist(), strict=True):
        assert value == pytest.approx(math.log1p(999 * math.exp(-gap)), rel=(24 + gap) * unit, abs=0)


@pytest.mark.parametrize("offset", [2.0**13, -(2.0**20), 2.0**100])  # the last one swallows every gap
def test_common_offset(target, offset):
    """lse - x would lose all digits; (max - x) + log s loses none."""
    logits = np.random.default_rng(0).integers(-8, 8, (6, 100)).astype(np.float32) + np.float32(offset)
    labels = inputs.targets(6, 100)
    for smoothing in (0.0, 0.1):
        loss, dlogits = run(target, logits, labels, reduction="none", label_smoothing=smoothing)
        check(loss, dlogits, logits, labels, reduction="none", label_smoothing=smoothing)


def test_mean_of_many_rows(target):
    """More rows than the block has threads that adds them up, of very different size."""
    logits = inputs.make("confident", (300, 3), np.float32)
    labels = inputs.targets(300, 3, share_ignored=0.1)
    for reduction in ("mean", "sum"):
        loss = run_loss(target, logits, labels, reduction=reduction)
        tolerances.check_loss(loss, logits, labels, reduction=reduction)


def test_sums_of_more_rows_than_one_block_adds_up(target):
    """What several blocks have found, of very different size, is added up by one more."""
    n_rows = 2 * PART_ROWS + 37
    logits = inputs.make("confident", (n_rows, 2), np.float32)
    labels = inputs.targets(n_rows, 2, share_ignored=0.3)
    row_weight = np.random.default_rng(0).random(n_rows).astype(np.float32)
    loss, dlogits = run(target, logits, labels)
    check(loss, dlogits, logits, labels)
    found = gpusoftmax.cross_entropy(
        target.array(logits), target.array(labels), row_weight=target.array(row_weight), return_correct=True
    )
    want = oracle.full_cross_entropy(logits, labels, row_weight=row_weight)
    counted = labels != -100
    mean = want.loss.sum() / row_weight[counted].sum(dtype=np.longdouble)
    np.testing.assert_allclose(float(target.get(found.loss)), float(mean), rtol=1e-6)
    assert int(target.get(found.n_correct)) == (oracle.argmax(logits) == labels)[counted].sum()


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_place(target, dtype):
    logits, labels = inputs.make("spread", (4, 4099), dtype), inputs.targets(4, 4099, share_ignored=0.25)
    loss, dlogits = run(target, logits, labels)
    place = target.array(logits.copy())
    loss_in_place, result = gpusoftmax.cross_entropy_with_grad(place, target.array(labels), out=place)
    assert result is place
    assert target.get(result).tobytes() == dlogits.tobytes()
    assert target.get(loss_in_place).tobytes() == loss.tobytes()


def test_dtype_of_out_decides_that_of_the_gradient():
    logits, labels = inputs.make("spread", (5, 100), np.float16), inputs.targets(5, 100)
    for dtype in inputs.DTYPES:
        out = np.empty((5, 100), dtype)
        loss, dlogits = gpusoftmax.cross_entropy_with_grad(logits, labels, out=out)
        assert dlogits is out and loss.dtype == np.float32
        tolerances.check_dlogits(dlogits, logits, labels)


@pytest.mark.parametrize("reduction", REDUCTION)
def test_torch_layout(target, reduction):
    """(N, C, d1, d2) with labels (N, d1, d2), as torch takes them."""
    logits = inputs.make("spread", (2, 7, 3, 5), np.float32)
    labels = inputs.targets(30, 7, share_ignored=0.2).reshape(2, 3, 5)
    weight = class_weights(7, "float32")
    options = {"axis": 1, "reduction": reduction, "label_smoothing": 0.1}
    loss, dlogits = run(target, logits, labels, weight, **options)
    assert dlogits.shape == logits.shape and loss.shape == (labels.shape if reduction == "none" else ())
    check(loss, dlogits, logits, labels, weight, **options)


def test_one_row_without_batch(target):
    logits = inputs.make("spread", (40,), np.float32)
    loss, dlogits = run(target, logits, np.array(39), reduction="none")
    assert loss.shape == () and dlogits.shape == (40,)
    check(loss, dlogits, logits, np.array(39), reduction="none")


# ---------------------------------------------------------------- labels

CLASSES = 300
BOUNDARY = [
    *(-(2**63), -101, -100, -1),
    *(0, CLASSES - 1, CLASSES, CLASSES + 1),
    200,  # a class for uint8, whose sign bit it sets
    *(2**16 + 3, 2**32 + 3),  # class 3 for code that narrows labels to 16 or 32 bits
    *(2**31 - 1, 2**31, 2**32, 2**63 - 1),
    2**64 - 100,  # -100 for code that reads uint64 as int64
]
LABEL_DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


def boundary_labels(dtype):
    """The labels of BOUNDARY that the dtype holds and the ends of its range; the first is a class."""
    lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
    return [0, *(label for label in [lowest, highest, *BOUNDARY] if lowest <= label <= highest)]


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_labels_out_of_range_are_nan_rows(target, dtype):
    labels = boundary_labels(dtype)
    logits = inputs.make("spread", (len(labels), CLASSES), np.float32)
    array = np.array(labels, dtype)
    loss, dlogits = run(target, logits, array, reduction="none", validate=False)
    check(loss, dlogits, logits, array, reduction="none")
    for label, row_loss, row in zip(labels, loss, dlogits, strict=True):
        if label == -100:
            assert row_loss == 0 and not row.any()
        elif 0 <= label < CLASSES:
            assert row_loss > 0 and row.all()
        else:
            assert np.isnan(row_loss) and np.isnan(row).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_label_out_of_range_makes_the_mean_nan(target, reduction):
    """Rather than a mean of other rows than were asked for."""
    logits, labels = inputs.make("spread", (3, CLASSES), np.float32), np.array([0, CLASSES, 5])
    loss, dlogits = run(target, logits, labels, reduction=reduction, validate=False)
    check(loss, dlogits, logits, labels, reduction=reduction)
    assert np.isnan(loss) and np.isnan(dlogits[1]).all() and np.isfinite(dlogits[[0, 2]]).all()


@pytest.mark.parametrize("dtype", LABEL_DTYPES)
def test_validation_names_the_first_bad_row(target, dtype):
    logits = target.array(inputs.make("spread", (5, CLASSES), np.float32))
    before = np.full((5, CLASSES), 7, np.float32)
    out = target.array(before.copy())
    for label in boundary_labels(dtype):
        if label == -100 or 0 <= label < CLASSES:
            continue
        labels = target.array(np.array([3, 0, label, 5, label], dtype))
        with pytest.raises(IndexError, match=r"target\[2\] .* from 0 to 299 or ignore_index \(-100\)"):
            gpusoftmax.cross_entropy_with_grad(logits, labels, out=out, validate=True)
    assert np.array_equal(target.get(out), before)


def test_valid_labels_pass_validation(target):
    logits = inputs.make("spread", (3, CLASSES), np.float32)
    labels = np.array([0, -100, CLASSES - 1])
    checked = run_loss(target, logits, labels, validate=True)
    assert checked.tobytes() == run_loss(target, logits, labels, validate=False).tobytes()


def test_validation_by_default_only_where_it_waits_for_nobody(target):
    logits, labels = target.array(np.zeros((2, 5), np.float32)), target.array(np.array([0, 5]))
    if target.name == "cpu":
        with pytest.raises(IndexError, match=r"target\[1\] .* is 5, expected"):
            gpusoftmax.cross_entropy(logits, labels)
    else:
        loss = target.get(gpusoftmax.cross_entropy(logits, labels, reduction="none"))
        assert np.isfinite(loss[0]) and np.isnan(loss[1])


def test_bad_row_is_counted_in_c_order(target):
    labels = np.zeros((4, 3), np.int32).T
    labels[[2, 0], [1, 3]] = 9  # in memory (2, 1) comes first
    with pytest.raises(IndexError, match=r"target\[3\] "):
        gpusoftmax.cross_entropy(target.array(np.zeros((3, 4, 5), np.float32)), target.array(labels), validate=True)


@pytest.mark.parametrize("dtype", LABEL_DTYPES[:6])  # all 64-bit numbers that ignore_index may be fit the others
def test_ignore_index_that_the_label_dtype_cannot_hold(target, dtype):
    """It ignores no row: labels and ignore_index are compared in 64 bits, not in those of the labels."""
    labels = np.array([0, 3, 4], dtype)
    logits = inputs.make("spread", (3, 5), np.float32)
    bits = 8 * labels.itemsize
    for ignore_index in (2**bits + 3, 3 - 2**bits):  # both are 3 in `bits` bits
        assert (run_loss(target, logits, labels, ignore_index=ignore_index, reduction="none") > 0).all()


def test_huge_uint64_label_is_not_the_largest_ignore_index(target):
    labels = np.array([1, 2**64 - 100, 2**63 - 1], np.uint64)
    loss = run_loss(
        target, np.zeros((3, 5), np.float32), labels, ignore_index=2**63 - 1, reduction="none", validate=False
    )
    assert loss[0] > 0 and np.isnan(loss[1]) and loss[2] == 0


def test_huge_uint64_label_is_not_the_smallest_ignore_index(target):
    logits, labels, options = np.zeros((2, 5), np.float32), np.array([1, 2**63], np.uint64), {"ignore_index": -(2**63)}
    loss, dlogits = run(target, logits, labels, reduction="none", validate=False, **options)
    assert loss[0] > 0 and np.isnan(loss[1]) and np.isnan(dlogits[1]).all()
    logprob = gpusoftmax.token_logprobs(target.array(logits), target.array(labels), validate=False, **options).logprob
    assert np.isnan(target.get(logprob)[1])
    with pytest.raises(IndexError, match=r"is above 2\^63 - 1, .*ignore_index \(-9223372036854775808\)"):
        gpusoftmax.cross_entropy(target.array(logits), target.array(labels), validate=True, **options)


def test_good_calls_after_bad_labels_are_unchanged(target):
    logits, labels = inputs.make("spread", (3, 40), np.float32), np.array([1, 2, 3])
    before = run(target, logits, labels)
    run(target, logits, np.array([1, 2**40, -7]), validate=False)
    after = run(target, logits, labels)
    assert [part.tobytes() for part in before] == [part.tobytes() for part in after]


def test_definitions_agree():
    """The oracle's loss is the textbook one: guards the tests above against an oracle that is wrong everywhere."""
    logits, labels = inputs.make("spread", (4, 6), np.float64), inputs.targets(4, 6)
    textbook = [
        math.log(sum(math.exp(x) for x in row)) - row[y] for row, y in zip(logits.tolist(), labels, strict=True)
    ]
    assert np.allclose(oracle.cross_entropy(logits, labels, reduction="none").astype(float), textbook, rtol=1e-12)


def test_a_divisor_that_stays_on_the_device(target):
    """What gpusoftmax.torch makes gradients of: "mean" says what it divided by, and a gradient computed later, with the
    same bits, is divided by what is found there. Twice, for calls on a GPU are replayed.
    """
    logits = inputs.make("spread", (4, 40), "float32")
    labels, weight = np.array([3, -100, 7, 39]), class_weights(40, "float32")
    placed = [target.array(one) for one in (logits, labels, weight)]
    loss, dlogits = (target.get(one) for one in gpusoftmax.cross_entropy_with_grad(*placed, label_smoothing=0.1))
    for upstream in (1.0, 3.0):
        divisor = target.array(np.zeros(1, np.float32))
        got, nothing = _with_divisor(*placed, None, divisor, -1, -100, "mean", 0.1, None, 1.0, False)
        assert nothing is None and target.get(got) == loss
        found = target.get(divisor)
        np.testing.assert_allclose(found, weight[[3, 7, 39]].sum(), rtol=1e-6)
        out, scaled = target.array(np.empty_like(logits)), target.array(found / np.float32(upstream))
        _, later = _with_divisor(*placed, out, scaled, -1, -100, "none", 0.1, False, 1.0, True)
        if upstream == 1:
            assert np.array_equal(target.get(later), dlogits)
        np.testing.assert_allclose(target.get(later), upstream * dlogits, rtol=1e-6)
