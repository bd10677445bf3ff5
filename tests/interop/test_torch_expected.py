"""soft_argmax, spatial_softmax, top_logprobs and topk_softmax of torch tensors that require grad."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import gpusoftmax
from tests.interop.test_torch_transform import MATRIX, everything, random, tensors, through

TARGET = torch.tensor([2, 2, -100])
COLUMNS = torch.arange(7, dtype=torch.float64)


def top(result):
    """The values, which have gradients."""
    assert not result[1].is_floating_point() and not result[1].requires_grad
    return result[0]


def their_top(z, k):
    log_probs = F.log_softmax(z, -1)
    picked = torch.where(TARGET == -100, 0, log_probs.gather(1, TARGET.clamp(0)[:, None])[:, 0])
    return torch.cat([picked[:, None], log_probs.topk(k).values], -1)


PAIRS = {  # of ours, and of torch's for transformed logits
    "soft_argmax": (gpusoftmax.soft_argmax, lambda z: (F.softmax(z, -1) * COLUMNS).sum(-1)),
    "top_logprobs": (lambda x, **o: top(gpusoftmax.top_logprobs(x, 2, TARGET, **o)), lambda z: their_top(z, 2)),
    "topk_softmax": (
        lambda x, **o: top(gpusoftmax.topk_softmax(x, 2, **o)),
        lambda z: F.softmax(z.topk(2).values, -1),
    ),
    "topk_softmax of all": (
        lambda x, **o: top(gpusoftmax.topk_softmax(x, 2, renormalize=False, **o)),
        lambda z: F.softmax(z, -1).topk(2).values,
    ),
}


def options_for(name):
    options = everything()
    # All rows have two columns left, for the largest two.
    options["mask"][:, 3] = True
    return options


SOME = [name if name == "topk_softmax" else pytest.param(name, marks=MATRIX) for name in PAIRS]


@pytest.mark.parametrize("transform", [False, pytest.param(True, marks=MATRIX)])
@pytest.mark.parametrize("name", SOME)
def test_values_and_gradients(name, transform):
    """Those of torch's operations, and with the bits that tensors without gradients get."""
    x, options = random(3, 7), options_for(name) if transform else {}
    function, theirs = PAIRS[name]
    got, expected = function(x, **options), theirs(through(x, **options))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(got, function(x, **options))
    wanted = [x, *tensors(options)]
    upstream = torch.linspace(-1, 2, got.numel(), dtype=torch.float64).reshape(got.shape)
    found, exact = (torch.autograd.grad(one, wanted, upstream, retain_graph=True) for one in (got, expected))
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
    beside = tensors(options)

    def call(x, *beside):
        changed = dict(zip(("temperature", "bias"), beside, strict=False))
        return function(x, **{**options, **changed})

    assert gradcheck(call, (x, *beside))
    assert gradgradcheck(call, (x, *beside))


@MATRIX
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAIRS)
def test_functional_transforms(name):
    x, (function, theirs) = random(3, 7).detach(), PAIRS[name]

    def grad_of_grad(f):
        return torch.func.grad(lambda x: torch.func.grad(lambda x: f(x).pow(2).sum())(x).pow(2).sum())(x)

    if name == "top_logprobs":  # which looks at the values to find the largest
        with pytest.raises(TypeError, match="no memory of its own"):
            grad_of_grad(function)
    else:
        torch.testing.assert_close(grad_of_grad(function), grad_of_grad(theirs), rtol=1e-10, atol=1e-12)


def expected_coordinates(z):
    """Of maps of several pixels each way."""
    probs = F.softmax(z.flatten(-2), -1).reshape(z.shape)
    x, y = (torch.linspace(-1, 1, size, dtype=torch.float64) for size in (z.shape[-1], z.shape[-2]))
    return torch.stack([(probs * x).sum((-1, -2)), (probs * y[:, None]).sum((-1, -2))], -1)


@MATRIX
@pytest.mark.parametrize("transform", [False, True])
def test_coordinates(transform):
    features = random(2, 3, 4, 2)
    options, z = {}, features
    if transform:
        temperature = (torch.rand((2, 3), dtype=torch.float64) + 0.5).requires_grad_()
        mask = torch.arange(8).reshape(4, 2) % 3 != 1
        options = {"temperature": temperature, "mask": mask}
        z = (features / temperature[..., None, None]).masked_fill(~mask, -torch.inf)
    got = gpusoftmax.spatial_softmax(features, **options)
    torch.testing.assert_close(got, expected_coordinates(z), rtol=1e-10, atol=1e-12)
    beside = tensors(options)

    def call(features, *temperature):
        given = {"temperature": temperature[0]} if temperature else {}
        return gpusoftmax.spatial_softmax(features, **{**options, **given})

    assert gradcheck(call, (features, *beside)) and gradgradcheck(call, (features, *beside))


@MATRIX
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtypes_and_other_axes(dtype):
    x = random(4, 7, 3, dtype=dtype)
    for value in (
        gpusoftmax.soft_argmax(x, 1),
        gpusoftmax.soft_argmax(x, 1, keepdims=True, dtype="float64"),
        gpusoftmax.spatial_softmax(x),
        gpusoftmax.top_logprobs(x, 2, axis=1).logprob,
        gpusoftmax.topk_softmax(x, 2, axis=1).probs,
        gpusoftmax.topk_softmax(x, 2, axis=1, renormalize=False).probs,
    ):
        assert value.requires_grad and value.dtype != torch.bfloat16
        (once,) = torch.autograd.grad(value.pow(2).sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(value.pow(2).sum(), x, create_graph=True)
        assert once.dtype == again.dtype == dtype and once.shape == x.shape and once.any()
        torch.testing.assert_close(once, again)
        (second,) = torch.autograd.grad(again.float().pow(2).sum(), x)
        assert second.isfinite().all() and second.any()
    assert gpusoftmax.soft_argmax(x, 1, keepdims=True).shape == (4, 1, 3)


def test_what_is_refused():
    x = random(3, 7)
    with pytest.raises(TypeError, match="^out is given and x requires grad"):
        gpusoftmax.soft_argmax(x, out=torch.empty(3))
    with pytest.raises(TypeError, match="^out is given and features requires grad"):
        gpusoftmax.spatial_softmax(x, out=torch.empty(2))
    with pytest.raises(ValueError, match="^k is 8"):
        gpusoftmax.topk_softmax(x, 8)
