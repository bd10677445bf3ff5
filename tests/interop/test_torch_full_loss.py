"""cross_entropy of gpusoftmax.torch with what torch's does not have: against operations of torch, in float64."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gpusoftmax
from gpusoftmax.torch import CrossEntropyLoss, cross_entropy

F64 = torch.float64
KINDS = ["labels", "shares", "probs"]
MATRIX = pytest.mark.matrix


def make(kind, n_rows=5, n_cols=7, seed=0):
    """(logits, target)"""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_rows, n_cols, dtype=F64, generator=generator) * 3
    labels = torch.randint(0, n_cols, (n_rows, 3), generator=generator)
    labels[1, 0] = -100
    if kind == "labels":
        return logits, labels[:, 0]
    if kind == "shares":
        return logits, (labels, torch.rand(n_rows, 3, dtype=F64, generator=generator))
    return logits, torch.rand(n_rows, n_cols, dtype=F64, generator=generator).softmax(1)


def expected(logits, target, weight=None, row_weight=None, z_loss=0.0, label_smoothing=0.0, softcap=None):
    """The loss of each row, by its definition."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    n_cols, w = z.shape[1], torch.ones(z.shape[1], dtype=F64) if weight is None else weight
    if isinstance(target, tuple):
        labels, shares = target
        q = torch.zeros_like(z).scatter_add(1, labels.clamp(min=0), torch.where(labels == -100, 0, shares))
        counts = (labels != -100).any(1)
    elif target.is_floating_point():
        q, counts = target, torch.ones(len(z), dtype=torch.bool)
    else:
        q, counts = torch.nn.functional.one_hot(target.clamp(min=0), n_cols).to(F64), target != -100
    r = (torch.ones(len(z), dtype=F64) if row_weight is None else row_weight) * counts
    mass = ((1 - label_smoothing) * q + label_smoothing / n_cols) * w
    lse = z.logsumexp(1)
    return r * (-(mass * z.log_softmax(1)).sum(1) + z_loss * (q * w).sum(1) * lse**2)


