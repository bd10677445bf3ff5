"""gpusoftmax.torch.linear_cross_entropy: torch's values and gradients, of any order, in the memory of a chunk."""

import itertools
import warnings

import pytest
import torch
from torch.nn import functional
from torch.testing._internal.common_methods_invocations import op_db

import gpusoftmax
from gpusoftmax import _torch_warnings
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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_input_that_comes_from_the_weights(reduction):
    """As where the embedding of the tokens is the last layer, too: each gradient is differentiated on its own."""
    _, w, _, target = tensors()

    def derivatives(function):
        loss = function(w[:N_ROWS] * 2, w).pow(2).sum()
        (first,) = torch.autograd.grad(loss, w, create_graph=True)
        return first, torch.autograd.grad(first.pow(2).sum(), w)[0]

    got = derivatives(lambda x, w: linear_cross_entropy(x, w, target, reduction=reduction))
    expected = derivatives(lambda x, w: chain(x, w, None, target, reduction=reduction))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_second_derivatives_with_respect_to_the_bias_alone():
    x, w, bias, target = tensors()

    def second(function):
        (first,) = torch.autograd.grad(function(x.detach(), w.detach(), bias), bias, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), bias)[0]

    got = second(lambda x, w, bias: linear_cross_entropy(x, w, target, linear_bias=bias))
    torch.testing.assert_close(got, second(lambda x, w, bias: chain(x, w, bias, target)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_gradients(reduction):
    """As torch.autograd.functional.jacobian(vectorize=True) takes them, which differentiates none of them."""
    x, w, bias, target = tensors()
    upstream = torch.randn(3, *(target.shape if reduction == "none" else ()), dtype=torch.float64)

    def gradients_of(function):
        return torch.autograd.grad(function(), (x, w, bias), upstream, is_grads_batched=True)

    got = gradients_of(lambda: linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction))
    expected = gradients_of(lambda: chain(x, w, bias, target, reduction=reduction))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert not any(one.requires_grad for one in got)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed(reduction):
    x, w, bias, target = tensors()

    def loss(x, w, bias):
        return linear_cross_entropy(x * 2, w, target, linear_bias=bias, reduction=reduction)

    kept = torch.utils.checkpoint.checkpoint(loss, x, w, bias, use_reentrant=False)
    assert all(map(torch.equal, gradients(kept, x, w, bias), gradients(loss(x, w, bias), x, w, bias)))


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


@pytest.mark.parametrize("input_dtype", ["autocast", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, input_dtype):
    """Of an input in a half type and parameters that are not, whose gradients survive the scale of a GradScaler."""
    x, w, bias, target = tensors(torch.float32)
    small = 2.0**-26 if dtype == torch.float16 else 1.0  # nothing in float16, before it is scaled

    with torch.autocast("cpu", dtype):
        hidden = functional.linear(x, torch.eye(N_FEATURES)) if input_dtype == "autocast" else x
        loss = linear_cross_entropy(hidden, w, target, linear_bias=bias)
        assert linear_cross_entropy(x.double(), w.double(), target).dtype == torch.float64
    got = [one / small for one in torch.autograd.grad(loss * small, (w, bias))]
    expected = chain(x, w, bias, target)
    close = {"rtol": 0.03, "atol": 0.005}
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(tuple(got), torch.autograd.grad(expected, (w, bias)), **close)


@pytest.mark.parametrize("function", [linear_cross_entropy, gpusoftmax.linear_cross_entropy], ids=["torch", "core"])
def test_all_logits_inside_autocast(function):
    """Where they are held they are in float32 too: float16 would round them, and make infinities of large ones."""
    x, w, _, target = tensors(torch.float32)
    probabilities = torch.softmax(torch.randn(N_ROWS, N_CLASSES, generator=torch.Generator().manual_seed(1)), -1)

    def results():
        of_probabilities = function(300 * x, 300 * w, probabilities)
        (again,) = torch.autograd.grad(function(x, 300 * w, target, reduction="sum"), w, create_graph=True)
        return of_probabilities, again

    expected = results()
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(results(), expected)


def test_compiled_whole():
    x, w, bias, target = tensors(torch.float32)

    def loss(x, w, bias):
        return 2 * linear_cross_entropy(x, w, target, linear_bias=bias)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, bias), loss(x, w, bias))
    torch.testing.assert_close(gradients(compiled(x, w, bias), x, w, bias), gradients(loss(x, w, bias), x, w, bias))


