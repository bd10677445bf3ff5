"""gpusoftmax.torch.linear_cross_entropy: torch's values and gradients, of any order, in the memory of a chunk."""

import itertools

import pytest
import torch
from torch.nn import functional

import gpusoftmax
from gpusoftmax.torch import LinearCrossEntropyLoss, linear_cross_entropy

N_ROWS, N_FEATURES, N_CLASSES = 7, 5, 11


def tensors(dtype=torch.float64, shape=(N_ROWS,), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    target = torch.randint(0, N_CLASSES, shape, generator=generator)
    target.view(-1)[1] = -100
    return normal(*shape, N_FEATURES), normal(N_CLASSES, N_FEATURES), normal(N_CLASSES), target


def chain(x, w, bias, target, **options):
    """torch's own functions."""
    logits = functional.linear(x, w, bias)
    loss = functional.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
    return loss.reshape(target.shape) if options.get("reduction") == "none" else loss


def gradients(loss, *given):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad(loss, given, upstream)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_values_and_gradients_are_those_of_torch(reduction, smoothing, chunk_size):
    x, w, bias, target = tensors()
    weight = torch.linspace(0.5, 1.5, N_CLASSES, dtype=torch.float64)
    options = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    ours = linear_cross_entropy(x, w, target, linear_bias=bias, chunk_size=chunk_size, **options)
    theirs = chain(x, w, bias, target, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(ours, x, w, bias), gradients(theirs, x, w, bias), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=3)], ids=str)
def test_only_the_gradients_that_are_asked_for(wanted):
    *given, target = tensors()
    given = [
        tensor.requires_grad_(is_wanted) if is_wanted else tensor.detach()
        for tensor, is_wanted in zip(given, wanted, strict=True)
    ]
    loss = linear_cross_entropy(given[0], given[1], target, linear_bias=given[2])
    assert loss.requires_grad == any(wanted)
    asked = [tensor for tensor in given if tensor.requires_grad]
    for one, other in (
        zip(gradients(loss, *asked), gradients(chain(*given, target), *asked), strict=True) if asked else ()
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    x, w, bias, target = tensors(shape=(4,))

    def loss(x, w, bias):
        return linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction, chunk_size=3)

    assert torch.autograd.gradcheck(loss, (x, w, bias))
    assert torch.autograd.gradgradcheck(loss, (x, w, bias))


def test_a_retained_graph_gives_the_same_gradients_again():
    """Gradients are handed out, and whoever gets them may write into them."""
    x, w, bias, target = tensors()
    loss = linear_cross_entropy(x, w, target, linear_bias=bias)
    first = [grad.clone() for grad in torch.autograd.grad(loss, (x, w, bias), retain_graph=True)]
    for grad in torch.autograd.grad(3 * loss, (x, w, bias), retain_graph=True):
        grad.zero_()
    for one, other in zip(torch.autograd.grad(loss, (x, w, bias)), first, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_batches_of_sequences():
    x, w, _, target = tensors(torch.float32, shape=(3, 4))
    ours, theirs = linear_cross_entropy(x, w, target), chain(x, w, None, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, x, w), gradients(theirs, x, w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    x, w, bias, target = tensors(dtype)
    ours = linear_cross_entropy(x, w, target, linear_bias=bias)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, w, bias)]
    theirs = chain(*wide, target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(ours, x, w, bias), gradients(theirs, *wide), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-3)


def test_compiled_whole():
    x, w, bias, target = tensors(torch.float32)

    def loss(x, w, bias):
        return 2 * linear_cross_entropy(x, w, target, linear_bias=bias)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, bias), loss(x, w, bias))
    torch.testing.assert_close(gradients(compiled(x, w, bias), x, w, bias), gradients(loss(x, w, bias), x, w, bias))


def test_module_has_the_state_of_torch():
    options = {"bias": True, "label_smoothing": 0.1, "weight": torch.linspace(0.5, 1, N_CLASSES)}
    ours = LinearCrossEntropyLoss(N_FEATURES, N_CLASSES, **options)
    assert [*ours.state_dict()] == ["weight", "linear.weight", "linear.bias"]
    theirs = torch.nn.Linear(N_FEATURES, N_CLASSES)
    theirs.load_state_dict({"weight": ours.linear.weight.detach(), "bias": ours.linear.bias.detach()})
    x, _, _, target = tensors(torch.float32)
    loss, logits = ours(x, target), theirs(x)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, target, options["weight"], label_smoothing=0.1))
    loss.backward()
    assert ours.linear.weight.grad.shape == (N_CLASSES, N_FEATURES) and ours.linear.bias.grad is not None


def test_the_core_names_the_differentiable_version():
    x, w, _, target = tensors()
    with pytest.raises(TypeError, match=r"gpusoftmax\.torch"):
        gpusoftmax.linear_cross_entropy(x, w, target)


def test_a_bad_label():
    x, w, _, target = tensors()
    target[0] = N_CLASSES
    with pytest.raises(IndexError, match="target"):
        linear_cross_entropy(x, w, target)