OPTIONS = [
    {},
    {"z_loss": 0.02},
    {"row_weight": torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0], dtype=F64), "label_smoothing": 0.1},
    {"weight": torch.linspace(0.5, 2, 7, dtype=F64), "z_loss": 0.02, "label_smoothing": 0.2, "softcap": 4.0},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [*(pytest.param(one, marks=MATRIX) for one in OPTIONS[:3]), OPTIONS[3]],
    ids=lambda options: "-".join(options),
)
def test_values_and_derivatives(kind, options):
    logits, target = make(kind)
    if kind == "labels" and not set(options) - {"weight", "label_smoothing", "softcap"}:
        options = {**options, "z_loss": 1e-3}
    logits.requires_grad_()
    loss = cross_entropy(logits, target, reduction="none", **options)
    torch.testing.assert_close(loss, expected(logits, target, **options), rtol=1e-12, atol=1e-12)
    upstream = torch.linspace(-1, 2, 5, dtype=F64)
    (found,) = torch.autograd.grad(loss, logits, upstream)
    (wanted,) = torch.autograd.grad(expected(logits, target, **options), logits, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)

    def function(x):
        return cross_entropy(x, target, reduction="none", **options)

    assert gradcheck(function, logits) and gradgradcheck(function, logits)


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("labels", "mean"), ("shares", "sum"), ("probs", "normalizer")]
    + [pytest.param(*pair, marks=MATRIX) for pair in itertools.product(KINDS, ["sum", "mean", "normalizer"])],
)
def test_reductions(kind, reduction):
    logits, target = make(kind)
    row_weight = OPTIONS[2]["row_weight"]
    normalizer = 4.0 if reduction == "normalizer" else None
    options = {"reduction": "mean" if normalizer else reduction, "normalizer": normalizer, "row_weight": row_weight}
    of_core = gpusoftmax.cross_entropy(logits, target, z_loss=0.1, return_z_loss=True, **options)
    logits.requires_grad_()
    told = cross_entropy(logits, target, z_loss=0.1, return_z_loss=True, **options)
    torch.testing.assert_close(told.loss, of_core.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(told.z_loss, of_core.z_loss, rtol=1e-13, atol=0)
    assert told.loss.requires_grad and not told.z_loss.requires_grad
    routed = gpusoftmax.cross_entropy(logits, target, z_loss=0.1, **options)
    (found,) = torch.autograd.grad(routed, logits)
    _, wanted = gpusoftmax.cross_entropy_with_grad(logits.detach(), target, z_loss=0.1, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_a_normalizer_in_a_tensor_of_one_axis():
    logits, target = make("labels")
    of_core = gpusoftmax.cross_entropy(logits, target, normalizer=torch.tensor([4]))
    loss = cross_entropy(logits.requires_grad_(), target, normalizer=torch.tensor([4]))
    assert loss.shape == of_core.shape == ()
    torch.testing.assert_close(loss, of_core, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"normalizer has shape \(2,\), expected one element"):
        cross_entropy(logits, target, normalizer=torch.ones(2))


def test_what_is_told():
    logits, target = make("labels")
    logits.requires_grad_()
    told = cross_entropy(logits, target, return_lse=True, return_correct=True)
    counts = target != -100
    torch.testing.assert_close(told.lse, torch.where(counts, logits.detach().logsumexp(1), 0))
    assert told.n_correct == ((logits.argmax(1) == target) & counts).sum() and told.n_correct.dtype == torch.int64
    assert told.z_loss is None and not told.lse.requires_grad


def test_torch_agrees_on_probabilities():
    """torch's own soft targets: any shape, weights, smoothing; no warning, and no operation of torch's."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, 3, dtype=F64, generator=generator, requires_grad=True)
    probs = torch.rand(4, 6, 3, dtype=F64, generator=generator).softmax(1)
    weight = torch.rand(6, dtype=F64, generator=generator)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        found = CrossEntropyLoss(weight, **options)(x, probs)
        wanted = torch.nn.functional.cross_entropy(x, probs, weight, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
        (dx,), (dwanted,) = (torch.autograd.grad(one.sum(), x) for one in (found, wanted))
        torch.testing.assert_close(dx, dwanted, rtol=1e-11, atol=1e-13)
        routed = gpusoftmax.cross_entropy(x.movedim(1, -1), probs.movedim(1, -1), weight, **options)
        torch.testing.assert_close(routed, wanted, rtol=1e-12, atol=1e-13)


def test_forward_mode_and_functions_of_torch():
    logits, target = make("shares")
    tangent = torch.linspace(-1, 1, logits.numel(), dtype=F64).reshape(logits.shape)
    function = lambda x: cross_entropy(x, target, z_loss=0.1, row_weight=OPTIONS[2]["row_weight"])  # noqa: E731
    value, moved = torch.func.jvp(function, (logits,), (tangent,))
    torch.testing.assert_close(moved, (torch.func.grad(function)(logits) * tangent).sum())
    torch.testing.assert_close(value, function(logits))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16], ids=str)
@pytest.mark.parametrize("empty_row", ["nan", "zero"])
def test_what_is_told_under_functions_of_torch(empty_row, dtype):
    """As kernels tell it: no row is correct whose loss is NaN, or of which nothing is left; no z_loss is 0."""
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor([[nan, 0, 1], [inf, 0, 1], [-inf, -inf, -inf], [-inf, 0, 0], [3, 1, 2]], dtype=F64)
    for row, label in itertools.product(rows, torch.tensor([0, 1]).to(dtype)):

        def told(x, label=label):
            options = {"return_z_loss": True, "return_lse": True, "return_correct": True}
            return tuple(cross_entropy(x, label, mask=torch.ones(3) > 0, empty_row=empty_row, **options))

        for one, other in zip(torch.vmap(told)(row[None]), told(row), strict=True):
            torch.testing.assert_close(one[0], other, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_whole(kind):
    logits, target = make(kind)
    compiled = torch.compile(
        lambda x: cross_entropy(x, target, z_loss=0.1, reduction="sum"), fullgraph=True, backend="aot_eager"
    )
    one, two = (logits.clone().requires_grad_() for _ in range(2))
    compiled(one).backward()
    cross_entropy(two, target, z_loss=0.1, reduction="sum").backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_torch_finds_nothing_wrong_with_the_operators():
    logits, (labels, shares) = make("shares")
    through = (1.0, None, None, "nan", None, None, None, None)
    operators = torch.ops.gpusoftmax
    arguments = logits, labels, shares, None, None, -100, 0.1, 0.01, True, False, None, *through
    torch.library.opcheck(operators.losses_of_weighted_rows, arguments)
    lse, dloss = logits.logsumexp(1), torch.ones(5, dtype=F64)
    arguments = F64, logits, labels, shares, None, None, lse, dloss, -100, 0.1, 0.01, *through
    torch.library.opcheck(operators.losses_of_weighted_rows_backward, arguments)


def test_half_types_and_ignored_rows():
    logits, target = make("labels")
    x = logits.to(torch.bfloat16)
    x[1] = torch.nan  # is ignored
    x.requires_grad_()
    loss = cross_entropy(x, target, z_loss=0.01)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    assert not x.grad[1].any() and x.grad.isfinite().all()


def test_gradients_that_there_are_not():
    logits, labels = make("labels")
    logits.requires_grad_()
    with pytest.raises(TypeError, match="row_weight requires grad"):
        cross_entropy(logits, labels, row_weight=torch.ones(5, dtype=F64, requires_grad=True))
    with pytest.raises(ValueError, match="normalizer is given and reduction is 'sum'"):
        cross_entropy(logits, labels, reduction="sum", normalizer=3.0)
