"""gpusoftmax.torch: torch's answers, gradients of any order, and what torch's own tools say of the operators."""

import copy
import gc
import io
import itertools
import pickle
import types
import typing
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gpusoftmax
import gpusoftmax.torch as ours
from gpusoftmax import _torch_ops, _torch_warnings
from gpusoftmax.kernels.cpu import run

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPS = torch.ops.gpusoftmax


def pairwise(**options):
    """Few combinations of the options, in which every two values of two options meet."""
    names, missing, chosen = list(options), set(), []
    for one, two in itertools.combinations(names, 2):
        missing |= {(one, i, two, j) for i in range(len(options[one])) for j in range(len(options[two]))}

    def pairs(numbers):
        return {(a, i, b, j) for (a, i), (b, j) in itertools.combinations(zip(names, numbers, strict=True), 2)}

    everything = list(itertools.product(*(range(len(values)) for values in options.values())))
    while missing:
        best = max(everything, key=lambda numbers: len(pairs(numbers) & missing))
        missing -= pairs(best)
        chosen.append({name: options[name][number] for name, number in zip(names, best, strict=True)})
    return chosen


def test_pairwise():
    chosen = pairwise(a=[1, 2, 3], b="xy", c=[0, 1])
    assert len(chosen) < 12
    for one, two in itertools.combinations("abc", 2):
        seen = {(each[one], each[two]) for each in chosen}
        assert len(seen) == len({each[one] for each in chosen}) * len({each[two] for each in chosen}) >= 4


def random(*shape, dtype=torch.float64, seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(seed))
    return x.to(dtype).requires_grad_()


def labels(shape, n_classes, ignored=None, seed=0):
    made = torch.randint(0, n_classes, shape, generator=torch.manual_seed(seed))
    if ignored is not None:
        made[torch.rand(shape, generator=torch.manual_seed(seed + 1)) < 0.3] = ignored
        made.view(-1)[0] = 0  # one row counts
    return made


def same_bits(one, two):
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.nan_to_num(7), two.nan_to_num(7))


# ---------------------------------------------------------------- derivatives of any order

ROW_OPS = {"softmax": ours.softmax, "log_softmax": ours.log_softmax, "logsumexp": ours.logsumexp}


@pytest.mark.parametrize("name", ROW_OPS)
def test_row_ops_are_differentiable_twice(name):
    for case in pairwise(
        shape=[(5,), (3, 4), (2, 3, 4)], dim=[0, -1, None, "ends"], temperature=[1.0, 0.7], strided=[False, True]
    ):
        x = random(*case["shape"])
        dim = (0, len(case["shape"]) - 1)[: len(case["shape"])] if case["dim"] == "ends" else case["dim"]
        if case["dim"] == "ends" and len(case["shape"]) == 1:
            dim = (0,)

        def function(x, dim=dim, case=case):
            x = x.movedim(0, -1).contiguous().movedim(-1, 0) if case["strided"] else x
            return ROW_OPS[name](x, dim, temperature=case["temperature"])

        assert gradcheck(function, x), case
        assert gradgradcheck(function, x), case


def test_logsumexp_keeps_dimensions():
    assert gradcheck(lambda x: ours.logsumexp(x, (0, 2), True), random(2, 3, 4))
    assert ours.logsumexp(random(2, 3, 4), (0, 2), keepdim=True).shape == (1, 3, 1)