def test_compiled_with_its_backward():
    """By compiled autograd, which looked in vain for what had been kept beside what was saved."""
    x, w, bias, target = tensors(torch.float32)

    def loss(x, w, bias):
        return 2 * linear_cross_entropy(x, w, target, linear_bias=bias)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, w, bias), (x, w, bias))
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: compiled(x, w, bias).backward(), backend="aot_eager")()
    torch.testing.assert_close((x.grad, w.grad, bias.grad), expected)


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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("is_soft", [False, True])
@pytest.mark.parametrize("axes", [(), (2, 3)], ids=str)
def test_targets_and_axes_that_have_no_chunks_are_those_of_torch(axes, is_soft, reduction):
    generator = torch.Generator().manual_seed(3)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).requires_grad_()

    x, w, bias = normal(N_ROWS, N_FEATURES), normal(N_CLASSES, *axes, N_FEATURES), normal(N_CLASSES, *axes)
    target = torch.randint(0, N_CLASSES, (N_ROWS, *axes), generator=generator)
    target.view(-1)[1] = -100
    given = x, w, bias
    if is_soft:
        target = normal(N_ROWS, N_CLASSES, *axes)
        given = *given, target
    weight = torch.linspace(0.5, 1.5, N_CLASSES, dtype=torch.float64)
    options = {"linear_bias": bias, "weight": weight, "reduction": reduction, "ignore_index": None}
    ours = linear_cross_entropy(x, w, target, **options)
    theirs = functional.linear_cross_entropy(x, w, target, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(ours, *given), gradients(theirs, *given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


INFOS = [info for info in op_db if info.name == "nn.functional.linear_cross_entropy"]


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.full_name)
def test_torch_agrees_on_its_samples(info):
    """In float64: in float32 the two products of matrices differ by rounding, and the samples' terms are large."""
    count = 0
    for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        result = linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
        of_all = sample.input, *sample.args, *sample.kwargs.values()
        given = [one for one in of_all if isinstance(one, torch.Tensor) and one.requires_grad]
        for one, other in zip(gradients(result, *given), gradients(expected, *given), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        count += 1
    assert count > 50


def test_module_with_further_axes():
    options = {"out_features": (3,), "bias": True, "dtype": torch.float64}
    ours = LinearCrossEntropyLoss(N_FEATURES, N_CLASSES, **options)
    theirs = torch.nn.LinearCrossEntropyLoss(N_FEATURES, N_CLASSES, **options)
    theirs.load_state_dict(ours.state_dict())
    x, target = tensors()[0], torch.arange(3 * N_ROWS).reshape(N_ROWS, 3) % N_CLASSES
    torch.testing.assert_close(ours(x, target), theirs(x, target), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape"), [("linear_weight", (N_CLASSES, 2, 4)), ("target", (N_ROWS, 3)), ("linear_bias", (2, N_CLASSES))]
)
def test_shapes_that_do_not_match_where_all_logits_are_held(name, shape):
    shapes = {"linear_weight": (N_CLASSES, 2, N_FEATURES), "linear_bias": (N_CLASSES, 2), "target": (N_ROWS, 2)}
    given = {one: torch.zeros(size, dtype=torch.float64) for one, size in {**shapes, name: shape}.items()}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        linear_cross_entropy(tensors()[0], **{**given, "target": given["target"].long()})


def test_weights_without_an_axis_of_classes():
    """A probability for each class, too, which goes another way."""
    x, w, _, target = tensors()
    for given in (target, torch.full((N_ROWS, N_CLASSES), 1 / N_CLASSES, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"linear_weight has shape \(\d+,\), expected \(n_classes, "):
            linear_cross_entropy(x, w[0], given)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x, w, t: torch.func.grad(lambda one: linear_cross_entropy(one, w, t))(x.detach()), "torch.func"),
        (lambda x, w, t: linear_cross_entropy(x, w, torch.ones(N_ROWS, N_CLASSES).double()), "probabilities"),
        (lambda x, w, t: linear_cross_entropy(x, w[:, None], t[:, None]), "more axes"),
        (lambda x, w, t: torch.autograd.grad(linear_cross_entropy(x, w, t), x, create_graph=True), "again"),
    ],
    ids=["func", "probabilities", "axes", "twice"],
)
def test_a_warning_where_all_logits_are_held(call, reason):
    x, w, _, target = tensors()
    _torch_warnings._warn.cache_clear()
    with pytest.warns(UserWarning, match=f"holds all logits.*{reason}"):
        call(x, w, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x, w, target)  # it has been said
        linear_cross_entropy(x, w, target).backward()


def test_a_bad_label():
    x, w, _, target = tensors()
    target[0] = N_CLASSES
    with pytest.raises(IndexError, match="target"):
        linear_cross_entropy(x, w, target)


# ---------------------------------------------------------------- what cross_entropy has more


def extras(n_rows=N_ROWS, dtype=torch.float64):
    row_weight = torch.linspace(0.3, 2, n_rows, dtype=dtype)
    row_weight[2] = 0
    return {"row_weight": row_weight, "z_loss": 0.02, "temperature": 0.6, "softcap": 3.0}


