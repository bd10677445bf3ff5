"""cross_entropy with everything that it can be given and asked for, and its backward from the lse, on every target.

Options come in a pairwise covering set: every pair of values of two options occurs in a case. Each kind of target and
each way to walk rows is a kernel to compile: by default some go together, all of them under the marker `matrix`.
"""

import itertools

import numpy as np
import pytest

import gpusoftmax
from tests import inputs, oracle
from tests.emulator import emulated_gpu
from tests.tolerances import FORMATS

MATRIX = pytest.mark.matrix
OTHER_DTYPES = [pytest.param(one, marks=MATRIX) for one in ("float16", "bfloat16", "float64")]
UNIT = {"float64": 2.0**-53}

TARGET = ["labels", "shares", "probs"]
COLUMNS = [7, 300, 4099]
WEIGHT = [None, "class", "class, some 0"]
ROW_WEIGHT = [None, "row", "row, some 0"]
SMOOTHING = [0.0, 0.1, 1.0]
Z_LOSS = [0.0, 0.01]
REDUCTION = ["none", "sum", "mean", "mean of a normalizer"]
OPTIONS = [TARGET, COLUMNS, WEIGHT, ROW_WEIGHT, SMOOTHING, Z_LOSS, REDUCTION]


def covering_cases(options):
    """Cases in which every pair of values of two options occurs, chosen greedily: the same in every run."""
    pairs = {
        (one, a, two, b)
        for (one, values), (two, others) in itertools.combinations(enumerate(options), 2)
        for a, b in itertools.product(values, others)
    }
    every, cases = list(itertools.product(*options)), []
    while pairs:
        best = max(every, key=lambda case: len(pairs & pairs_of(case)))
        cases.append(best)
        pairs -= pairs_of(best)
    return cases


def pairs_of(case):
    return {(one, a, two, b) for (one, a), (two, b) in itertools.combinations(enumerate(case), 2)}


COMPILED = {("labels", 4099), ("probs", 4099), ("probs", 7), ("shares", 300)}
CASES = [
    pytest.param(case, marks=[] if case[:2] in COMPILED else MATRIX, id="-".join(map(str, case)))
    for case in covering_cases(OPTIONS)
]


def make(kind, n_cols, dtype, seed=0, without=("masked", "huge")):
    """(logits, target, shares), with rows that are ignored and labels that stand there twice."""
    rng = np.random.default_rng(seed)
    logits = inputs.every_family(2, n_cols, dtype, seed=seed, without=list(without))
    n_rows = len(logits)
    computed = "float64" if dtype == "float64" else "float32"
    if kind == "labels":
        labels = np.where(
            rng.random(n_rows) < 0.5, logits.astype(np.float64).argmax(1), rng.integers(0, n_cols, n_rows)
        )
        return logits, np.where(rng.random(n_rows) < 0.2, -100, labels), None
    if kind == "shares":
        labels = rng.integers(0, n_cols, (n_rows, 5))
        labels[:, 3] = labels[:, 0]
        labels[rng.random(labels.shape) < 0.2] = -100
        labels[1] = -100
        return logits, labels, rng.random((n_rows, 5)).astype(computed)
    probs = rng.random((n_rows, n_cols)) ** 8
    probs[:, 1::3] = 0
    return logits, (probs / probs.sum(1, keepdims=True)).astype(logits.dtype), None


def weights_for(case, n_rows, dtype, seed=0):
    _, n_cols, weight, row_weight, *_ = case
    rng = np.random.default_rng(seed + 1)
    made = []
    for kind, size in ((weight, n_cols), (row_weight, n_rows)):
        values = rng.uniform(0.1, 3, size)
        if kind and kind.endswith("some 0"):
            values[rng.random(size) < 0.3] = 0
        made.append(None if kind is None else values.astype("float64" if dtype == "float64" else "float32"))
    return made