LOSSES = pairwise(
    shape=[(4,), (3, 4), (2, 4, 3), (2, 3, 2, 2)],
    reduction=["mean", "sum", "none"],
    weighted=[False, True],
    label_smoothing=[0.0, 0.1, 1.0],
    ignore_index=[-100, 1],
    strided=[False, True],
)


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("compiled", [False, True], ids=["fused", "in the backward"])
def test_cross_entropy_is_differentiable_twice(case, compiled, monkeypatch):
    """Both ways to the gradient."""
    if compiled:
        monkeypatch.setattr(gpusoftmax._torch_losses, "can_look", lambda tensor: False)
    shape = case["shape"]
    n_classes = shape[min(1, len(shape) - 1)]
    ignored = case["ignore_index"]
    target = labels(shape[:1] + shape[2:] if len(shape) > 1 else (), n_classes, ignored)
    weight = torch.linspace(0.5, 2, n_classes, dtype=torch.float64) if case["weighted"] else None
    options = {name: case[name] for name in ("reduction", "label_smoothing", "ignore_index")}

    def loss(function):
        def call(x):
            x = x.movedim(0, -1).contiguous().movedim(-1, 0) if case["strided"] else x
            return function(x, target, weight, **options)

        return call

    x = random(*shape)
    assert gradcheck(loss(ours.cross_entropy), x)
    assert gradgradcheck(loss(ours.cross_entropy), x)
    expected, value = loss(F.cross_entropy)(x), loss(ours.cross_entropy)(x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    upstream = random(*value.shape, seed=3).detach()
    gradients = (torch.autograd.grad(one, x, upstream)[0] for one in (value, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("several", [False, True], ids=["one target", "several"])
@pytest.mark.parametrize("wanted", ["", "entropy", "lse", "entropy lse rank argmax"])
def test_token_logprobs_is_differentiable_twice(wanted, several):
    options = {f"return_{name}": True for name in wanted.split()}
    for shape, dim, temperature in (((4,), 0, 1.0), ((3, 5), -1, 0.7), ((2, 5, 3), 1, 1.3)):
        batch = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
        target = labels((*batch, 2) if several else batch, shape[dim], ignored=-100)

        def floats(x, target=target, dim=dim, temperature=temperature):
            scores = ours.token_logprobs(x, target, dim, temperature=temperature, **options)
            return tuple(score for score in scores if score is not None and score.is_floating_point())

        assert gradcheck(floats, random(*shape))
        assert gradgradcheck(floats, random(*shape))


@pytest.mark.parametrize("target", [torch.tensor(1), torch.tensor([1, 3, 1])], ids=["one target", "several"])
def test_token_logprobs_of_one_row_is_differentiable_twice(target):
    """Its log-sum-exp has no axes, and yet is no constant."""
    x = random(5)

    def scores(x):
        return ours.token_logprobs(x, target, return_lse=True)[:2]

    assert gradcheck(scores, x) and gradgradcheck(scores, x)
    expected = torch.autograd.grad(scores(x)[0].sum(), x)
    torch.testing.assert_close(torch.autograd.grad(scores(x)[0].sum(), x, create_graph=True), expected)


def test_token_logprobs_agrees_with_torch():
    x, target = random(6, 9), labels((6,), 9, ignored=-100)
    scores = ours.token_logprobs(x, target, return_entropy=True, return_lse=True, return_rank=True, return_argmax=True)
    log_probs = F.log_softmax(x, -1)
    used = target != -100
    picked = log_probs.gather(1, target.clamp(0)[:, None])[:, 0] * used
    entropy = torch.distributions.Categorical(logits=x).entropy()
    for got, expected in ((scores.logprob, picked), (scores.entropy, entropy), (scores.lse, x.logsumexp(-1))):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        upstream = random(6, seed=2).detach()
        one, two = (torch.autograd.grad(each, x, upstream, retain_graph=True)[0] for each in (got, expected))
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert (
        torch.equal(scores.argmax, x.argmax(-1)) and not scores.rank.requires_grad and not scores.argmax.requires_grad
    )
    core = gpusoftmax.token_logprobs(x.detach(), target, return_rank=True)
    assert same_bits(scores.logprob.detach(), core.logprob) and torch.equal(scores.rank, core.rank)


def test_gradients_of_masked_tokens_are_finite():
    """-inf among the logits, and an entropy of 0 log 0, also where the gradient is differentiated."""
    x = torch.tensor([[0.0, float("-inf"), 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    scores = ours.token_logprobs(x, torch.tensor([2]), return_entropy=True)
    ways = (
        scores.logprob.sum() + scores.entropy.sum(),
        ours.cross_entropy(x, torch.tensor([2])),
        ours.softmax(x, -1)[0, 0],
        ours.log_softmax(x, -1)[0, 0],
        ours.logsumexp(x, -1).sum(),
    )
    for value in ways:
        (first,) = torch.autograd.grad(value, x, retain_graph=True)
        (again,) = torch.autograd.grad(value, x, create_graph=True)
        torch.testing.assert_close(first, again)
        assert first.isfinite().all() and first[0, 1] == 0
        (second,) = torch.autograd.grad(again[0, 0], x)
        assert second.isfinite().all() and second[0, 1] == 0


# ---------------------------------------------------------------- forward mode, and torch.func

W = torch.linspace(0.5, 2, 5, dtype=torch.float64)
SCORED, SCORES = torch.tensor([0, -100, 4]), {"return_lse": True, "return_entropy": True, "return_rank": True}


def their_scores(x):
    log_probs = F.log_softmax(x / 0.7, -1)
    return log_probs.gather(1, SCORED.clamp(0)[:, None])[:, 0] * (SCORED != -100), -(log_probs.exp() * log_probs).sum(
        -1
    )


PAIRS = {
    "softmax": (lambda x: ours.softmax(x, -1, temperature=0.7), lambda x: F.softmax(x / 0.7, -1)),
    "log_softmax": (lambda x: ours.log_softmax(x, 0, temperature=0.7), lambda x: F.log_softmax(x / 0.7, 0)),
    "logsumexp": (lambda x: ours.logsumexp(x, (0, 1), True), lambda x: torch.logsumexp(x, (0, 1), True)),
    "cross_entropy": (
        lambda x: ours.cross_entropy(x, SCORED, W, label_smoothing=0.1),
        lambda x: F.cross_entropy(x, SCORED, W, label_smoothing=0.1),
    ),
    "cross_entropy of rows": (
        lambda x: ours.cross_entropy(x, SCORED, reduction="none"),
        lambda x: F.cross_entropy(x, SCORED, reduction="none"),
    ),
    "token_logprobs": (
        lambda x: ours.token_logprobs(x, SCORED, temperature=0.7, **SCORES)[0:3:2],
        their_scores,
    ),
}


def some_by_default(*names, of=PAIRS):
    return [name if name in names else pytest.param(name, marks=pytest.mark.matrix) for name in of]


def squares(result):
    return sum(one.pow(2).sum() for one in (result if isinstance(result, tuple) else (result,)))


TRANSFORMS = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "grad": lambda f, x, v: torch.func.grad(lambda x: squares(f(x)))(x),
    "grad of grad": lambda f, x, v: torch.func.grad(lambda x: squares(torch.func.grad(lambda x: squares(f(x)))(x)))(x),
    "jacrev": lambda f, x, v: torch.func.jacrev(lambda x: squares(f(x)))(x),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of its own functions
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PAIRS)
def test_functional_transforms(name, transform):
    x, v = random(3, 5).detach(), random(3, 5, seed=1).detach()
    got, expected = (TRANSFORMS[transform](function, x, v) for function in PAIRS[name])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def forward_over_reverse(f, x, v):
    x = x.clone().requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        (gradient,) = torch.autograd.grad(squares(f(dual)), dual, create_graph=True)
        return torch.autograd.forward_ad.unpack_dual(gradient).tangent


def slopes_along(f, v):
    return lambda x: torch.func.jvp(f, (x,), (v,))[1]


SEVERAL_LEVELS = {
    "forward over reverse": forward_over_reverse,
    "forward over forward": lambda f, x, v: torch.func.jvp(slopes_along(f, v), (x,), (x,)),
    "reverse over forward": lambda f, x, v: torch.func.grad(lambda x: squares(slopes_along(f, v)(x)))(x),
    "linearize": lambda f, x, v: torch.func.linearize(f, x)[1](v),
    "hessian": lambda f, x, v: torch.func.hessian(lambda x: squares(f(x)))(x),
    "hessian of a batch": lambda f, x, v: torch.func.vmap(torch.func.hessian(lambda x: squares(f(x))))(
        torch.stack([x, v])
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAIRS)
def test_tangents_are_differentiable(name):
    """They had been constants to whatever level differentiated them, without an error."""
    x, v = random(3, 5).detach(), random(3, 5, seed=1).detach()
    for way in SEVERAL_LEVELS.values():
        got, expected = (way(function, x, v) for function in PAIRS[name])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [0, 2])
def test_tokens_of_a_batch_under_vmap(at):
    """Their operator returns a list, for which vmap has no rule."""
    x, target = random(4, 5, 3).detach(), labels((4, 3, 2), 5, ignored=-100)

    def scores(x, target):
        return ours.token_logprobs(x, target, 0, return_lse=True, return_entropy=True, return_rank=True)[:4]

    expected = [scores(*one) for one in zip(x, target, strict=True)]
    got = torch.func.vmap(scores, (at, 0))(x.movedim(0, at), target)
    assert all(map(torch.equal, got, map(torch.stack, zip(*expected, strict=True))))
    one_target = torch.func.vmap(scores, (0, None))(x, target[0])
    assert torch.equal(one_target[0][2], scores(x[2], target[0])[0])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_forward_mode(name, requires_grad):
    """Also by the side of a gradient, and with a tangent that no tensor says it has."""
    x, v = random(3, 5).detach().requires_grad_(requires_grad), random(3, 5, seed=1).detach()
    tangents = []
    for function in PAIRS[name]:
        with torch.autograd.forward_ad.dual_level():
            results = function(torch.autograd.forward_ad.make_dual(x, v))
            results = results if isinstance(results, tuple) else (results,)
            tangents.append([torch.autograd.forward_ad.unpack_dual(one).tangent for one in results])
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some_by_default("softmax", "cross_entropy"))
def test_a_gradient_of_what_an_outer_level_differentiates(name):
    """To the inner level it is a constant, of which nothing seems to be asked."""
    x, scale = random(3, 5).detach(), torch.tensor(2.0, dtype=torch.float64)

    def slopes(function):
        def of_scale(x):
            return torch.func.grad(lambda scale: squares(function(x * x)) * scale**2)(scale)

        return torch.func.jacrev(of_scale)(x), torch.func.jvp(of_scale, (x,), (x,))[1]

    torch.testing.assert_close(*map(slopes, PAIRS[name]), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some_by_default("logsumexp", "cross_entropy of rows"))
def test_a_batch_of_gradients(name):
    """As torch.autograd.functional.jacobian(vectorize=True) takes them."""
    x = random(3, 5)
    jacobians = (torch.autograd.functional.jacobian(function, x, vectorize=True) for function in PAIRS[name])
    torch.testing.assert_close(*jacobians, rtol=1e-10, atol=1e-12)


def test_forward_mode_of_several_targets():
    x, target = random(3, 5), torch.tensor([[0, 1], [4, -100], [2, 2]])

    def scores(x):
        return ours.token_logprobs(x, target, return_lse=True).logprob

    assert gradcheck(scores, x, check_forward_ad=True)


# ---------------------------------------------------------------- torch's samples and torch's answers

FUNCTIONS = {
    "softmax": ours.softmax,
    "log_softmax": ours.log_softmax,
    "logsumexp": ours.logsumexp,
    "nn.functional.cross_entropy": ours.cross_entropy,
}
INFOS = [info for info in op_db if info.name in FUNCTIONS]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.full_name)
def test_torch_agrees_on_its_samples(info, dtype):
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        count += 1
        result = FUNCTIONS[info.name](sample.input, *sample.args, **sample.kwargs)
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        close = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
        torch.testing.assert_close(result, expected, **close)
        upstream = torch.randn_like(expected)
        given = [one for one in (sample.input, *sample.args) if isinstance(one, torch.Tensor) and one.requires_grad]
        torch.testing.assert_close(*(torch.autograd.grad(one, given, upstream) for one in (result, expected)), **close)
    assert count >= 5


def test_the_samples_are_of_all_functions():
    assert {info.name for info in INFOS} == set(FUNCTIONS) and len(INFOS) > len(FUNCTIONS)


@pytest.mark.parametrize(
    "info", [info for info in INFOS if info.variant_test_name == "with_dtype"], ids=lambda info: info.full_name
)
def test_integers_with_a_dtype(info):
    for sample in info.sample_inputs("cpu", torch.int64):
        result = FUNCTIONS[info.name](sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(result, info.op(sample.input, *sample.args, **sample.kwargs))


def test_torch_agrees_on_samples_of_the_module():
    (info,) = (info for info in module_db if info.name == "nn.CrossEntropyLoss")
    count = 0
    for sample in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=True):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        one, two = (module(*arguments, **options) for module in (ours.CrossEntropyLoss, torch.nn.CrossEntropyLoss))
        given = sample.forward_input.args
        torch.testing.assert_close(one(*given), two(*given), rtol=1e-12, atol=1e-12)
        count += 1
    assert count > 10


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(one, marks=pytest.mark.matrix if one == torch.float16 else [], id=str(one)) for one in DTYPES],
)
def test_dtypes_of_results_and_gradients(dtype):
    x = random(6, 40, dtype=dtype)
    target = labels((6,), 40, ignored=-100)
    per_row = torch.float64 if dtype == torch.float64 else torch.float32
    for result, expected in (
        (ours.softmax(x, -1), dtype),
        (ours.log_softmax(x, -1, torch.float32), torch.float32),
        (ours.logsumexp(x, -1), per_row),
        (ours.cross_entropy(x, target), per_row),
        (ours.cross_entropy(x, target, reduction="none", label_smoothing=0.1), per_row),
        (ours.token_logprobs(x, target).logprob, per_row),
        (ours.token_logprobs(x, target, return_lse=True).lse, per_row),
    ):
        assert result.dtype == expected
        (gradient,) = torch.autograd.grad(result.sum(), x)
        assert gradient.dtype == dtype and gradient.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_first_gradients_are_those_of_the_kernels(dtype):
    """Bit for bit: autograd adds nothing to what the core computes."""
    x, target, weight = random(6, 40, dtype=dtype), labels((6,), 40, ignored=-100), torch.rand(40).to(dtype)
    plain = x.detach()
    for function, core, backward in (
        (ours.softmax, gpusoftmax.softmax, gpusoftmax.softmax_backward),
        (ours.log_softmax, gpusoftmax.log_softmax, gpusoftmax.log_softmax_backward),
    ):
        result, upstream = function(x, -1, temperature=0.7), random(6, 40, dtype=dtype, seed=1).detach()
        assert same_bits(result.detach(), core(plain, temperature=0.7))
        (gradient,) = torch.autograd.grad(result, x, upstream)
        assert same_bits(gradient, backward(result.detach(), upstream, temperature=0.7))
    for reduction in ("mean", "sum"):
        loss = ours.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1)
        options = {"reduction": reduction, "label_smoothing": 0.1}
        expected, dlogits = gpusoftmax.cross_entropy_with_grad(plain, target, weight, **options)
        assert same_bits(loss.detach(), expected)
        assert same_bits(torch.autograd.grad(loss, x)[0], dlogits)