def full_chain(
    x, w, bias, target, *, row_weight, z_loss, temperature, softcap, reduction, normalizer=None, weight=None
):
    """By its definition, in operations of torch."""
    z = softcap * torch.tanh(functional.linear(x, w, bias) / (temperature * softcap))
    z_losses = z_loss * z.logsumexp(-1) ** 2 * (1 if weight is None else weight[target.clamp(0)])
    losses = functional.cross_entropy(z, target, weight, reduction="none")
    row_weight = row_weight * (target != -100)
    losses = row_weight * (losses + z_losses)
    if reduction == "mean":
        divisor = (row_weight * (1 if weight is None else weight[target.clamp(0)])).sum()
        return losses.sum() / float(divisor if normalizer is None else normalizer)
    return losses if reduction == "none" else losses.sum()


REDUCTIONS = [
    ("mean", None),
    ("none", None),
    pytest.param("sum", None, marks=pytest.mark.matrix),
    ("mean", 4.0),
    pytest.param("mean", torch.tensor([4]), marks=pytest.mark.matrix),
]


@pytest.mark.parametrize(("reduction", "normalizer"), REDUCTIONS, ids=str)
@pytest.mark.parametrize("function", [linear_cross_entropy, gpusoftmax.linear_cross_entropy])
def test_values_and_gradients_of_the_whole_loss(reduction, normalizer, function):
    """The core's function goes to the differentiable one."""
    x, w, bias, target = tensors()
    weight = torch.linspace(0.5, 1.5, N_CLASSES, dtype=torch.float64)
    options = {**extras(), "reduction": reduction, "normalizer": normalizer, "weight": weight}
    ours = function(x, w, target, linear_bias=bias, chunk_size=3, **options)
    theirs = full_chain(x, w, bias, target, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(ours, x, w, bias), gradients(theirs, x, w, bias), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reduction", "normalizer"), REDUCTIONS, ids=str)
def test_gradcheck_of_the_whole_loss(reduction, normalizer):
    x, w, bias, target = tensors(shape=(4,))
    options = {**extras(4), "reduction": reduction, "normalizer": normalizer, "chunk_size": 3}

    def loss(x, w, bias):
        return linear_cross_entropy(x, w, target, linear_bias=bias, **options)

    assert torch.autograd.gradcheck(loss, (x, w, bias))
    assert torch.autograd.gradgradcheck(loss, (x, w, bias))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_is_told(recorded, reduction):
    x, w, bias, target = (one.detach() for one in tensors(shape=(3, 4)))
    target[0, 0] = functional.linear(x, w, bias)[0, 0].argmax()
    options = {"linear_bias": bias, **extras(12), "reduction": reduction}
    options["row_weight"] = options["row_weight"].reshape(3, 4)
    ask = {"return_z_loss": True, "return_lse": True, "return_correct": True}
    wanted = gpusoftmax.linear_cross_entropy(x, w, target, **options, **ask)
    told = linear_cross_entropy(x.requires_grad_(recorded), w, target, **options, **ask)
    assert told.loss.requires_grad == recorded and wanted.n_correct > 0 and wanted.lse.shape == (3, 4)
    for one, other in zip(told, wanted, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=0)
    assert not any(one.requires_grad for one in told[1:])
    told = linear_cross_entropy(x, w, target, **options, return_lse=True)
    assert told.z_loss is told.n_correct is None
    torch.testing.assert_close(told.lse, wanted.lse, rtol=0, atol=0)
    if recorded:
        told.loss.sum().backward()
        torch.testing.assert_close(x.grad, linear_gradient(x, w, target, options))


def linear_gradient(x, w, target, options):
    found = gpusoftmax.linear_cross_entropy_with_grad(x.detach(), w, target, **options)
    return found.dinput


@pytest.mark.parametrize("again", [False, True])
def test_idle_rows_have_no_gradient_whatever_they_hold(again):
    """Neither where it is to be differentiated again, nor by what comes from above."""
    x, w, bias, target = tensors()
    with torch.no_grad():
        x[2], x[1] = torch.nan, torch.inf  # of weight 0, and ignored
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, w, target, linear_bias=bias, reduction=reduction, **extras())
        upstream = torch.ones_like(loss)
        if reduction == "none":
            upstream[1], upstream[2] = torch.nan, torch.inf
        dx, *others = torch.autograd.grad(loss, (x, w, bias), upstream, create_graph=again)
        assert not dx[[1, 2]].any() and dx.isfinite().all() and all(one.isfinite().all() for one in others)


def test_the_whole_loss_compiled_whole():
    x, w, bias, target = tensors(torch.float32)
    options = {**extras(dtype=torch.float32), "normalizer": torch.tensor(3.0), "return_lse": True}

    def loss(x, w, bias):
        told = linear_cross_entropy(x, w, target, linear_bias=bias, return_correct=True, **options)
        return 2 * told.loss + 0 * told.lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, bias), loss(x, w, bias))
    torch.testing.assert_close(gradients(compiled(x, w, bias), x, w, bias), gradients(loss(x, w, bias), x, w, bias))


