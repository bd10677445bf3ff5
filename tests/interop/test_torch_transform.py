"""gpusoftmax.torch of logits that go through a transform: the answers of torch's operations, gradients of any order.

What the kernels compute is tested in tests/test_transform.py; here, that it is differentiated.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import gpusoftmax
import gpusoftmax.torch as ours

INF = float("inf")
MATRIX = pytest.mark.matrix


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed)).to(dtype).requires_grad_()


def packed(mask):
    """A bit for each column along the last axis."""
    padded = F.pad(mask, (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    words = (padded << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def everything(rows=3, n_cols=7):
    """Every option, for logits of shape (rows, n_cols); no row is masked whole, and column 2 nowhere."""
    mask = torch.rand((rows, n_cols), generator=torch.manual_seed(1)) < 0.6
    mask[:, 2] = True
    return {
        "temperature": (torch.rand(rows, generator=torch.manual_seed(2), dtype=torch.float64) + 0.5).requires_grad_(),
        "bias": random(n_cols, seed=3),
        "softcap": 2.0,
        "mask": mask,
        "n_valid": n_cols - torch.arange(rows) % 3,
    }


def through(x, temperature=1.0, bias=None, softcap=None, mask=None, n_valid=None):
    """The transform along the last axis, as anybody would write it."""
    z = x / (temperature[:, None] if isinstance(temperature, torch.Tensor) and temperature.ndim else temperature)
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z if mask is None else z.masked_fill(~mask, -INF)
    if n_valid is None:
        return z
    n_valid = n_valid[:, None] if isinstance(n_valid, torch.Tensor) else n_valid
    return z.masked_fill(torch.arange(x.shape[-1]) >= n_valid, -INF)


TARGET = torch.tensor([2, 2, -100])
W = torch.linspace(0.5, 2, 7, dtype=torch.float64)
SCORES = {"return_lse": True, "return_entropy": True, "return_rank": True}


def floating(scores):
    return tuple(one for one in scores if one is not None and one.is_floating_point())


def their_scores(z):
    log_probs = F.log_softmax(z, -1)
    entropy = -(log_probs.exp() * torch.where(log_probs == -INF, 0, log_probs)).sum(-1)
    picked = torch.where(TARGET == -100, 0, log_probs.gather(1, TARGET.clamp(0)[:, None])[:, 0])
    return picked, z.logsumexp(-1), entropy


PAIRS = {  # of ours, and of torch's for transformed logits
    "softmax": (lambda x, **o: ours.softmax(x, -1, **o), lambda z: F.softmax(z, -1)),
    "log_softmax": (
        lambda x, **o: ours.log_softmax(x, -1, **o).clamp_min(-1e3),
        lambda z: F.log_softmax(z, -1).clamp_min(-1e3),
    ),
    "logsumexp": (lambda x, **o: ours.logsumexp(x, -1, True, **o), lambda z: torch.logsumexp(z, -1, True)),
    "cross_entropy": (
        lambda x, **o: ours.cross_entropy(x, TARGET, W, **o),
        lambda z: F.cross_entropy(z, TARGET, W),
    ),
    "cross_entropy of rows": (
        lambda x, **o: ours.cross_entropy(x, TARGET, reduction="none", **o),
        lambda z: F.cross_entropy(z, TARGET, reduction="none"),
    ),
    "token_logprobs": (lambda x, **o: floating(ours.token_logprobs(x, TARGET, **SCORES, **o)), their_scores),
}
SOME = [name if name in ("softmax", "cross_entropy") else pytest.param(name, marks=MATRIX) for name in PAIRS]
"""Each is a kernel to compile for every way to transform."""


def agree(got, expected, **close):
    got, expected = (one if isinstance(one, tuple) else (one,) for one in (got, expected))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, **{"rtol": 1e-10, "atol": 1e-12, **close})


def tensors(options):
    return [one for one in options.values() if isinstance(one, torch.Tensor) and one.requires_grad]


def gradients(results, wanted):
    results = results if isinstance(results, tuple) else (results,)
    upstream = [torch.linspace(-1, 2, one.numel(), dtype=one.dtype).reshape(one.shape) for one in results]
    return torch.autograd.grad(results, wanted, upstream)


@pytest.mark.parametrize("name", SOME)
def test_values_and_gradients_of_everything(name):
    x, options = random(3, 7), everything()
    function, theirs = PAIRS[name]
    got, expected = function(x, **options), theirs(through(x, **options))
    agree(got, expected)
    agree(gradients(got, [x, *tensors(options)]), gradients(expected, [x, *tensors(options)]))


@pytest.mark.parametrize("name", SOME)
def test_everything_is_differentiable_twice(name):
    options = everything()
    beside = tensors(options)

    def function(x, temperature, bias):
        return PAIRS[name][0](x, **{**options, "temperature": temperature, "bias": bias})

    assert gradcheck(function, (random(3, 7), *beside))
    assert gradgradcheck(function, (random(3, 7), *beside))


WAYS = {
    "temperature of rows": {"temperature": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)},
    "bias": {"bias": torch.linspace(-1, 1, 7, dtype=torch.float64), "temperature": 0.7},
    "bias of rows": {"bias": torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)},
    "softcap": {"softcap": 1.5, "temperature": 0.7},
    "mask": {"mask": torch.arange(7) % 3 != 0, "temperature": 0.7},
    "n_valid": {"n_valid": torch.tensor([7, 3, 5])},
    "n_valid of all": {"n_valid": 5},
}


@MATRIX
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PAIRS)
def test_each_option_is_differentiable_twice(name, way):
    x, options = random(3, 7), WAYS[way]
    function, theirs = PAIRS[name]
    agree(function(x, **options), theirs(through(x, **options)))
    assert gradcheck(lambda x: function(x, **options), x)
    assert gradgradcheck(lambda x: function(x, **options), x)


@MATRIX
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("looked", [True, False], ids=["fused", "in the backward"])
def test_losses_are_differentiable_twice(looked, reduction, smoothing, monkeypatch):
    monkeypatch.setattr(gpusoftmax._torch_losses, "can_look", lambda tensor: looked)
    x, options = random(3, 7), {**everything(), "mask": None, "n_valid": None}

    def function(x):
        return ours.cross_entropy(x, TARGET, W, reduction=reduction, label_smoothing=smoothing, **options)

    expected = F.cross_entropy(through(x, **options), TARGET, W, reduction=reduction, label_smoothing=smoothing)
    agree(function(x), expected)
    assert gradcheck(function, x) and gradgradcheck(function, x)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.filterwarnings("ignore")  # torch's own, of its own functions
def test_forward_mode_and_functional_transforms(name):
    x, v, options = random(3, 7).detach(), random(3, 7, seed=5).detach(), everything()
    options = {key: one.detach() if isinstance(one, torch.Tensor) else one for key, one in options.items()}
    function, theirs = PAIRS[name]

    def both(way):
        agree(way(lambda x: function(x, **options)), way(lambda x: theirs(through(x, **options))))

    def squares(result):
        return sum(one.pow(2).sum() for one in (result if isinstance(result, tuple) else (result,)))

    both(lambda f: torch.func.jvp(f, (x,), (v,))[1])
    both(lambda f: torch.func.grad(lambda x: squares(f(x)))(x))
    both(lambda f: torch.func.jacrev(lambda x: squares(torch.func.grad(lambda x: squares(f(x)))(x)))(x))


LABELS = torch.tensor([0, -100, 2])
IGNORING = {
    "cross_entropy": lambda x, **given: ours.cross_entropy(x, LABELS, **given),
    "rows": lambda x, **given: ours.cross_entropy(x, LABELS, reduction="none", **given).sum(),
    "z_loss": lambda x, **given: ours.cross_entropy(x, LABELS, z_loss=0.1, **given),
    "row_weight": lambda x, **given: ours.cross_entropy(
        x, LABELS.clamp(0), row_weight=torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64), **given
    ),
    "token_logprobs": lambda x, **given: ours.token_logprobs(x, LABELS, **given).logprob.sum(),
    "token_logprobs beside more": lambda x, **given: ours.token_logprobs(x, LABELS, **SCORES, **given).logprob.sum(),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("given", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", IGNORING)
def test_ignored_rows_may_hold_anything_in_any_mode(name, given):
    """Their gradient is 0 where it is differentiated again, too, under torch.func and in forward mode."""
    x, function = random(3, 5), IGNORING[name]
    with torch.no_grad():
        x[1] = torch.nan

    def derivatives(x):
        (first,) = torch.autograd.grad(function(x, **given), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        of_func = torch.func.grad(lambda x: function(x, **given))(x.detach())
        along = torch.func.jvp(lambda x: function(x, **given), (x.detach(),), (torch.ones_like(x),))[1]
        return first, second, of_func, along

    *rows, along = derivatives(x)
    *expected, expected_along = derivatives(x.nan_to_num().detach().requires_grad_())
    assert not any(one[1].any() for one in rows)
    torch.testing.assert_close((*rows, along), (*expected, expected_along), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tangents_behind_a_softcap_are_differentiable():
    x = random(7).detach()

    def second(softmax):
        return torch.func.jacfwd(torch.func.jacfwd(softmax))(x)

    got = second(lambda x: ours.softmax(x, 0, softcap=2.0, temperature=0.7))
    agree(got, second(lambda x: F.softmax(2 * torch.tanh(x / 1.4), 0)))


@MATRIX
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype):
    x, options = random(3, 7, dtype=dtype), everything()
    exact = x.detach().double().requires_grad_()
    for name, tolerance in (("softmax", 0.02), ("cross_entropy", 1e-4)):
        function, theirs = PAIRS[name]
        got, expected = function(x, **options), theirs(through(exact, **options))
        assert got.dtype == (dtype if name == "softmax" else torch.float32)
        agree(got, expected, rtol=tolerance, atol=1e-3)
        found = gradients(got, [x, *tensors(options)])
        assert [one.dtype for one in found] == [dtype, torch.float64, torch.float64]
        wanted = gradients(expected, [exact, *tensors(options)])
        for one, other in zip(found, wanted, strict=True):
            agree(one, other, rtol=0.02, atol=5e-3)


# ---------------------------------------------------------------- what is masked, and rows of nothing


def test_what_is_masked_has_no_gradient():
    """Whatever it holds, and in the second derivative too."""
    x, options = random(3, 7), everything()
    masked = through(torch.zeros(3, 7), mask=options["mask"], n_valid=options["n_valid"]) == -INF
    with torch.no_grad():
        x[masked] = torch.tensor([float("nan"), INF, -INF, 1e300], dtype=x.dtype).repeat(9)[: int(masked.sum())]
    function, _ = PAIRS["cross_entropy"]
    for value in (function(x, **options), PAIRS["softmax"][0](x, **options)[:, 2].sum()):
        (once,) = torch.autograd.grad(value, x, retain_graph=True)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        torch.testing.assert_close(once, first)
        for gradient in (first, second):
            assert gradient.isfinite().all() and (gradient[masked] == 0).all() and (gradient[:, 2] != 0).any()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_whatever_the_bias_is_where_it_is_masked():
    """Behind a softcap, too, whose slope at NaN is none."""
    x, options = random(3, 7), everything()
    kept = through(torch.zeros(3, 7), mask=options["mask"], n_valid=options["n_valid"]) == 0
    bias = torch.where(kept, options.pop("bias").detach(), torch.tensor([float("nan"), INF, -INF] * 7).reshape(3, 7))

    def derivatives(bias):
        def function(x, bias):
            return PAIRS["softmax"][0](x, bias=bias, **options)[:, 2].sum()

        given = x, bias.clone().requires_grad_()
        once = torch.autograd.grad(function(*given), given)
        first = torch.autograd.grad(function(*given), given, create_graph=True)
        second = torch.autograd.grad(sum(one.pow(2).sum() for one in first), given)
        given = x.detach(), bias
        along = torch.func.jvp(function, given, tuple(map(torch.ones_like, given)))[1]
        return *once, *first, *second, *torch.func.grad(function, (0, 1))(*given), along

    found = derivatives(bias)
    agree(found, derivatives(torch.where(kept, bias, 0)))
    assert not any(one[~kept].any() for one in found[:-1])


CANNOT_BE = {
    "cross_entropy": lambda x, **o: ours.cross_entropy(x, torch.tensor([1, 0]), reduction="sum", **o),
    "z_loss": lambda x, **o: ours.cross_entropy(x, torch.tensor([1, 0]), reduction="sum", z_loss=1e-30, **o),
    "probabilities": lambda x, **o: ours.cross_entropy(x, F.one_hot(torch.tensor([1, 0]), 4).double(), **o) * 2,
    "token_logprobs": lambda x, **o: -ours.token_logprobs(x, torch.tensor([1, 0]), **o).logprob.sum(),
    "log_softmax": lambda x, **o: -ours.log_softmax(x, 1, **o)[0, 1],
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[] if name in ("cross_entropy", "log_softmax") or way == "plain" else MATRIX)
        for name in CANNOT_BE
        for way in ("plain", "temperature", "bias", "mask")
    ],
)
def test_the_gradient_at_a_label_that_cannot_be(name, way):
    """As torch has it, in any mode: p - 1 where its logit is -inf, 0 where it is masked."""
    x = torch.tensor([[1.0, -INF, 0.5, 2.0], [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    given = {
        "plain": {},
        "temperature": {"temperature": 2.0},
        "bias": {"bias": torch.zeros(4, dtype=torch.float64)},
        "mask": {"mask": torch.tensor([True, False, True, True])},
    }[way]

    def function(x):
        return CANNOT_BE[name](x, **given)

    x.requires_grad_()
    assert function(x) == INF
    (once,) = torch.autograd.grad(function(x), x)
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    scale = 2 if way == "temperature" else 1
    want = F.softmax(x[0].detach() / scale, -1)
    want[1] = 0 if way == "mask" else -1
    for found in (once, first, torch.func.grad(function)(x.detach())):
        agree(found[0], want / scale)


WITH_EMPTY_ROWS = {
    "softmax": lambda x, row, **o: ours.softmax(x, -1, empty_row=row, **o),
    "log_softmax": lambda x, row, **o: ours.log_softmax(x, -1, empty_row=row, **o).clamp_min(-1e3),
    "cross_entropy": lambda x, row, **o: ours.cross_entropy(x, TARGET, W, empty_row=row, **o),
    "cross_entropy, no weights": lambda x, row, **o: ours.cross_entropy(x, TARGET, empty_row=row, **o),
    "logsumexp": lambda x, row, **o: ours.logsumexp(x, -1, **o).clamp_min(-1e3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["softmax", *(pytest.param(name, marks=MATRIX) for name in list(WITH_EMPTY_ROWS)[1:])])
def test_rows_of_which_nothing_is_left(name):
    x, options = random(3, 7), everything()
    options["mask"][1] = False
    options = {key: one.detach() if isinstance(one, torch.Tensor) else one for key, one in options.items()}
    function = WITH_EMPTY_ROWS[name]
    zero = torch.func.grad(lambda x: function(x, "zero", **options).pow(2).sum())(x.detach())
    (first,) = torch.autograd.grad(function(x, "zero", **options).pow(2).sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(function(x, "zero", **options).pow(2).sum(), x)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    torch.testing.assert_close(zero, first)
    torch.testing.assert_close(zero, again)
    for gradient in (zero, second):
        assert (gradient[1] == 0).all() and gradient.isfinite().all() and gradient[0].any()
    value = function(x.detach(), "nan", **options)
    assert name == "logsumexp" or (value.isnan() if value.ndim == 0 else value[1].isnan().all())


@pytest.mark.parametrize("way", ["mask", "bias"])
def test_the_lse_beside_tokens_of_rows_of_which_nothing_is_left(way):
    """Its gradient there is 0 in every mode, as that of logsumexp."""
    x, kept = random(3, 7), torch.tensor([[True], [False], [True]]).expand(3, 7)
    given = {"mask": kept} if way == "mask" else {"bias": torch.where(kept, 0.0, -INF).double()}

    def function(x):
        lse = ours.token_logprobs(x, torch.tensor([1, -100, 2]), return_lse=True, **given).lse
        return torch.where(kept[:, 0], lse, 0).pow(2).sum()

    (once,) = torch.autograd.grad(function(x), x)
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    agree((first, torch.func.grad(function)(x.detach())), (once, once))
    assert not once[1].any() and not second[1].any() and second[0].all()


def test_rows_of_minus_infinity_without_a_mask():
    x = random(3, 7).detach()
    x[1] = -INF
    x.requires_grad_()
    for recorded in (False, True):
        log_probs = ours.log_softmax(x, -1, empty_row="zero")
        (dx,) = torch.autograd.grad(log_probs, x, torch.ones_like(log_probs), create_graph=recorded)
        assert not dx[1].any() and dx[0].all()


# ---------------------------------------------------------------- the ways to say it


@pytest.mark.parametrize("bits", [False, pytest.param(True, marks=MATRIX)])
def test_bits_are_bools_and_numbers_are_stretched(bits):
    x, options = random(3, 40), everything(3, 40)
    masks = {"mask": options["mask"]}, {"mask": packed(options["mask"]) if bits else options["mask"]}
    for one, other in (
        masks,
        ({"mask": options["mask"][:1].expand(3, 40)}, {"mask": options["mask"][0]}),
        ({"n_valid": torch.full((3,), 33)}, {"n_valid": 33}),
        ({"n_valid": torch.full((3,), 33)}, {"n_valid": torch.tensor(33, dtype=torch.uint8)}),
        ({"temperature": torch.full((3,), 0.5)}, {"temperature": torch.tensor(0.5)}),
    ):
        values = [ours.softmax(x, -1, **{**options, **way}) for way in (one, other)]
        assert torch.equal(*values)
        firsts = [torch.autograd.grad(value.pow(2).sum(), x, create_graph=True)[0] for value in values]
        torch.testing.assert_close(*firsts, rtol=1e-12, atol=0)
        seconds = [torch.autograd.grad(first.pow(2).sum(), x)[0] for first in firsts]
        torch.testing.assert_close(*seconds, rtol=1e-12, atol=0)


def test_one_temperature_that_is_learnt():
    """A tensor without axes, of another dtype than the logits, whose gradient is the sum over the rows."""
    x, options = random(3, 7), {**everything(), "temperature": torch.tensor(0.75, requires_grad=True)}
    function, theirs = PAIRS["cross_entropy"]
    got, expected = function(x, **options), theirs(through(x, **options))
    agree(got, expected)
    wanted = [x, *tensors(options)]
    found, exact = (torch.autograd.grad(one, wanted) for one in (got, expected))
    assert found[1].dtype == torch.float32
    agree(found, tuple(one.double() for one in exact), rtol=1e-6)


def test_the_class_dimension_of_torch():
    x, rows = random(2, 7, 3), everything(6, 7)
    target = torch.tensor([[0, 4, -100], [1, 1, 6]])
    rows["n_valid"] = torch.tensor([7, 5, 6, 7, 7, 7])
    rows["mask"][:] = torch.arange(7) != 3
    moved = through(x.movedim(1, -1).reshape(6, 7), **rows)
    expected = F.cross_entropy(moved, target.reshape(6), W)
    wide = {"temperature": rows["temperature"].reshape(2, 3), "n_valid": rows["n_valid"].reshape(2, 3)}
    last = {**rows, **wide, "mask": rows["mask"].reshape(2, 3, 7)}
    options = {**last, "mask": last["mask"].movedim(-1, 1)}
    for got in (
        ours.cross_entropy(x, target, W, **options),
        gpusoftmax.cross_entropy(x, target, W, axis=1, **options),
        gpusoftmax.cross_entropy(x.movedim(1, -1), target, W, **last),
    ):
        agree(got, expected)
        agree(*(torch.autograd.grad(one, x, retain_graph=True)[0] for one in (got, expected)))


def test_in_place():
    leaf = random(3, 7)
    options = {key: one.detach() if isinstance(one, torch.Tensor) else one for key, one in everything().items()}
    expected = ours.cross_entropy(leaf * 2, TARGET, W, **options)
    hidden = leaf * 2
    version = hidden._version
    got = ours.cross_entropy(hidden, TARGET, W, inplace=True, **options)
    assert hidden._version > version and torch.equal(got, expected)
    (one,), (other,) = (torch.autograd.grad(loss, leaf) for loss in (got, expected))
    torch.testing.assert_close(one, other)
    for name in ("bias", "temperature"):
        given = {**options, name: everything()[name]}
        with pytest.raises(ValueError, match="bias requires grad.*inplace=False"):
            ours.cross_entropy(leaf * 2, TARGET, inplace=True, **given)


# ---------------------------------------------------------------- the core


def test_the_core_goes_there():
    """Wherever a gradient is wanted, and with the same answer as without one."""
    x = random(3, 7)
    for wants in ("x", "bias", "temperature"):
        options = {
            name: one.detach().requires_grad_(name == wants) if name in ("bias", "temperature") else one
            for name, one in everything().items()
        }
        given = x.detach().requires_grad_(wants == "x")
        for call in (
            lambda x, **o: gpusoftmax.softmax(x, **o),
            lambda x, **o: gpusoftmax.cross_entropy(x, TARGET, W, **o),
        ):
            value = call(given, **options)
            plain = {key: one.detach() if isinstance(one, torch.Tensor) else one for key, one in options.items()}
            assert value.requires_grad and torch.equal(value, call(x.detach(), **plain))


@MATRIX
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_backwards_with_a_temperature_for_each_row(op):
    result = getattr(torch, op)(random(3, 7).detach(), -1).requires_grad_()
    upstream, temperature = random(3, 7, seed=1), everything()["temperature"]
    backward = getattr(gpusoftmax, f"{op}_backward")
    assert gradcheck(lambda y, dy, t: backward(y, dy, temperature=t), (result, upstream, temperature))
    assert gradgradcheck(lambda y, dy, t: backward(y, dy, temperature=t), (result, upstream, temperature))


@MATRIX
def test_all_of_the_core_goes_there():
    x, options = random(3, 7), everything()
    for call in (gpusoftmax.log_softmax, gpusoftmax.logsumexp):
        assert call(x, **options).requires_grad
    assert gpusoftmax.token_logprobs(x, TARGET, **options).logprob.requires_grad
    drawn = gpusoftmax.sample(x, rng=(torch.arange(3), 0), return_logprob=True, **options)
    assert drawn.logprob.requires_grad


OF_THE_CORE = {
    "softmax": gpusoftmax.softmax,
    "log_softmax": gpusoftmax.log_softmax,
    "logsumexp": gpusoftmax.logsumexp,
    "cross_entropy": lambda x, **o: gpusoftmax.cross_entropy(x, TARGET, **o),
    "token_logprobs": lambda x, **o: gpusoftmax.token_logprobs(x, TARGET, **o).logprob,
    "top_logprobs": lambda x, **o: gpusoftmax.top_logprobs(x, 3, **o).logprob,
    "topk_softmax": lambda x, **o: gpusoftmax.topk_softmax(x, 3, **o).probs,
    "soft_argmax": gpusoftmax.soft_argmax,
    "spatial_softmax": gpusoftmax.spatial_softmax,
    "sample": lambda x, **o: gpusoftmax.sample(x, rng=0, return_logprob=True, **o).logprob,
}


@pytest.mark.parametrize("name", OF_THE_CORE)
def test_one_temperature_of_the_core_that_is_learnt(name):
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = random(3, 7).detach()
    agree(OF_THE_CORE[name](x, temperature=temperature), OF_THE_CORE[name](x, temperature=0.7))
    assert gradcheck(lambda t: OF_THE_CORE[name](x, temperature=t), temperature)


@pytest.mark.parametrize("wants", ["bias", "temperature"])
def test_samples_of_logits_without_a_gradient(wants):
    """Their log-probabilities have that of a bias and of temperatures; the samples themselves have none."""
    x, options = random(3, 7).detach(), {"rng": 0, "return_logprob": True}
    given = {"bias": random(7), "temperature": torch.linspace(0.5, 2, 3, dtype=torch.float64)}[wants].detach()
    drawn = gpusoftmax.sample(x, **{wants: given.requires_grad_()}, **options)
    assert not drawn[0].requires_grad and torch.equal(drawn[0], gpusoftmax.sample(x, **{wants: given.detach()}, rng=0))
    scores = gpusoftmax.token_logprobs(x, drawn[0], **{wants: given}).logprob
    agree(*(torch.autograd.grad(one.sum(), given)[0] for one in (drawn.logprob, scores)))


def test_a_temperature_is_not_forgotten():
    """cross_entropy of tensors that require grad once computed at 1."""
    x = random(3, 7)
    value = gpusoftmax.cross_entropy(x, TARGET, temperature=0.5)
    agree(value, F.cross_entropy(x / 0.5, TARGET))


def test_a_number_that_is_a_tensor_may_change():
    """Calls that were made before are replayed, but not with the values of then."""
    x = random(3, 40, dtype=torch.float32).detach()
    temperature, n_valid = torch.tensor(2.0), torch.tensor(9)
    for value, count in ((2.0, 9), (2.0, 9), (3.0, 30)):
        temperature.fill_(value), n_valid.fill_(count)
        got = gpusoftmax.softmax(x, temperature=temperature, n_valid=n_valid)
        assert torch.equal(got, gpusoftmax.softmax(x, temperature=value, n_valid=count))


# ---------------------------------------------------------------- torch.compile, and what is refused

FULL = {
    "softmax": lambda x, o: ours.softmax(x, 1, **o).pow(2).sum(),
    "cross_entropy": lambda x, o: ours.cross_entropy(x, TARGET, W, **o) * 3,
    "log_softmax": lambda x, o: ours.log_softmax(x, 1, **o).clamp_min(-1e3).pow(2).sum(),
    "logsumexp": lambda x, o: ours.logsumexp(x, 1, **o).pow(2).sum(),
    "token_logprobs": lambda x, o: sum(one.sum() for one in floating(ours.token_logprobs(x, TARGET, **SCORES, **o))),
}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=MATRIX)])
@pytest.mark.parametrize("name", [name if name in SOME else pytest.param(name, marks=MATRIX) for name in FULL])
def test_compiled_whole(name, backend):
    x, options = random(3, 7), everything()
    torch._dynamo.reset()
    function = torch.compile(lambda x, o: FULL[name](x * 2, o), fullgraph=True, backend=backend)
    result, expected = function(x, options), FULL[name](x * 2, options)
    torch.testing.assert_close(result, expected)
    wanted = [x, *tensors(options)]
    torch.testing.assert_close(torch.autograd.grad(result, wanted), torch.autograd.grad(expected, wanted))


def test_what_is_refused():
    x = random(3, 4, dtype=torch.float32)
    for error, message, call in (
        (TypeError, "^mask is a list, expected a torch tensor", lambda: ours.softmax(x, -1, mask=[True] * 4)),
        (ValueError, "^softcap is 0", lambda: ours.softmax(x, -1, softcap=0)),
        (ValueError, "^empty_row is 'one'", lambda: ours.softmax(x, -1, empty_row="one")),
        (ValueError, "^n_valid is 9", lambda: ours.softmax(x, -1, n_valid=9)),
        (ValueError, r"^bias has shape \(3,\)", lambda: ours.softmax(x, -1, bias=torch.zeros(3))),
        (ValueError, r"^temperature has shape \(2,\)", lambda: ours.softmax(x, -1, temperature=torch.ones(2))),
        (TypeError, "^mask has dtype float32", lambda: ours.softmax(x, -1, mask=torch.ones(4))),
        (TypeError, "out is given and bias requires grad", lambda: gpusoftmax.softmax(
            x.detach(), bias=torch.zeros(4, requires_grad=True), out=torch.empty(3, 4))),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