def test_small_gradients_of_float16_meet_the_loss_scale_before_they_are_rounded():
    """1/4000 of a gradient of 1e-4 is nothing in float16, which the scale of a GradScaler is for."""
    x = torch.zeros(4000, 1000, dtype=torch.float16, requires_grad=True)
    target = torch.zeros(4000, dtype=torch.long)
    for reduction in ("mean", "none"):
        loss = ours.cross_entropy(x, target, reduction=reduction)
        scaled = (loss if reduction == "mean" else loss / 4000).sum() * 2.0**16
        (gradient,) = torch.autograd.grad(scaled, x)
        torch.testing.assert_close(gradient[:, 1:].float(), torch.full((4000, 999), 2.0**16 / 4e6), rtol=1e-3, atol=0)


def test_a_confident_row_has_a_gradient():
    x = torch.tensor([[30.0] + [0.0] * 999], requires_grad=True)
    loss = ours.cross_entropy(x, torch.tensor([0]))
    assert 9e-11 < loss < 1e-10
    loss.backward()
    assert (x.grad[0, 1:] > 0).all()


# ---------------------------------------------------------------- how gradients are handed out


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0, -0.5, 0.0])
def test_a_graph_that_is_kept(reduction, dtype, scale):
    """Each backward hands out a gradient of its own, with the same bits: the first may be written into."""
    x, target = random(6, 40, dtype=dtype), labels((6,), 40, ignored=-100)
    loss = ours.cross_entropy(x, target, reduction=reduction)
    upstream = torch.full_like(loss, scale)
    (first,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
    kept = first.clone()
    (unscaled,) = torch.autograd.grad(F.cross_entropy(x.double(), target, reduction=reduction).sum(), x)
    torch.testing.assert_close(kept, scale * unscaled, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    first.fill_(7)
    (second,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
    assert same_bits(second, kept) and second.data_ptr() != first.data_ptr()
    (third,) = torch.autograd.grad(loss, x, upstream)
    assert same_bits(third, kept) and (first == 7).all()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "logsumexp", "token_logprobs"])
def test_logits_are_given_back_by_the_backward(name, dtype):
    """By counting references: no cycle keeps them until the garbage collector comes."""
    x, target = random(6, 40, dtype=dtype), labels((6,), 40)
    functions = {
        "cross_entropy": lambda x: ours.cross_entropy(x, target),
        "logsumexp": lambda x: ours.logsumexp(x, -1).sum(),
        "token_logprobs": lambda x: ours.token_logprobs(x, target, return_lse=True).logprob.sum(),
    }
    gc.disable()
    try:
        hidden = x * 2
        kept = weakref.ref(hidden)
        result = functions[name](hidden)
        del hidden
        assert kept() is not None
        result.backward()
        assert kept() is None
    finally:
        gc.enable()


def test_gradients_add_up():
    """Two losses of one tensor, with and without a graph of the gradient."""
    x, target = random(6, 40), labels((6,), 40)
    total = ours.cross_entropy(x, target) + ours.logsumexp(x, -1).pow(2).mean()
    total.backward(retain_graph=True)
    once = x.grad.clone()
    total.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    y = x.detach().clone().requires_grad_()
    (F.cross_entropy(y, target) + torch.logsumexp(y, -1).pow(2).mean()).backward()
    torch.testing.assert_close(once, y.grad)


def test_a_gradient_penalty():
    """The use of second derivatives: the norm of a gradient is minimised."""
    x, target = random(6, 9), labels((6,), 9)
    gradients = []
    for function in (ours.cross_entropy, F.cross_entropy):
        (first,) = torch.autograd.grad(function(x, target, label_smoothing=0.1), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.pow(2).sum(), x)
        gradients.append((first.detach(), second.detach(), third))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_ignored_rows():
    """Not read, and without a gradient whatever comes from above."""
    x = torch.zeros(3, 4)
    x[1] = float("nan")
    x.requires_grad_()
    target = torch.tensor([1, -100, 2])
    for reduction, upstream in (("mean", None), ("none", torch.tensor([1.0, float("inf"), 1.0]))):
        for options in ({}, {"create_graph": True}):
            loss = ours.cross_entropy(x, target, reduction=reduction)
            (gradient,) = torch.autograd.grad(loss, x, upstream, **options)
            assert gradient[[0, 2]].isfinite().all() and (gradient[1] == 0).all()


BYTES = {
    "cross_entropy": ours.cross_entropy,
    "of rows": lambda x, target: ours.cross_entropy(x, target, reduction="none"),
    "in place": lambda x, target: ours.cross_entropy(x * 1, target, reduction="none", inplace=True),
    "softcap": lambda x, target: ours.cross_entropy(x, target, softcap=3.0, empty_row="zero"),
    "softcap, of rows": lambda x, target: ours.cross_entropy(x, target, softcap=3.0, reduction="none"),
    "z_loss": lambda x, target: ours.cross_entropy(x, target, z_loss=0.1),
    "a pair": lambda x, target: ours.cross_entropy(x, (target.unsqueeze(-1), torch.ones(3, 1, dtype=x.dtype))),
    "the layer": lambda x, target: ours.linear_cross_entropy(x, torch.eye(256, dtype=x.dtype), target),
    "token_logprobs": lambda x, target: ours.token_logprobs(x, target).logprob,
    "token_logprobs, softcap": lambda x, target: ours.token_logprobs(x, target, softcap=3.0).logprob,
    "torch.func": lambda x, target: torch.vmap(lambda x, target: ours.cross_entropy(x, target, softcap=3.0))(x, target),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_as_labels(name):
    """156 is what -100 wraps around to in a byte."""
    made = []
    for dtype in (torch.uint8, torch.int64):
        x, target = random(3, 256), torch.tensor([156, 3, 255], dtype=dtype)
        value = BYTES[name](x, target)
        made.append([value.detach(), *torch.autograd.grad(value.sum() * 1.5, x)])
        if name != "in place":
            (first,) = torch.autograd.grad(BYTES[name](x, target).sum() * 1.5, x, create_graph=True)
            made[-1] += [first.detach(), *torch.autograd.grad(first.square().sum(), x)]
    assert all(map(same_bits, *made))


def test_all_rows_ignored():
    x, target = random(3, 4), torch.full((3,), -100)
    loss = ours.cross_entropy(x, target)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, x)[0].any()


def test_layouts_are_taken_as_they_are():
    image = random(2, 5, 3, 4).detach()
    target = labels((2, 3, 4), 5)
    expected = ours.cross_entropy(image.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(expected, image)
    last = image.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = ours.cross_entropy(last, target)
    assert same_bits(loss.detach(), expected.detach())
    loss.backward()
    assert same_bits(last.grad, gradient)
    wide = torch.randn(4, 20)[:, 3:15:2].requires_grad_()
    narrow = wide.detach().contiguous().requires_grad_()
    for function in (ours.softmax, ours.log_softmax):
        one, two = (torch.autograd.grad(function(x, -1)[:, 0].sum(), x)[0] for x in (wide, narrow))
        assert same_bits(one, two)
    # What comes from above has strides of 0 after a sum.
    torch.testing.assert_close(torch.autograd.grad(ours.softmax(narrow, -1).sum(), narrow)[0], torch.zeros(4, 6))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)])