def test_parts_of_a_batch_add_up():
    """A normalizer of all parts, in a tensor: gradients are accumulated as autograd does it."""
    x, w, bias, target = tensors()
    given = extras()
    row_weight = given.pop("row_weight")
    whole = linear_cross_entropy(x, w, target, linear_bias=bias, row_weight=row_weight, **given)
    wanted = torch.autograd.grad(whole, (x, w, bias))
    normalizer = (row_weight * (target != -100)).sum()
    total = 0
    for part in (slice(0, 3), slice(3, N_ROWS)):
        loss = linear_cross_entropy(
            x[part], w, target[part], linear_bias=bias, row_weight=row_weight[part], normalizer=normalizer, **given
        )
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach(), rtol=1e-13, atol=0)
    for one, other in zip((x.grad, w.grad, bias.grad), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_module_with_the_whole_loss():
    x, _, _, target = tensors(torch.float32)
    options = {**extras(dtype=torch.float32), "return_z_loss": True, "return_lse": True, "return_correct": True}
    row_weight = options.pop("row_weight")
    loss_of = LinearCrossEntropyLoss(N_FEATURES, N_CLASSES, **options)
    told = loss_of(x, target, row_weight=row_weight, normalizer=3.0)
    wanted = linear_cross_entropy(x, loss_of.linear.weight, target, row_weight=row_weight, normalizer=3.0, **options)
    assert told.loss.requires_grad
    for one, other in zip(told, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weight", "row_weight", "normalizer", "temperature"])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("function", [linear_cross_entropy, gpusoftmax.linear_cross_entropy])
def test_gradients_that_there_are_not(name, recorded, function):
    x, w, _, target = tensors()
    size = {"weight": (N_CLASSES,), "row_weight": (N_ROWS,)}.get(name, ())
    given = torch.ones(size, dtype=torch.float64, requires_grad=True)
    if not recorded:
        x, w = x.detach(), w.detach()
    with pytest.raises(TypeError, match=f"^{name} .*requires grad"):
        function(x, w, target, **{name: given})


def test_a_normalizer_of_a_sum():
    x, w, _, target = tensors()
    with pytest.raises(ValueError, match="normalizer is given and reduction is 'sum'"):
        linear_cross_entropy(x, w, target, reduction="sum", normalizer=3.0)


def test_validation_can_be_left_out():
    """Of the core's function, whose tensors go to the differentiable one."""
    x, w, _, target = tensors()
    target[0] = N_CLASSES
    loss = gpusoftmax.linear_cross_entropy(x, w, target, validate=False, reduction="none")
    assert loss.requires_grad and loss[0].isnan() and loss[1:].isfinite().all()
    with pytest.raises(IndexError, match="target"):
        gpusoftmax.linear_cross_entropy(x, w, target)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_mode_and_functions_of_torch(reduction):
    x, w, bias, target = tensors()
    layer = x.detach(), w.detach(), bias.detach()
    options = {"reduction": reduction, "label_smoothing": 0.1}

    def of(x, w, bias):
        return linear_cross_entropy(x, w, target, linear_bias=bias, **options).pow(2).sum()

    def theirs(x, w, bias):
        return chain(x, w, bias, target, **options).pow(2).sum()

    def forward(function):
        with torch.autograd.forward_ad.dual_level():
            given = [torch.autograd.forward_ad.make_dual(one, one.cos()) for one in layer]
            return torch.autograd.forward_ad.unpack_dual(function(*given)).tangent

    for way in (
        forward,
        lambda function: torch.func.grad(function, (0, 1, 2))(*layer),
        lambda function: torch.func.jvp(torch.func.grad(function, 1), layer, layer)[1],
    ):
        torch.testing.assert_close(way(of), way(theirs), rtol=1e-10, atol=1e-12)
    several = torch.stack([layer[0], layer[0] * 2])
    losses = torch.func.vmap(lambda x: linear_cross_entropy(x, layer[1], target, reduction=reduction))(several)
    torch.testing.assert_close(losses[1], linear_cross_entropy(several[1], layer[1], target, reduction=reduction))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_is_told_under_functions_of_torch():
    x, w, bias, target = (one.detach() for one in tensors(shape=(2, 3)))

    def told(x):
        tell = {"return_z_loss": True, "return_lse": True, "return_correct": True}
        made = linear_cross_entropy(x, w, target, linear_bias=bias, z_loss=0.1, reduction="none", **tell)
        return made.loss.sum(), made

    _, of_func = torch.func.grad(told, has_aux=True)(x)
    torch.testing.assert_close(of_func, told(x)[1], rtol=1e-12, atol=1e-13)