def everything(target, logits, labels, shares, **options):
    """(CrossEntropy, dlogits) as NumPy arrays."""
    on = {name: target.array(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    on.update(return_z_loss=True, return_lse=True, return_correct=shares is None and labels.dtype.kind == "i")
    told, dlogits = gpusoftmax.cross_entropy_with_grad(target.array(logits), given(target, labels, shares), **on)
    return gpusoftmax.CrossEntropy(*(None if one is None else target.get(one) for one in told)), target.get(dlogits)


def given(target, labels, shares):
    return target.array(labels) if shares is None else (target.array(labels), target.array(shares))


def check_rows(name, got, want, tolerance):
    got = np.asarray(got).astype(np.longdouble)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    off = np.where(same, 0, np.abs(got - want))
    assert np.all(off <= tolerance), f"{name} is off by up to {np.max(off / np.maximum(tolerance, 1e-300)):.3g} bounds"


def check_gradient(got, want, factor, upstream, dtype, more=0.0):
    """As in tolerances.check_dlogits: 32 units of what probabilities and target are multiplied by, and a rounding."""
    unit = UNIT.get(dtype, 2.0**-24)
    rounding = np.abs(want * factor) * (FORMATS[dtype].unit if dtype in ("float16", "bfloat16") else 0)
    least = float(np.finfo("float16").smallest_subnormal) if dtype == "float16" else 1e-38
    bound = (32 + more) * unit * np.abs(upstream)[:, None] * abs(factor)
    check_rows("dlogits", got, want * factor, bound + rounding * 1.05 + least)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", *OTHER_DTYPES])
def test_options(target, case, dtype):
    kind, n_cols, _, _, smoothing, z_loss, reduction = case
    logits, labels, shares = make(kind, n_cols, dtype)
    weight, row_weight = weights_for(case, len(logits), dtype)
    options = {"label_smoothing": smoothing, "z_loss": z_loss, "row_weight": row_weight, "weight": weight}
    expected = oracle.full_cross_entropy(logits, labels, shares=shares, **options)
    told, dlogits = everything(
        target, logits, labels, shares, **options, reduction=reduction[:4], grad_scale=-0.5,
        normalizer=12.5 if reduction.endswith("normalizer") else None,
    )  # fmt: skip
    unit = UNIT.get(dtype, 2.0**-24)
    bounds = 40 * unit * (expected.terms + expected.upstream)
    divisor = divisor_of(reduction, kind, labels, weight, row_weight, expected)
    want = {"loss": expected.loss, "z_loss": expected.z_loss}
    if reduction != "none":
        want = {name: values.sum() / divisor for name, values in want.items()}
        bounds = bounds.sum() / divisor
    for name, value in want.items():
        check_rows(name, getattr(told, name), value, bounds)
    # The bound of check_logsumexp.
    computed = FORMATS["float64" if dtype == "float64" else "float32"]
    check_rows("lse", told.lse, expected.lse, 2 * computed.ulp(np.maximum(1, np.abs(expected.lse))))
    if kind == "labels":
        assert told.n_correct.dtype == np.int64 and told.n_correct == expected.n_correct
    check_gradient(dlogits, expected.dlogits, -0.5 / divisor, expected.upstream, dtype)


def divisor_of(reduction, kind, labels, weight, row_weight, expected):
    if reduction == "mean of a normalizer":
        return np.longdouble(12.5)
    if reduction != "mean":
        return np.longdouble(1)
    each = np.ones(len(expected.loss), np.longdouble) if row_weight is None else row_weight.astype(np.longdouble)
    if kind == "labels" and weight is not None:
        each = each * weight.astype(np.longdouble)[np.maximum(labels, 0)]
    return each[expected.counted].sum()


@pytest.mark.parametrize("smoothing", [0.999, 1.0])
@pytest.mark.parametrize("n_cols", [7, 4099])
def test_z_loss_of_probabilities_that_smoothing_leaves_nothing_of(target, n_cols, smoothing):
    """It refers to the probabilities as they were before: their sum cannot be had from that of the smoothed ones."""
    logits, probs, _ = make("probs", n_cols, "float32")
    weight, row_weight = weights_for(("probs", n_cols, "class", "row, some 0"), len(logits), "float32")
    options = {"label_smoothing": smoothing, "z_loss": 0.01, "row_weight": row_weight, "weight": weight}
    expected = oracle.full_cross_entropy(logits, probs, **options)
    told, dlogits = everything(target, logits, probs, None, **options, reduction="none")
    bounds = 40 * 2.0**-24 * (expected.terms + expected.upstream)
    check_rows("loss", told.loss, expected.loss, bounds)
    check_rows("z_loss", told.z_loss, expected.z_loss, bounds)
    check_gradient(dlogits, expected.dlogits, 1.0, expected.upstream, "float32")


@pytest.mark.parametrize("n_cols", [7, 4099])
def test_z_loss_of_rows_that_smoothing_has_more_of_than_their_target(target, n_cols):
    """Probabilities that add up to little, or to nothing, beside others in the same warp."""
    logits, probs, _ = make("probs", n_cols, "float32")
    probs[::3] *= np.float32(2.0**-16)
    probs[1::3] = 0
    weight, row_weight = weights_for(("probs", n_cols, "class", "row, some 0"), len(logits), "float32")
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "row_weight": row_weight, "weight": weight}
    expected = oracle.full_cross_entropy(logits, probs, **options)
    told, dlogits = everything(target, logits, probs, None, **options, reduction="none")
    bounds = 40 * 2.0**-24 * expected.terms
    check_rows("loss", told.loss, expected.loss, bounds)
    check_rows("z_loss", told.z_loss, expected.z_loss, bounds)
    check_gradient(dlogits, expected.dlogits, 1.0, expected.upstream, "float32")


BACKWARD = {("labels", 4099), ("shares", 300), ("probs", 300)}
"""By default: a way to walk rows for each kind of target, whose two kernels are compiled for it."""


@pytest.mark.parametrize("dtype", ["float32", *OTHER_DTYPES])
@pytest.mark.parametrize(
    ("kind", "n_cols", "smoothing", "in_place"),
    [
        pytest.param(kind, *rest, marks=[] if (kind, rest[0]) in BACKWARD else MATRIX)
        for kind, rest in itertools.product(TARGET, [(300, 0.0, True), (4099, 0.1, False)])
    ],
)
def test_backward(target, kind, dtype, n_cols, smoothing, in_place):
    logits, labels, shares = make(kind, n_cols, dtype, without=("masked", "huge", "offset"))
    weight, row_weight = weights_for((kind, n_cols, "class", "row, some 0"), len(logits), dtype)
    options = {"label_smoothing": smoothing, "z_loss": 0.01, "row_weight": row_weight, "weight": weight}
    expected = oracle.full_cross_entropy(logits, labels, shares=shares, **options)
    on = {name: target.array(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    x = target.array(logits.copy())
    soft = given(target, labels, shares)
    lse = gpusoftmax.cross_entropy(x, soft, return_lse=True, reduction="none", **on).lse
    dloss = np.random.default_rng(3).normal(size=len(logits)).astype(row_weight.dtype)
    result = gpusoftmax.cross_entropy_backward(x, soft, lse, target.array(dloss), out=x if in_place else None, **on)
    assert (result is x) == in_place
    of_rows = dloss.astype(np.longdouble)
    largest = np.abs(expected.lse).max()  # an lse that is rounded moves every probability of its row
    check_gradient(
        target.get(result), expected.dlogits * of_rows[:, None], 1.0, expected.upstream * of_rows, dtype, more=largest
    )


def test_backward_of_strided_gradients_and_rows(target):
    """dloss of stride 0 and of every second element; rows along another axis; any batch shape."""
    logits = inputs.make("spread", (40, 6), np.float32).reshape(2, 20, 6).transpose(0, 2, 1)[:, ::2]  # (2, 3, 20)
    labels = np.random.default_rng(0).integers(0, 3, (2, 20))
    x, y = target.array(logits), target.array(labels)
    lse = gpusoftmax.cross_entropy(x, y, axis=1, return_lse=True).lse
    for dloss in (np.float32(0.25), np.broadcast_to(np.float32(0.25), (2, 20)), np.ones((2, 40), "f4")[:, ::2] / 4):
        got = gpusoftmax.cross_entropy_backward(x, y, lse, target.array(np.asarray(dloss)), axis=1)
        _, want = gpusoftmax.cross_entropy_with_grad(x, y, axis=1, reduction="sum", grad_scale=0.25)
        np.testing.assert_allclose(target.get(got), target.get(want), rtol=0, atol=1e-6)


def test_one_hot_targets_are_labels(target):
    """The same loss three ways; n_correct counts ties as argmax does."""
    logits = np.round(inputs.make("spread", (9, 40), np.float32) / 4)
    labels = logits.argmax(1)
    labels[::2] = np.random.default_rng(0).integers(0, 40, 5)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "weight": np.linspace(0.5, 2, 40).astype("f4")}
    told, dlogits = everything(target, logits, labels, None, reduction="sum", **options)
    assert told.n_correct == (target.get(gpusoftmax.argmax(target.array(logits))) == labels).sum() > 0
    one_hot = np.eye(40, dtype=np.float32)[labels]
    pairs = (one_hot, None), (labels[:, None], np.ones((9, 1), np.float32))
    for soft, shares in pairs:
        other, gradient = everything(target, logits, soft, shares, reduction="sum", **options)
        np.testing.assert_allclose(other.loss, told.loss, rtol=1e-6)
        np.testing.assert_allclose(other.z_loss, told.z_loss, rtol=1e-6)
        np.testing.assert_allclose(gradient, dlogits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [kind if kind == "labels" else pytest.param(kind, marks=MATRIX) for kind in TARGET])
def test_the_loss_alone_has_the_same_bits(target, kind):
    logits, labels, shares = make(kind, 300, "float32")
    options = {"z_loss": 0.01, "reduction": "none"}
    told, _ = everything(target, logits, labels, shares, **options)
    returned = {"return_z_loss": True, "return_lse": True, "return_correct": kind == "labels"}
    soft = given(target, labels, shares)
    alone = gpusoftmax.cross_entropy(target.array(logits), soft, **options, **returned)
    for one, other in zip(told, alone, strict=True):
        assert (one is None) == (other is None)
        assert one is None or np.asarray(one).tobytes() == np.asarray(target.get(other)).tobytes()


def test_a_class_without_probability_may_be_masked(target):
    """0 inf is 0 here; a masked class that has any gives an infinite loss."""
    logits = inputs.make("spread", (3, 40), np.float32)
    logits[:, [5, 9]] = -np.inf
    probs = np.full((3, 40), 1 / 37, np.float32)
    probs[:, [5, 9, 11]] = 0
    probs[2, 9] = 0.5
    told, dlogits = everything(target, logits, probs, None, reduction="none")
    expected = oracle.full_cross_entropy(logits, probs)
    np.testing.assert_allclose(told.loss[:2], expected.loss[:2].astype(float), rtol=1e-5)
    assert told.loss[2] == np.inf and np.isfinite(dlogits).all() and not dlogits[:2, [5, 9]].any()


def test_rows_of_weight_zero_are_not_read(target):
    logits = inputs.make("spread", (4, 300), np.float32)
    logits[1] = np.nan
    row_weight = np.array([1, 0, 2, 0.5], np.float32)
    for kind in TARGET:
        _, labels, shares = make(kind, 300, "float32")
        labels, shares = labels[:4], None if shares is None else shares[:4]
        labels = np.maximum(labels, 0)
        told, dlogits = everything(target, logits, labels, shares, row_weight=row_weight)
        assert np.isfinite(told.loss) and not dlogits[1].any() and dlogits[[0, 2, 3]].any(axis=1).all()
        assert told.lse[1] == 0


def test_through_a_transform(target):
    """Soft targets and extras of transformed logits: as of logits that were transformed before."""
    logits, labels, shares = make("shares", 300, "float32")
    mask = np.random.default_rng(0).random(logits.shape) < 0.7
    np.put_along_axis(mask, np.maximum(labels, 0), True, axis=1)
    options = {"z_loss": 0.01, "reduction": "sum"}
    through = {"mask": mask, "softcap": 20.0, "temperature": 2.0}
    told, dlogits = everything(target, logits, labels, shares, **options, **through)
    z = 20 * np.tanh(logits.astype(np.longdouble) / 40)
    expected = oracle.full_cross_entropy(np.where(mask, z, -np.inf), labels, shares=shares, z_loss=0.01)
    np.testing.assert_allclose(float(told.loss), float(expected.loss.sum()), rtol=1e-5)
    slope = np.where(mask, (1 - (z / 20) ** 2) / 2, 0)
    np.testing.assert_allclose(dlogits, (expected.dlogits * slope).astype(float), rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("kind", TARGET)
def test_a_temperature_divides_what_the_maximum_was_subtracted_from(target, kind, temperature):
    """Logits with a common offset are not rounded, and such as are near the limit do not overflow."""
    without = ["masked"] if temperature > 1 else ["masked", "huge"]  # whose losses overflow
    logits, labels, shares = make(kind, 300, "float32", without=without)
    options = {"label_smoothing": 0.1, "reduction": "none", "temperature": temperature}
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(target.array(logits), given(target, labels, shares), **options)
    z = logits.astype(np.longdouble) / temperature
    exact = oracle.full_cross_entropy(z, labels, shares=shares, label_smoothing=0.1)
    np.testing.assert_allclose(target.get(loss), exact.loss.astype(float), rtol=1e-5)
    np.testing.assert_allclose(target.get(dlogits), (exact.dlogits / temperature).astype(float), rtol=0, atol=3e-6)


def test_a_small_temperature_overflows_nothing(target):
    x, label = target.array(np.float32([[100, 1]])), target.array(np.zeros(1, np.int64))
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(x, label, temperature=1e-37)
    assert target.get(loss) == 0 and not target.get(dlogits).any()


def test_a_row_that_is_masked_whole_has_nothing(target):
    logits = inputs.make("spread", (3, 40), np.float32)
    mask = np.ones((3, 40), bool)
    mask[1] = False
    for kind in TARGET:
        _, labels, shares = make(kind, 40, "float32")
        labels, shares = np.maximum(labels[:3], 0), None if shares is None else shares[:3]
        options = {"mask": mask, "empty_row": "zero", "z_loss": 0.1, "row_weight": np.full(3, 2.0, np.float32)}
        told, dlogits = everything(target, logits, labels, shares, reduction="none", **options)
        assert told.loss[1] == 0 and told.z_loss[1] == 0 and not dlogits[1].any() and told.loss[[0, 2]].all()


def test_no_prediction_is_correct_where_no_logit_is_left(target):
    logits = np.array([[-np.inf] * 40, [0.0] * 40, [np.nan] * 40, [np.inf] * 40], np.float32)
    told, _ = everything(target, logits, np.zeros(4, np.int64), None, reduction="none")
    assert told.n_correct == 1


def test_a_bad_label_among_several(target):
    logits = inputs.make("spread", (3, 40), np.float32)
    labels, shares = np.array([[1, 2], [3, 40], [5, -100]]), np.full((3, 2), 0.5, np.float32)
    soft = given(target, labels, shares)
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(target.array(logits), soft, reduction="none", validate=False)
    loss, dlogits = target.get(loss), target.get(dlogits)
    assert np.isnan(loss[1]) and np.isnan(dlogits[1]).all() and np.isfinite(loss[[0, 2]]).all()
    with pytest.raises(IndexError, match="40"):
        gpusoftmax.cross_entropy(target.array(logits), soft, validate=True)


def test_normalizer_on_the_device(target):
    logits, labels, _ = make("labels", 40, "float32")
    x, y = target.array(logits), target.array(labels)
    want = target.get(gpusoftmax.cross_entropy_with_grad(x, y, normalizer=7.0))
    for made in (np.full(1, 7, np.float32), np.float32([7]).reshape(())):
        got = target.get(gpusoftmax.cross_entropy_with_grad(x, y, normalizer=target.array(made)))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n_cols", [40, 4099])
def test_lse_has_the_bits_of_logsumexp(target, n_cols):
    """In rows that have no loss too: a NaN, an infinity, both, nothing but -inf."""
    logits = inputs.make("spread", (6, n_cols), np.float32)
    logits[0, 3], logits[1, 4], logits[2, [4, 7]], logits[3] = np.nan, np.inf, [np.nan, np.inf], -np.inf
    x = target.array(logits)
    lse = gpusoftmax.cross_entropy(x, target.array(np.zeros(6, np.int64)), return_lse=True).lse
    np.testing.assert_array_equal(target.get(lse), target.get(gpusoftmax.logsumexp(x)))


def test_numbers_of_another_format(target):
    """One row, whose numbers are arrays without axes, in float64: they are brought to the format of the computation."""
    logits = target.array(inputs.make("spread", (40,), np.float32))
    labels, double = target.array(np.array(3)), target.array(np.array(2.0))
    told = gpusoftmax.cross_entropy(logits, labels, row_weight=double, normalizer=double, return_lse=True)
    plain = gpusoftmax.cross_entropy(logits, labels)
    np.testing.assert_allclose(target.get(told.loss), target.get(plain), rtol=1e-6)
    lse = target.array(np.asarray(target.get(told.lse)).astype(np.float64))
    got = gpusoftmax.cross_entropy_backward(logits, labels, lse, double)
    _, want = gpusoftmax.cross_entropy_with_grad(logits, labels, grad_scale=2.0)
    np.testing.assert_allclose(target.get(got), target.get(want), rtol=0, atol=2e-6)


def test_parts_of_a_batch_add_up():
    """Gradient accumulation: with the number of all tokens as normalizer, parts give what the whole batch does."""
    logits = inputs.make("spread", (12, 50), np.float64)
    labels = np.where(np.arange(12) % 4 == 0, -100, np.arange(12))
    whole, dwhole = gpusoftmax.cross_entropy_with_grad(logits, labels)
    parts = [
        gpusoftmax.cross_entropy_with_grad(logits[k : k + 4], labels[k : k + 4], normalizer=9) for k in range(0, 12, 4)
    ]
    np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-14)
    np.testing.assert_allclose(np.concatenate([dlogits for _, dlogits in parts]), dwhole, rtol=1e-13, atol=1e-18)


def test_many_labels_cost_little():
    """Few columns are labels: the lanes of a warp look together for those among its own. 21431 instructions for 63."""
    logits, executed = inputs.make("spread", (1, 8192), np.dtype(np.float32)), []
    for n_labels in (1, 64):
        labels = np.random.default_rng(0).permutation(8192)[None, :n_labels]
        if n_labels > 8:
            labels[0, -8:] = labels[0, 0] // 4 * 4 + np.arange(8) % 4  # neighbours, and each of them twice
        shares = np.linspace(0.1, 1, n_labels, dtype=np.float32)[None]
        _, expected = gpusoftmax.cross_entropy_with_grad(logits, (labels, shares))
        with emulated_gpu("sm_90", track=False) as gpu:
            soft = gpu.array(labels), gpu.array(shares)
            _, dlogits = gpusoftmax.cross_entropy_with_grad(gpu.array(logits), soft)
            np.testing.assert_allclose(gpu.get(dlogits), expected, rtol=1e-5, atol=1e-6)
            executed.append(max(sum(stats.warp_instructions.values()) for stats in gpu.stats))
    assert executed[1] - executed[0] < 22000


@pytest.mark.parametrize(
    ("dtype", "of_probs"),
    [(inputs.BFLOAT16, inputs.BFLOAT16), (inputs.BFLOAT16, np.float32), (np.float32, np.float32)],
    ids=["bfloat16", "bfloat16 and float32", "float32"],
)
def test_probabilities_come_by_granules_which_are_on_their_way(dtype, of_probs):
    """Sixteen bytes of each lane, once for the loss and once for the gradient, and each line is asked for before."""
    n_cols = 8192
    logits = inputs.make("spread", (1, n_cols), dtype)
    probs = oracle.softmax(inputs.make("spread", (1, n_cols), np.float32, seed=1)).astype(of_probs)
    with emulated_gpu("sm_90") as gpu:
        held = gpu.array(probs)
        gpusoftmax.cross_entropy_with_grad(gpu.array(logits), held, reduction="none")
        (stats,) = (stats for stats in gpu.stats if held._allocation.start in stats.traffic)
        stats.settle()
        loads = stats.traffic[held._allocation.start].requests["ld"]
        fetches = stats.warp_instructions["prefetch.global.L2"]
    assert loads == 2 * probs.nbytes / (32 * 16)
    assert fetches >= probs.nbytes / (32 * 128)