def test_empty(shape):
    x = torch.empty(shape, requires_grad=True)
    for function, theirs in ((ours.softmax, torch.softmax), (ours.log_softmax, torch.log_softmax)):
        result = function(x, -1)
        assert result.shape == theirs(x, -1).shape
        assert torch.autograd.grad(result.sum(), x)[0].shape == shape
    lse = ours.logsumexp(x, -1)
    torch.testing.assert_close(lse, torch.logsumexp(x, -1))
    assert torch.autograd.grad(lse.sum(), x)[0].shape == shape


def test_a_batch_of_no_rows():
    for reduction in ("mean", "sum", "none"):
        x, target = torch.empty(0, 5, requires_grad=True), torch.empty(0, dtype=torch.long)
        one, two = (f(x, target, reduction=reduction) for f in (ours.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(one, two, equal_nan=True)
        assert torch.autograd.grad(one.sum(), x)[0].shape == (0, 5)


def test_no_gradient_is_recorded_where_none_is_wanted():
    x, target = random(3, 4), torch.tensor([0, 1, 2])
    calls = [
        lambda: ours.softmax(x, -1),
        lambda: ours.logsumexp(x, -1),
        lambda: ours.cross_entropy(x, target),
        lambda: ours.token_logprobs(x, target).logprob,
    ]
    for call in calls:
        assert call().requires_grad
        with torch.no_grad():
            assert not call().requires_grad
        with torch.inference_mode():
            assert call().is_inference()
    assert not ours.sample(x, rng=0).requires_grad


# ---------------------------------------------------------------- in place


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_in_place(dtype, reduction, scale):
    """The same gradient, in the memory of the logits, whose version says so."""
    leaf, target = random(6, 40, dtype=dtype), labels((6,), 40, ignored=-100)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    expected = scale * ours.cross_entropy(leaf * 2, target, **options)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    hidden = leaf * 2
    version, handed = hidden._version, []
    loss = ours.cross_entropy(hidden, target, inplace=True, **options)
    assert hidden._version > version
    hidden.register_hook(handed.append)
    loss = scale * loss
    (got,) = torch.autograd.grad(loss.sum(), leaf)
    assert same_bits(loss.detach(), expected.detach())
    close = {"rtol": 0.02, "atol": 1e-4} if dtype == torch.bfloat16 else {}  # rounded once more
    torch.testing.assert_close(got, gradient, **close)
    assert handed[0].data_ptr() == hidden.data_ptr()


def test_what_is_in_place_can_be_used_once():
    leaf, target = random(3, 4), torch.tensor([0, 1, 2])
    before = leaf.detach().clone()
    for one in (leaf, leaf.view(3, 4), leaf.T.T[:, :]):  # a view has the memory of its leaf
        with pytest.raises(ValueError, match="^input is a leaf"):
            ours.cross_entropy(one, target, inplace=True)
    assert torch.equal(leaf, before)
    loss = ours.cross_entropy(leaf * 2, target, inplace=True)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="twice.*inplace=False"):
        torch.autograd.grad(loss, leaf)
    with pytest.raises(RuntimeError, match="twice.*inplace=False"):
        torch.autograd.grad(ours.cross_entropy(leaf * 2, target, inplace=True), leaf, create_graph=True)
    hidden = leaf * 2
    loss = ours.cross_entropy(hidden, target, inplace=True)
    hidden.zero_()
    with pytest.raises(RuntimeError, match="written to before the backward"):
        torch.autograd.grad(loss, leaf)
    saved = leaf.exp()  # whose backward needs the result, which is gone
    loss = ours.cross_entropy(saved, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)
    with torch.no_grad():
        plain = leaf * 2
        kept = plain.clone()
        assert torch.equal(ours.cross_entropy(plain, target, inplace=True), F.cross_entropy(kept, target))
        assert torch.equal(plain, kept)
    bad = leaf * 2
    with pytest.raises(IndexError):
        ours.cross_entropy(bad, torch.tensor([0, 4, 1]), inplace=True)
    assert torch.equal(bad, leaf * 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, t: ours.cross_entropy(x * 1, t, z_loss=0.1, inplace=True),
        lambda x, t: torch.func.grad(lambda one: ours.cross_entropy(one * 1, t, inplace=True))(x.detach()),
        lambda x, t: ours.cross_entropy(torch._neg_view(x * 1), t, inplace=True),
        lambda x, t: ours.cross_entropy(torch._neg_view(x * 1), t, temperature=0.5, inplace=True),
    ],
    ids=["options", "torch.func", "negated", "negated and divided"],
)
def test_a_warning_where_the_gradient_is_not_in_place(call):
    x, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 1])
    _torch_warnings._warn.cache_clear()
    with pytest.warns(UserWarning, match="inplace=True"):
        call(x, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x, target)  # it has been said
        ours.cross_entropy(x * 1, target, inplace=True)


