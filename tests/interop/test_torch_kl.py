"""kl_div of torch tensors: its gradients, of any order, and what torch's own chain gives."""

import pytest
import torch
import torch.nn.functional as F

import gpusoftmax
from gpusoftmax.torch import kl_div

F64 = torch.float64


def logits(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=F64, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def chain(x, y, temperature=1.0):
    """One number per row."""
    log_q, log_p = (torch.log_softmax(one / temperature, -1) for one in (x, y))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


WEIGHTS = torch.tensor([0.5, 0.0, 2.0], dtype=F64)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"reduction": "none", "row_weight": WEIGHTS},
        {"row_weight": WEIGHTS},
        {"normalizer": torch.tensor(7.0, dtype=F64), "row_weight": WEIGHTS, "temperature": 2.0},
        {"reduction": "sum", "dim": 0, "row_weight": torch.arange(5.0, dtype=F64)},
    ],
    ids=lambda options: "-".join(options),
)
def test_gradients_of_any_order(options):
    x, y = logits(3, 5)
    for function, arguments in (
        (lambda x, y: kl_div(x, y, **options), (x, y)),
        (lambda x: kl_div(x, y.detach(), **options), (x,)),
        (lambda y: kl_div(x.detach(), y, **options), (y,)),
    ):
        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_tangents_are_differentiable():
    given = [one.detach() for one in logits(3, 5)]
    along = [one.detach() for one in logits(3, 5, seed=1)]

    def derivatives(function):
        def slope(x, y):
            return torch.func.jvp(function, (x, y), tuple(along))[1]

        return torch.func.jvp(slope, tuple(given), tuple(along)), torch.func.grad(slope, (0, 1))(*given)

    got = derivatives(lambda x, y: kl_div(x, y, temperature=0.7, reduction="sum"))
    expected = derivatives(lambda x, y: chain(x, y, 0.7).sum())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_chain_of_torch(dtype):
    x, y = logits(6, 300, dtype=dtype)
    upstream = torch.rand(6)
    ours = kl_div(x, y, temperature=2.0, reduction="none")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, chain(x.float(), y.float(), 2.0), rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(ours, (x, y), upstream)
    want = torch.autograd.grad(chain(x.float(), y.float(), 2.0), (x, y), upstream)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=1e-4 if dtype == torch.float32 else 2**-7, atol=1e-7)


def test_the_core_goes_on_where_gradients_are_recorded():
    x, y = logits(4, 30, dtype=torch.float32)
    loss = gpusoftmax.kl_div(x, y.detach())
    plain = gpusoftmax.kl_div(x.detach(), y.detach())
    assert loss.requires_grad and loss.detach().numpy().tobytes() == plain.numpy().tobytes()
    (dlogits,) = torch.autograd.grad(loss, x)
    expected = gpusoftmax.kl_div_with_grad(x.detach(), y.detach()).dlogits
    torch.testing.assert_close(dlogits, expected, rtol=1e-6, atol=1e-8)


def test_a_row_that_is_left_out_may_hold_anything():
    x, y = logits(3, 5)
    broken = x.detach().clone()
    broken[1] = torch.nan
    broken.requires_grad_()
    for create_graph in (False, True):
        loss = kl_div(broken, y, row_weight=WEIGHTS)
        dlogits, dtarget = torch.autograd.grad(loss, (broken, y), create_graph=create_graph)
        assert loss.isfinite() and not dlogits[1].any() and not dtarget[1].any() and dlogits.isfinite().all()


def test_second_derivatives_of_a_row_of_weight_0_that_holds_nan():
    x, y = (one.detach() for one in logits(3, 5))
    broken = x.clone()
    broken[1] = torch.nan
    for function in (
        lambda one: kl_div(one, y, row_weight=WEIGHTS).sin(),
        lambda one: kl_div(y, one, row_weight=WEIGHTS).sin(),
    ):
        expected = torch.autograd.functional.hessian(function, x)
        torch.testing.assert_close(torch.autograd.functional.hessian(function, broken), expected)
        torch.testing.assert_close(torch.func.hessian(function)(broken), expected)


def test_compiled_and_checked():
    x, y = logits(3, 5, dtype=torch.float32)
    options = 1, 1.0, "mean", None
    torch.library.opcheck(
        torch.ops.gpusoftmax.kl_div_of_rows.default, (x.detach(), y.detach(), WEIGHTS.float(), None, *options)
    )
    torch.library.opcheck(
        torch.ops.gpusoftmax.kl_div_backward.default, (x.detach(), y.detach(), WEIGHTS.float(), 1, 1.0, True)
    )
    compiled = torch.compile(lambda x, y: kl_div(x, y, temperature=2.0), fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(one(x, y), (x, y)) for one in (compiled, lambda x, y: kl_div(x, y, temperature=2)))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_refused():
    x, y = logits(3, 5)
    with pytest.raises(TypeError, match=r"row_weight requires grad, and gets no gradient: pass row_weight.detach\(\)"):
        kl_div(x, y, row_weight=WEIGHTS.clone().requires_grad_())
    temperature = torch.tensor(2.0, requires_grad=True)
    for one, other in ((x, y), (x.detach(), y.detach())):
        for function in (kl_div, gpusoftmax.kl_div):
            with pytest.raises(
                TypeError, match="^temperature requires grad, and gets no gradient: pass temperature.det"
            ):
                function(one, other, temperature=temperature)
            same = function(one, other, temperature=temperature.detach()), function(one, other, temperature=2.0)
            assert torch.equal(*same)
    with pytest.raises(TypeError, match="^temperature is a tensor that requires grad"):
        gpusoftmax.kl_div_with_grad(x.detach(), y.detach(), temperature=temperature)
    with pytest.raises(TypeError, match="row_weight is a list, expected a torch tensor as the other arguments are"):
        kl_div(x, y, row_weight=[1.0, 1.0, 1.0])
    with pytest.raises(TypeError, match="target_logits has dtype float32, expected float64 to match logits"):
        kl_div(x, y.float())
