"""cross_entropy of gpusoftmax.torch, where the probabilities of the target have a gradient: in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import gpusoftmax
import gpusoftmax.torch as ours

F64, INF, NAN = torch.float64, torch.inf, torch.nan
ROWS, COLS = 4, 7


def random(*shape, seed=0, dtype=F64):
    return torch.randn(shape, dtype=F64, generator=torch.manual_seed(seed)).to(dtype).requires_grad_()


LABELS = torch.tensor([[3, 1, 3], [0, -100, 6], [-100, -100, -100], [5, 4, 0]])
"""Of the pair: one twice in its row, one that is none, a row that is ignored."""
W = torch.linspace(0.5, 2, COLS, dtype=F64)
ROW_WEIGHT = torch.tensor([2.0, 0.0, 1.0, 0.5], dtype=F64)
MASK = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1] * 7, [1] * 7, [1, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
TRANSFORM = {"softcap": 2.0, "bias": torch.linspace(-1, 1, COLS, dtype=F64), "temperature": torch.full((ROWS,), 0.7)}
OPTIONS = {
    "nothing": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weight": W, "row_weight": ROW_WEIGHT, "reduction": "sum"},
    "z_loss": {"z_loss": 0.1, "weight": W, "label_smoothing": 0.2, "reduction": "none"},
    "normalizer": {"normalizer": 3.0, "temperature": 0.7},
    "transform": {**TRANSFORM, "n_valid": COLS, "z_loss": 0.1, "row_weight": ROW_WEIGHT},
    "all labels": {"label_smoothing": 1.0, "z_loss": 0.1},
}
KINDS = ["dense", "pair"]
MATRIX = pytest.mark.matrix
BY_DEFAULT = [("weights", "pair"), ("z_loss", "dense"), ("transform", "dense"), ("transform", "pair")]


def target_of(kind, seed=5):
    """What requires grad, and the target that it makes."""
    if kind == "dense":
        return random(ROWS, COLS, seed=seed), lambda q: q
    return random(ROWS, 3, seed=seed), lambda v: (LABELS, v)


def expected(logits, target, reduction="mean", normalizer=None, **options):
    """The loss in operations of torch."""
    weight, row_weight = options.get("weight", torch.ones(COLS)), options.get("row_weight", torch.ones(ROWS))
    smoothing, z_loss, softcap = (options.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap"))
    temperature = options.get("temperature", 1.0)
    z = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    z = z + options.get("bias", 0)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    r = row_weight.to(F64)
    if isinstance(target, tuple):
        labels, shares = target
        q = torch.zeros_like(z).scatter_add(1, labels.clamp(min=0), torch.where(labels == -100, 0, shares))
        r = r * (labels != -100).any(1)
    else:
        q = target
    mass = ((1 - smoothing) * q + smoothing / COLS) * weight
    loss = r * (-(mass * z.log_softmax(1)).sum(1) + z_loss * (q * weight).sum(1) * z.logsumexp(1) ** 2)
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else normalizer or r.sum())


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*pair, marks=[] if pair in BY_DEFAULT else MATRIX) for pair in itertools.product(OPTIONS, KINDS)],
)
def test_values_and_derivatives(name, kind):
    """Of the logits and the target together."""
    options, (leaf, target) = OPTIONS[name], target_of(kind)
    x = random(ROWS, COLS)

    def function(x, leaf):
        return ours.cross_entropy(x, target(leaf), **options)

    got, wanted = function(x, leaf), expected(x, target(leaf), **options)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    upstream = torch.linspace(-1, 2, got.numel(), dtype=F64).reshape(got.shape)
    found, exact = (torch.autograd.grad(one, (x, leaf), upstream) for one in (got, wanted))
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)
    assert gradcheck(function, (x, leaf)) and gradgradcheck(function, (x, leaf))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("smoothing", "weighted"), [(0.0, True), (0.1, False)])
def test_the_gradient_is_that_of_torch(smoothing, weighted, reduction):
    x, q = random(3, 6, 2), random(3, 6, 2, seed=1)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    weight = torch.linspace(0.5, 2, 6, dtype=F64) if weighted else None
    for call in (
        ours.CrossEntropyLoss(weight, **options),
        lambda x, q: gpusoftmax.cross_entropy(x, q, weight, axis=1, **options),
        lambda x, q: gpusoftmax.cross_entropy(x.movedim(1, -1), q.movedim(1, -1), weight, **options),
    ):
        found, exact = (
            torch.autograd.grad(one.pow(2).sum(), (x, q))
            for one in (call(x, q), F.cross_entropy(x, q, weight, **options))
        )
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_asks(kind):
    """The target alone, the logits alone: the same gradients as together, and no other."""
    leaf, target = target_of(kind)
    x, options = random(ROWS, COLS), {"z_loss": 0.1}
    both = torch.autograd.grad(ours.cross_entropy(x, target(leaf), **options), (x, leaf))
    for call in (ours.cross_entropy, gpusoftmax.cross_entropy):
        of_target = call(x.detach(), target(leaf), **options)
        of_logits = call(x, target(leaf.detach()), **options)
        (found,) = torch.autograd.grad(of_target, leaf)
        assert torch.equal(found, both[1])
        (found,) = torch.autograd.grad(of_logits, x)
        assert torch.equal(found, both[0])
        assert not call(x.detach(), target(leaf.detach()), **options).requires_grad
    with torch.no_grad():
        assert not ours.cross_entropy(x, target(leaf)).requires_grad


def test_the_target_alone_of_second_derivatives():
    """Which are those of the logits: the loss is linear in the target."""
    x, q = random(ROWS, COLS), random(ROWS, COLS, seed=1)
    for x_wants in (False, True):
        given = x.detach().requires_grad_(x_wants)
        loss = ours.cross_entropy(given, q)
        (dq,) = torch.autograd.grad(loss, q, create_graph=True)
        assert dq.requires_grad == x_wants
    (found,) = torch.autograd.grad(dq.pow(2).sum(), given)
    (dq,) = torch.autograd.grad(F.cross_entropy(given, q), q, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(dq.pow(2).sum(), given)[0], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("empty_row", [pytest.param("nan", marks=MATRIX), "zero"])
def test_a_masked_vocabulary(empty_row):
    """Of a student and a teacher: what cannot be has no gradient, and makes no NaN of those of the others."""
    x, teacher = random(ROWS, COLS), random(ROWS, COLS, seed=1)
    options = {"mask": MASK, "label_smoothing": 0.0, "empty_row": empty_row}

    def function(x, teacher):
        return ours.cross_entropy(x, ours.softmax(teacher, -1, mask=MASK), z_loss=0.1, **options)

    kept = torch.where(MASK, x, -1e4), torch.where(MASK, teacher, -1e4)
    wanted = expected(kept[0], kept[1].softmax(1), z_loss=0.1)
    got = function(x, teacher)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    found, exact = (torch.autograd.grad(one, (x, teacher)) for one in (got, wanted))
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-13)
    assert gradcheck(function, (x, teacher)) and gradgradcheck(function, (x, teacher))


def each_way(function, leaves):
    """The gradient as it is, the one that can be differentiated, and that of torch.func."""
    once = torch.autograd.grad(function(*leaves), leaves)
    again = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    of_func = torch.func.grad(function, tuple(range(len(leaves))))(*(one.detach() for one in leaves))
    torch.testing.assert_close(again, once, rtol=1e-11, atol=1e-13, equal_nan=True)
    # Of rows without a loss, the last one only: there torch.func's gradient of the logits is what torch makes of it.
    torch.testing.assert_close(of_func[-1], once[-1], rtol=1e-11, atol=1e-13, equal_nan=True)
    seconds = torch.autograd.grad(sum(one.pow(2).sum() for one in again), leaves)
    return once, seconds


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_count(kind):
    """Whatever they hold; and of rows that do, NaN stays theirs."""
    x, (leaf, target) = random(ROWS, COLS), target_of(kind)
    with torch.no_grad():
        x[1], leaf[1] = NAN, NAN  # has weight 0
        x[3, 0] = NAN
        if kind == "pair":
            x[2] = INF  # is ignored

    def function(x, leaf):
        return ours.cross_entropy(x, target(leaf), row_weight=ROW_WEIGHT, z_loss=0.1, reduction="sum")

    for dx, dleaf in each_way(function, (x, leaf)):
        assert not dx[1].any() and not dleaf[1].any()
        assert dx[0].all() and dleaf[0].all() and dx[0].isfinite().all() and dleaf[0].isfinite().all()
        assert dx[3].isnan().all() and dleaf[3].isnan().all()
        assert kind == "dense" or not (dx[2].any() or dleaf[2].any())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_which_nothing_is_left(kind):
    x, (leaf, target) = random(ROWS, COLS), target_of(kind)
    mask = torch.ones(ROWS, COLS, dtype=torch.bool)
    mask[0] = False
    for empty_row in ("zero", "nan"):

        def function(x, leaf, empty_row=empty_row):
            options = {"mask": mask, "empty_row": empty_row, "reduction": "sum", "z_loss": 0.1}
            return ours.cross_entropy(x, target(leaf), **options)

        (dx, dleaf), (_, second) = each_way(function, (x, leaf))
        assert dleaf[3].all() and dleaf[3].isfinite().all() and second[3].isfinite().all()
        assert dleaf[0].isnan().all() if empty_row == "nan" else not (dleaf[0].any() or dx[0].any())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_infinite_loss_stays_one():
    """And its gradients are finite, whoever computes them."""
    x, q = random(2, 4), random(2, 4, seed=1)
    with torch.no_grad():
        x[0, 1], q[0, 1], q[1, 1] = -INF, 0.5, 0.0

    def function(x, q):
        return ours.cross_entropy(x, q, reduction="none")

    assert function(x, q)[0] == INF and torch.func.vmap(function)(x[:, None], q[:, None])[0] == INF
    first, second = each_way(lambda x, q: function(x, q).sum(), (x, q))
    assert all(one.isfinite().all() for one in (*first, *second))
    assert first[1][0, 1] == 0 and first[1][1, 1] > 0


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=MATRIX), torch.bfloat16, torch.float32])
def test_formats(dtype):
    """The gradient has the format of the probabilities, whatever that of the logits, and is worked out in float32."""
    x, q = random(3, 40, dtype=dtype), random(3, 40, seed=1)
    (exact,) = torch.autograd.grad(F.cross_entropy(x.double(), q), q)
    for of_target in (dtype, torch.float32, F64):
        leaf = q.detach().to(of_target).requires_grad_()
        (found,) = torch.autograd.grad(ours.cross_entropy(x, leaf), leaf)
        assert found.dtype == of_target
        tolerance = 1e-6 if of_target.itemsize > 2 else torch.finfo(of_target).eps
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=0)


def test_layouts():
    """Probabilities that are stretched, strided and transposed."""
    x = random(3, 4)
    row, wide = random(4, seed=1), random(4, 6, seed=2)
    for leaf, made in ((row, row.expand(3, 4)), (wide, wide[:, ::2].T)):
        found, exact = (torch.autograd.grad(f(x, made), (x, leaf)) for f in (ours.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_batch_of_gradients():
    given = random(3, 4), random(3, 4, seed=1)

    def jacobian(function):
        def of_rows(x, q):
            return function(x, q, reduction="none")

        return torch.autograd.functional.jacobian(of_rows, given, vectorize=True)

    torch.testing.assert_close(jacobian(ours.cross_entropy), jacobian(F.cross_entropy), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_forward_mode_and_functions_of_torch():
    x, q, tangent = random(3, 4).detach(), random(3, 4, seed=1).detach(), random(3, 4, seed=2).detach()
    for mine, theirs in itertools.pairwise((ours.cross_entropy, F.cross_entropy)):
        for way in (
            lambda f: torch.func.jvp(lambda q: f(x, q), (q,), (tangent,))[1],
            lambda f: torch.func.vmap(torch.func.grad(lambda x, q: f(x[None], q[None]), 1))(x, q),
            lambda f: torch.func.jacrev(torch.func.grad(f, 1))(x, q),
        ):
            torch.testing.assert_close(way(mine), way(theirs), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=MATRIX), "pair"])
def test_compiled_whole(kind):
    x, (leaf, target) = random(ROWS, COLS), target_of(kind)
    torch._dynamo.reset()

    def function(x, leaf):
        return ours.cross_entropy(x * 2, target(leaf * 2), W, z_loss=0.1, row_weight=ROW_WEIGHT)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(one(x, leaf), (x, leaf)) for one in (compiled, function))
    torch.testing.assert_close(found, wanted)


def test_a_label_that_is_no_class():
    """The row is NaN where labels are not looked at, as on a GPU."""
    x, shares = random(2, 4), random(2, 2, seed=1)
    labels = torch.tensor([[1, 4], [0, 2]])
    with pytest.raises(IndexError, match=r"target\[1\] .* is 4"):
        ours.cross_entropy(x, (labels, shares))
    loss = gpusoftmax.cross_entropy(x, (labels, shares), validate=False, reduction="sum")
    (once,) = torch.autograd.grad(loss, shares, retain_graph=True)
    (again,) = torch.autograd.grad(loss, shares, create_graph=True)
    torch.testing.assert_close(once, again, equal_nan=True)
    assert once[0].isnan().all() and once[1].isfinite().all()


def test_what_the_core_refuses():
    """With an array for the gradient nothing is recorded."""
    x, q = random(2, 4).detach(), random(2, 4, seed=1)
    with pytest.raises(TypeError, match="^target is a tensor that requires grad"):
        gpusoftmax.cross_entropy_with_grad(x, q)


@pytest.mark.filterwarnings("ignore:.*linear_cross_entropy holds all logits")
def test_the_layer_of_the_core():
    x, weight, q = random(2, 4).detach(), random(3, 4).detach(), random(2, 3, seed=1)
    loss, expected = gpusoftmax.linear_cross_entropy(x, weight, q), F.cross_entropy(F.linear(x, weight), q)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, q), torch.autograd.grad(expected, q))