# ---------------------------------------------------------------- modules, autocast, other tools


def test_the_module_can_be_copied_and_kept():
    module = ours.CrossEntropyLoss(torch.linspace(0.5, 2, 5), ignore_index=1, reduction="sum", label_smoothing=0.1)
    assert isinstance(module, torch.nn.CrossEntropyLoss) and repr(module) == "CrossEntropyLoss()"
    x, target = random(4, 5, dtype=torch.float32), torch.tensor([0, 1, 4, 2])
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = ours.CrossEntropyLoss(torch.ones(5), ignore_index=1, reduction="sum", label_smoothing=0.1)
    loaded.load_state_dict(torch.load(file))
    expected = module(x, target).detach()
    torch.testing.assert_close(expected, torch.nn.CrossEntropyLoss.forward(module, x, target).detach())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert same_bits(other(x, target).detach(), expected)
    assert module.to(torch.float64)(x.double(), target).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    x, target = random(6, 40, dtype=torch.float32), labels((6,), 40)
    layer = torch.nn.Linear(40, 40)
    with torch.autocast("cpu", dtype):
        hidden = layer(x)
        assert hidden.dtype == dtype
        probs, log_probs = ours.softmax(hidden, -1), ours.log_softmax(hidden, -1)
        assert probs.dtype == log_probs.dtype == torch.float32
        assert ours.softmax(hidden, -1, torch.float64).dtype == torch.float64
        assert ours.softmax(hidden.double(), -1).dtype == torch.float64
        assert ours.softmax(hidden, -1, dtype).dtype == dtype
        loss, lse = ours.cross_entropy(hidden, target), ours.logsumexp(hidden, -1)
        expected = F.cross_entropy(hidden.float(), target)
    torch.testing.assert_close(probs, torch.softmax(hidden.float(), -1))
    torch.testing.assert_close(loss, expected)
    (loss + probs.pow(2).sum() + lse.sum()).backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()
    assert ours.softmax(hidden, -1).dtype == dtype


def test_shapes_without_values():
    x, target = torch.empty(3, 5, 2, device="meta", requires_grad=True), torch.empty(3, 2, device="meta").long()
    assert ours.softmax(x, 1).shape == (3, 5, 2) and ours.softmax(x, 1).device.type == "meta"
    assert ours.logsumexp(x, (0, 2), keepdim=True).shape == (1, 5, 1)
    loss = ours.cross_entropy(x, target)
    assert loss.shape == () and loss.dtype == torch.float32
    loss.backward()
    assert x.grad.shape == (3, 5, 2)
    assert ours.cross_entropy(x, target, reduction="none").shape == (3, 2)
    scores = ours.token_logprobs(x, target, 1, return_entropy=True, return_rank=True)
    assert scores.logprob.shape == scores.rank.shape == scores.entropy.shape == (3, 2)
    assert ours.sample(x, 1, rng=0).dtype == torch.int64


X = torch.randn(3, 5, 2, dtype=torch.float32, generator=torch.manual_seed(0))
TARGET, WEIGHT = torch.tensor([[0, 4], [1, 1], [2, 3]]), torch.linspace(0.5, 2, 5)
ROWS = torch.rand((3, 2), generator=torch.manual_seed(0)) + 0.5
THROUGH = [  # temperature, softcap, n_valid, empty_row, temperatures, bias, mask, valid_of_rows
    (1.0, 2.0, None, "zero", ROWS, torch.linspace(-1, 1, 5), X > -1, torch.tensor([[5, 4], [3, 5], [5, 5]])),
    (0.7, None, 4, "nan", None, None, None, None),
]
OPERATORS = {
    "softmax_transformed": [(X, [1], None, *THROUGH[0]), (X, [1], torch.bfloat16, *THROUGH[1])],
    "log_softmax_transformed": [(X, [1], None, *THROUGH[0])],
    "logsumexp_transformed": [(X, [1], False, *THROUGH[0])],
    "cross_entropy_transformed": [(X, TARGET, WEIGHT, 1, "mean", 0.0, None, *THROUGH[0])],
    "cross_entropy_transformed_with_grad": [(torch.float32, X, TARGET, WEIGHT, 1, "none", 0.0, None, *THROUGH[0])],
    "cross_entropy_transformed_in_place": [(X.clone(), TARGET, WEIGHT, 1, "mean", 0.0, None, *THROUGH[0])],
    "token_logprobs_transformed": [(X, TARGET, 1, 1, *wanted, None, *THROUGH[0]) for wanted in ((True,) * 4,)],
    "token_logprobs_transformed_backward": [(torch.float32, X, TARGET, ROWS, ROWS, 1, 1, *THROUGH[0])],
    "softmax": [(X, [1], 1.0, None), (X, [0, 2], 0.7, torch.bfloat16)],
    "log_softmax": [(X, [1], 1.0, None), (X, [0, 1, 2], 0.7, torch.float64)],
    "softmax_backward": [(X.softmax(1), X, [1], 0.7, torch.float32), (X.softmax(1), X, [1], 1.0, torch.float16)],
    "log_softmax_backward": [(X, X, [1], 0.7, torch.float32), (X, X, [0, 2], 1.0, torch.float16)],
    "logsumexp": [(X, [1], False, 1.0), (X.bfloat16(), [0, 2], True, 0.7)],
    "cross_entropy": [(X, TARGET, None, 1, "mean", 0.0, None), (X.half(), TARGET, WEIGHT, 1, "none", 0.1, False)],
    "cross_entropy_with_grad": [
        (X, TARGET, WEIGHT, 1, "sum", 0.1, True),
        (X.transpose(0, 2), TARGET.T, None, 1, "none", 0.0, None),
    ],
    "cross_entropy_in_place": [(X.clone(), TARGET, WEIGHT, 1, "mean", 0.1, None)],
    "cross_entropy_backward": [(torch.tensor([2.0]), X, TARGET, WEIGHT, 1, 0.1, torch.float32)],
    "token_logprobs": [(X, TARGET, 1, 0.7, 1, *wanted, None) for wanted in ((False,) * 4, (True,) * 4)],
    "token_logprobs_backward": [
        (X, TARGET, X[:, 0], None, 1, 0.7, 1),
        (X, TARGET, None, X[:, 0], 1, 0.7, 1),
    ],
    "sample": [
        (X, None, None, 7, 8, 1, *[None] * 4, 0.7, None, 0.9, None),
        (
            X,
            torch.arange(6).view(3, 2),
            torch.tensor(3),
            0,
            0,
            1,
            None,
            None,
            torch.ones(3, 2),
            None,
            1.0,
            2,
            None,
            0.1,
        ),
    ],
    "linear_cross_entropy_with_grad": [  # rows of two features, five classes
        (X[:, 0], X[0], None, TARGET[:, 0], WEIGHT, None, None, None, 1, "mean", 0.1, 0.0, None, 1.0, None)
        + (False, False, False, None, None, [True, True, False]),
        (X[:, 0], X[0], X[0, :, 0], TARGET[:, 0], None, X[:, 0, 0].exp(), None, X[:, 0, 0], 1, "none", 0.0, 0.1, None)
        + (0.7, 4.0, True, True, True, None, 2, [False, True, True]),
        (X[:, 0], X[0], None, TARGET[:, 0], None, None, X[0, 0].exp()[:1], None, 1, "mean", 0.0, 0.0, None, 1.0, 3.0)
        + (False, True, False, False, None, [False] * 3),
        (X[:, 0], X[0], None, TARGET[:, 0], None, None, None, None, 1, "sum", 0.0, 0.0, None, 1.0, None)
        + (False, False, True, None, None, [False] * 3),
    ],
}


IN_OTHER_FILES = {"kl_div_of_rows", "kl_div_backward", "losses_of_weighted_rows", "losses_of_weighted_rows_backward"}
"""test_torch_kl.py and test_torch_full_loss.py have cases of these."""


def test_every_operator_has_a_case():
    assert OPERATORS.keys() | IN_OTHER_FILES == {
        name.removeprefix("gpusoftmax::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("gpusoftmax::")
    }


REPLAYED = {
    "softmax": lambda x, t: ours.softmax(x, -1),
    "softmax of another dtype": lambda x, t: ours.softmax(x, -1, torch.float64),
    "log_softmax": lambda x, t: ours.log_softmax(x, 1),
    "logsumexp": lambda x, t: ours.logsumexp(x, 1),
    "cross_entropy": lambda x, t: ours.cross_entropy(x, t),
    "token_logprobs": lambda x, t: ours.token_logprobs(x, t).logprob,
}


@pytest.mark.parametrize("name", REPLAYED)
def test_calls_and_their_backwards_are_replayed(name, monkeypatch):
    """Small ones take ten times as long where they are not."""

    def gradient():
        logits = torch.zeros(3, 4, requires_grad=True)
        REPLAYED[name](logits, torch.tensor([0, 1, 2])).sum().backward()
        return logits.grad

    expected = gradient()
    gradient()  # the first backward may have been for another dtype
    planned = []
    plan = run.plan
    monkeypatch.setattr(run, "plan", lambda *arguments: planned.append(1) or plan(*arguments))
    assert torch.equal(gradient(), expected) and not planned


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_finds_nothing_wrong_with_the_operators(name):
    for arguments in OPERATORS[name]:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


FULL = {
    "softmax": lambda x, t: ours.softmax(x, 1).pow(2).sum(),
    "log_softmax": lambda x, t: ours.log_softmax(x, (0, 1), temperature=0.7).pow(2).sum(),
    "logsumexp": lambda x, t: ours.logsumexp(x, 1, True).pow(2).sum(),
    "cross_entropy": lambda x, t: 3 * ours.cross_entropy(x, t, WEIGHT, label_smoothing=0.1),
    "cross_entropy of rows": lambda x, t: ours.cross_entropy(x, t, reduction="none").pow(2).sum(),
    "cross_entropy in place": lambda x, t: ours.cross_entropy(x, t, inplace=True),
    "module": lambda x, t: ours.CrossEntropyLoss(ignore_index=1)(x, t),
    "token_logprobs": lambda x, t: sum(s.sum() for s in ours.token_logprobs(x, t, 1, return_entropy=True)[0:3:2]),
}


@pytest.mark.parametrize(
    "backend, dtype",
    [
        ("aot_eager", torch.float32),
        ("aot_eager", torch.bfloat16),
        ("inductor", torch.float32),
        pytest.param("inductor", torch.bfloat16, marks=pytest.mark.matrix),  # as float32, around the same operators
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FULL)
def test_compiled_whole(name, backend, dtype):
    x = X.to(dtype, copy=True).requires_grad_()
    torch._dynamo.reset()
    function = torch.compile(lambda x, t: FULL[name](x * 2, t), fullgraph=True, backend=backend)
    result, expected = function(x, TARGET), FULL[name](x * 2, TARGET)
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(one, x)[0] for one in (result, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", some_by_default("softmax", "cross_entropy"))
def test_compiled_gradients_of_torch_func(name):
    """torch.compile does not see that the argument requires grad: gradients had been 0."""
    x, (function, _) = random(3, 5).detach(), PAIRS[name]

    def gradient(x):
        return torch.func.grad(lambda x: squares(function(x)))(x)

    torch._dynamo.reset()
    got = torch.compile(gradient, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, gradient(x), rtol=1e-10, atol=1e-12)


def test_compiled_for_all_shapes():
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, t: ours.cross_entropy(x * 2, t) + ours.logsumexp(x, -1).sum(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows, cols in ((4, 5), (7, 9), (2, 30)):
        x, target = random(rows, cols), labels((rows,), cols)
        result = function(x, target)
        torch.testing.assert_close(result, F.cross_entropy(x * 2, target) + torch.logsumexp(x, -1).sum())
        result.backward()
        assert x.grad.isfinite().all()


WITH_A_NUMBER = {
    "temperature": lambda x, number: ours.softmax(x, -1, temperature=number)[:, 0].sum(),
    "softcap": lambda x, number: ours.logsumexp(x, -1, softcap=number).sum(),
    "z_loss": lambda x, number: ours.cross_entropy(x, TARGET, z_loss=number),
    "normalizer": lambda x, number: ours.cross_entropy(x, TARGET, normalizer=number),
    "of kl_div": lambda x, number: ours.kl_div(x, x.detach() * 0.5, normalizer=number),
    "of the layer": lambda x, number: ours.linear_cross_entropy(x[0], x[1], torch.arange(5), normalizer=number),
}


@pytest.mark.parametrize("name", some_by_default("temperature", "normalizer", of=WITH_A_NUMBER))
def test_compiled_for_all_integers(name):
    """As numbers of rows or tokens are, which torch.compile has stand for any from the second on."""
    torch._dynamo.reset()
    x = X.double().requires_grad_()
    function = torch.compile(WITH_A_NUMBER[name], fullgraph=True, backend="aot_eager")
    for number in (2, 3, 5):
        made = [one(x, number) for one in (function, WITH_A_NUMBER[name])]
        torch.testing.assert_close(*made)
        torch.testing.assert_close(*(torch.autograd.grad(one, x)[0] for one in made))


def test_compiled_samples():
    torch._dynamo.reset()
    seeds = torch.arange(6).view(3, 2)
    function = torch.compile(
        lambda x: ours.sample(x, 1, top_p=0.9, rng=(seeds, 2**64 - 1)), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(function(X), gpusoftmax.sample(X, 1, top_p=0.9, rng=(seeds, 2**64 - 1)))


def test_compiled_samples_of_all_steps():
    torch._dynamo.reset()
    numbers = (3, 0, 2), (4, 1, 3), (5, 2, 4), (2**40, 3, 5), (-(2**63), 2**63 - 1, 6)
    compiled = torch.compile(
        lambda x, seed, step, k: ours.sample(x, rng=(seed, step), top_k=k), fullgraph=True, backend="aot_eager"
    )
    for seed, step, k in numbers:
        with torch._dynamo.config.patch(error_on_recompile=step > 1):  # from the second on they stand for any
            made = compiled(X, seed, step, k)
        assert torch.equal(made, gpusoftmax.sample(X, rng=(seed, step), top_k=k))


def test_compiled_samples_of_requests_of_different_kinds():
    torch._dynamo.reset()
    x, options = random(3, 40).detach(), {"rng": (torch.arange(3), 0), "min_p": 0.01}
    of_rows = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0, 3, 40]), torch.tensor([1.0, 0.9, 0.5])
    names = "temperature", "top_k", "top_p"

    def function(x, *given):
        return ours.sample(x, **dict(zip(names, given, strict=True)), **options)

    expected = gpusoftmax.sample(x, **dict(zip(names, of_rows, strict=True)), **options)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(x, *of_rows), expected) and torch.equal(compiled(x, *of_rows), expected)
    numbers = torch.tensor(0.5), torch.tensor(3), torch.tensor(0.9)
    expected = gpusoftmax.sample(x, temperature=0.5, top_k=3, top_p=0.9, **options)
    assert torch.equal(compiled(x, *numbers), expected)
    with pytest.raises(ValueError, match=r"^top_p has shape \(2,\)"):
        ours.sample(x, top_p=torch.ones(2), rng=0)


def test_the_training_loop_of_the_readme():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    programs = [code.split("```")[0] for code in readme.split("```python\n")[1:]]
    (program,) = (code for code in programs if "gpusoftmax.torch" in code)
    found = {}
    exec(program.replace("32_000", "50"), found)
    assert found["loss"].isfinite() and found["model"](torch.tensor([1])).shape == (1, 50)


# ---------------------------------------------------------------- what is refused, and what is said


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.loss = torch.nn.Linear(5, 7), ours.CrossEntropyLoss()

    def forward(self, x, target):
        return self.loss(self.layer(x), target), ours.softmax(self.layer(x), -1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    model, given = Model(), (torch.randn(3, 5), torch.tensor([0, 6, 2]))
    exported = torch.export.export(model, given, strict=strict).module()
    for got, expected in zip(exported(*given), model(*given), strict=True):
        torch.testing.assert_close(got, expected)


def test_exported_and_trained():
    """An exported program has operators and no functions of autograd around them; gradients had been None."""
    model, given = Model(), (torch.randn(3, 5), torch.tensor([0, 6, 2]))
    exported = torch.export.export(model, given).module()
    gradients = []
    for function in (exported, model):
        loss, probs = function(*given)
        parameters = [function.get_parameter(name) for name in ("layer.weight", "layer.bias")]
        gradients.append(torch.autograd.grad(loss + probs.square().sum(), parameters))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("operator", "n_tensors", "options"),
    [
        (OPS.softmax, 1, ([1], 2.0, None)),
        (OPS.log_softmax, 1, ([1], 2.0, None)),
        (OPS.logsumexp, 1, ([1], True, 2.0)),
        (OPS.softmax_backward, 2, ([1], 2.0, torch.float64)),
        (OPS.log_softmax_backward, 2, ([1], 2.0, torch.float64)),
        (OPS.cross_entropy, 1, (torch.tensor([0, 4, 2]), None, -100, "mean", 0.1, None)),
    ],
)
def test_operators_called_by_name(operator, n_tensors, options):
    def function(*given):
        made = operator(*given, *options)
        return made[0] if isinstance(made, tuple) else made

    given = tuple(random(3, 5, seed=seed) for seed in range(n_tensors))
    assert gradcheck(function, given) and gradgradcheck(function, given)


def test_operators_without_a_gradient():
    made = OPS.token_logprobs(random(3, 5), torch.tensor([0, 4, 2]), 1, 1.0, -100, *[False] * 4, None)
    with pytest.raises(NotImplementedError, match="^the operator gpusoftmax.token_logprobs has no gradient by itself"):
        made[0].sum().backward()


class Heard(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.add(operator)
        return operator(*args, **(kwargs or {}))


class Replaced(TorchFunctionMode):
    """Zeros are put in the place of an operator's result."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return torch.zeros_like(result) if function is self.operator else result


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_operators_are_heard_by_who_listens():
    """Where nobody does, functions are called at once; in a graph that would be a constant."""
    x, other, target = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5), torch.tensor([1, 2, 3])
    ours.softmax(x, -1).sum().backward()  # what was done before is replayed, and found as quickly
    for given in (x, other):
        ours.cross_entropy(given, target)
        ours.log_softmax(given, -1)
    with Heard() as heard:
        ours.softmax(x, -1).sum().backward()
        ours.cross_entropy(x, target).backward()
    names = "softmax", "softmax_backward", "cross_entropy", "cross_entropy_backward"
    assert {getattr(OPS, name).default for name in names} <= heard.operators
    traced = torch.jit.trace(lambda x: ours.log_softmax(x, -1), x.detach())
    assert "gpusoftmax::log_softmax" in str(traced.graph)
    assert torch.equal(traced(other), ours.log_softmax(other, -1))
    with Replaced(OPS.softmax.default):
        assert torch.equal(ours.softmax(other, -1), torch.zeros_like(other))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours.softmax(x, -1).sum().backward()
    assert {"gpusoftmax::softmax", "gpusoftmax::softmax_backward"} <= {event.key for event in profile.key_averages()}


def test_operators_are_replayed(monkeypatch):
    """Of forward and backward that were done before kernels are started, and no function of the core is called."""
    x, target = random(3, 5, dtype=torch.float32), torch.tensor([0, 4, 2])

    def gradients():
        made = [function(x, -1) for function in (ours.softmax, ours.log_softmax, ours.logsumexp)]
        made += [ours.cross_entropy(x, target), ours.token_logprobs(x, target, return_entropy=True).entropy]
        return [torch.autograd.grad(one.sum(), x)[0] for one in made]

    expected = gradients()
    names = "softmax", "softmax_backward", "log_softmax", "log_softmax_backward", "logsumexp"
    for name in (*names, "token_logprobs", "token_logprobs_backward"):
        monkeypatch.setattr(gpusoftmax, name, lambda *_, **__: pytest.fail("not replayed"))
    monkeypatch.setattr(_torch_ops, "_with_divisor", lambda *_: pytest.fail("not replayed"))
    assert all(map(same_bits, gradients(), expected))
    with pytest.raises(IndexError, match=r"^target\[1\] .* is 5"):
        monkeypatch.undo()
        ours.cross_entropy(x, torch.tensor([0, 5, 2]))


def test_operators_are_replayed_on_as_many_threads(monkeypatch):
    """As a call that was not made before takes: of the divisor, which comes first, one number says nothing about it."""
    logits, target = torch.randn(4, 2**16), torch.zeros(4, dtype=torch.long)
    taken, play = [], run.parallel.play

    def noted(program, *others):
        taken.append(program.n_threads)
        return play(program, *others)

    monkeypatch.setattr(run.parallel, "play", noted)
    for n_threads in (1, 2, 1, 2):
        monkeypatch.setattr(run.parallel, "thread_count", lambda count=n_threads: count)
        taken.clear()
        _torch_ops.cross_entropy_backward(torch.ones(1), logits, target, None, -100, 0.0, torch.float32)
        assert max(taken) == n_threads


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_traced_before_the_dispatcher(mode):
    """As torch.export does it: the modes of that have a stack of their own."""
    x, other, target = random(3, 5), random(3, 5), torch.tensor([0, 4, 2])

    def function(x):
        return ours.softmax(x, -1), ours.cross_entropy(x, target)

    function(x)
    traced = make_fx(function, pre_dispatch=True, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    targets = [node.target for node in traced.graph.nodes]
    assert OPS.softmax.default in targets and OPS.cross_entropy.default in targets
    for got, expected in zip(traced(other), function(other), strict=True):
        assert torch.equal(got, expected)


def test_tensors_without_memory():
    """torch has zeros that take none, and what is to become functions of others; the dispatcher makes them ordinary."""
    x, target = random(3, 5, dtype=torch.float32), torch.tensor([0, 4, 2])
    zeros = torch._efficientzerotensor(3, 5)
    ours.softmax(x, -1).backward(torch.zeros(3, 5))
    ours.cross_entropy(x.detach(), target)
    assert torch.equal(ours.softmax(zeros, -1), ours.softmax(torch.zeros(3, 5), -1))
    assert ours.cross_entropy(zeros, target) == ours.cross_entropy(torch.zeros(3, 5), target)
    ours.softmax(x, -1).backward(zeros)
    assert torch.equal(x.grad, torch.zeros(3, 5))
    functional = ours.softmax(torch._to_functional_tensor(x.detach()), -1)
    assert torch.equal(torch._from_functional_tensor(functional), ours.softmax(x, -1))


def test_tensors_on_two_devices():
    """Beside a tensor on "meta" results had been memory that nobody had filled."""
    x, target = random(3, 5), torch.tensor([0, 4, 2])
    for logits in (x, x.detach()):
        for given in ((logits, target.to("meta")), (logits.to("meta"), target), (logits, target, x[0].to("meta"))):
            with pytest.raises(TypeError, match="^logits is on device .* expected both on one device"):
                ours.cross_entropy(given[0], given[1], *(one.detach() for one in given[2:]))
    with pytest.raises(TypeError, match="^x is on device cpu and mask on meta"):
        ours.softmax(x, -1, mask=x.to("meta") > 0)
    with FakeTensorMode() as mode, pytest.raises(TypeError, match="^logits is on device cpu and target on cuda"):
        ours.cross_entropy(mode.from_tensor(x), torch.zeros(3, dtype=torch.int64, device="cuda"))
    assert ours.cross_entropy(x.to("meta"), target.to("meta")).is_meta


def test_traced_by_make_fx():
    """No value is looked at, and forward and backward are the operators."""
    x, target = random(3, 5), torch.tensor([0, 4, 2])
    graph = make_fx(lambda x: torch.autograd.grad(ours.cross_entropy(x, target), x)[0])(x)
    assert "gpusoftmax.cross_entropy_backward" in graph.code
    torch.testing.assert_close(graph(x).detach(), torch.autograd.grad(F.cross_entropy(x, target), x)[0])


def test_checkpointed():
    x, target = random(3, 5), torch.tensor([0, 4, 2])

    def function(x):
        return ours.cross_entropy(x * 2, target) + ours.softmax(x, -1).pow(2).sum()

    got = torch.autograd.grad(checkpoint(function, x, use_reentrant=False), x)[0]
    assert same_bits(got, torch.autograd.grad(function(x), x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_errors():
    x, target = random(3, 4, dtype=torch.float32), torch.tensor([0, 1, 2])
    nested = torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged)
    for error, message, call in (
        (TypeError, "^input is a ndarray, expected a torch tensor", lambda: ours.softmax(np.zeros(3), 0)),
        (TypeError, "^logits is a list, expected a torch tensor", lambda: ours.sample([1.0], rng=0)),
        (TypeError, "^input is a nested tensor", lambda: ours.softmax(nested, -1)),
        (TypeError, "^target is a nested tensor", lambda: ours.cross_entropy(x, nested)),
        (TypeError, "^input is a nested tensor", lambda: ours.linear_cross_entropy(nested, x, target)),
        (TypeError, "^input has dtype int64, expected one of", lambda: ours.softmax(target, 0)),
        (TypeError, "^input has dtype complex64", lambda: ours.softmax(x.cfloat(), 0, torch.float32)),
        (IndexError, "axis 2 is out of bounds", lambda: ours.softmax(x, 2)),
        (ValueError, "^temperature is 0.0", lambda: ours.log_softmax(x, -1, temperature=0.0)),
        (IndexError, r"^target\[1\] .* is 4", lambda: ours.cross_entropy(x, torch.tensor([0, 4, 1]))),
        (ValueError, "^target has shape", lambda: ours.cross_entropy(x, target[:2])),
        (ValueError, "^reduction is 'max'", lambda: ours.cross_entropy(x, target, reduction="max")),
        (ValueError, "^label_smoothing is 2", lambda: ours.cross_entropy(x, target, label_smoothing=2)),
        (TypeError, "^weight is a list", lambda: ours.cross_entropy(x, target, [1.0] * 4)),
        (TypeError, "^weight requires grad", lambda: ours.cross_entropy(x, target, torch.ones(4, requires_grad=True))),
        (TypeError, "^axis is None", lambda: ours.token_logprobs(x, target, None)),
        (TypeError, "^rng is 'a'", lambda: ours.sample(x, rng="a")),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("name", ours.__all__)
def test_docstrings(name):
    import doctest

    function = getattr(ours, name)
    assert "Examples\n" in function.__doc__.replace("    ", "")
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for test in finder.find(function, name, globs={}):
        runner.run(test)
    assert runner.tries and not runner.failures


@pytest.mark.parametrize("name", ours.__all__)
def test_results_are_not_one_of_two_types(name):
    """Type checkers refuse `cross_entropy(...).backward()` where the result may be another type that has none."""
    function = getattr(ours, name)
    returned = typing.get_type_hints(getattr(function, "forward", function))["return"]
    assert not isinstance(returned, types.UnionType)
