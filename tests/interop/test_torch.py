"""torch tensors: tensors in, tensors out, of any strides; the results of torch where torch is exact enough to say."""

import contextlib
import itertools
import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import gpusoftmax
from gpusoftmax import _replay_cpu, _replay_torch
from tests import inputs, tolerances
from tests.calls import CALLS, EVERYTHING, IN_PLACE, arguments, with_everything

TENSORS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
F32 = np.dtype(np.float32)
X = inputs.make("spread", (3, 40), F32)
ROW_OPS = [gpusoftmax.softmax, gpusoftmax.log_softmax, gpusoftmax.logsumexp]


def tensor(array):
    """A tensor with the values of a NumPy array, in memory of its own; bfloat16 by its bits."""
    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def values(t):
    t = t.detach().contiguous()
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def same_bits(one, two):
    if isinstance(one, tuple):
        return all(same_bits(*pair) for pair in zip(one, two, strict=True))
    if one is None:
        return two is None
    return one.dtype == two.dtype and one.shape == two.shape and values(one).tobytes() == values(two).tobytes()


def tensors(name, dtype=F32, shape=(6, 40)):
    return {argument: tensor(array) for argument, array in arguments(name, shape, dtype).items()}


def run(program, **environment):
    """A program that may crash, in a process of its own."""
    program = "import torch, gpusoftmax\n" + textwrap.dedent(program) + "\nprint('done')"
    environment = {**os.environ, **environment}
    completed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert completed.stdout == "done\n", (completed.returncode, completed.stderr)


# ---------------------------------------------------------------- kinds and layouts


@pytest.mark.parametrize("dtype", TENSORS)
@pytest.mark.parametrize("name", CALLS)
def test_tensors_in_tensors_out(name, dtype):
    arrays = arguments(name, (6, 40), dtype)
    placed = [tensor(array) for array in arrays.values()]
    before = [values(t).tobytes() for t in placed]
    result, expected = CALLS[name].function(*placed), CALLS[name].function(*arrays.values())
    results = result if isinstance(result, tuple) else (result,)
    for got, want in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert type(got) is torch.Tensor and got.device.type == "cpu" and not got.requires_grad
        assert values(got).tobytes() == np.asarray(want).tobytes() and tuple(got.shape) == np.shape(want)
        if CALLS[name].per_row:
            per_row = torch.float64 if dtype == "float64" else torch.float32
            assert got.dtype == (torch.int64 if np.asarray(want).dtype == np.int64 else per_row)
    assert results[-1].dtype == (TENSORS[dtype] if not CALLS[name].per_row else results[-1].dtype)
    assert [values(t).tobytes() for t in placed] == before


def layouts(t):
    """(name, tensor): the same values in other strides. torch knows no negative ones."""
    rows, cols = t.shape
    wide = torch.full((rows + 2, cols + 5), 7, dtype=t.dtype)
    wide[1:-1, 2:-3] = t
    twice = torch.full((2 * rows, 2 * cols), 7, dtype=t.dtype)
    twice[1::2, ::2] = t
    yield "transposed", t.t().contiguous().t()
    yield "slice", wide[1:-1, 2:-3]
    yield "step", twice[1::2, ::2]
    yield "as_strided", t.flatten().as_strided((rows, cols), (cols, 1))
    yield "odd offset", torch.cat([t.new_zeros(1), t.flatten()])[1:].view(rows, cols)
    yield "view of bytes", t.clone().view(torch.uint8).view(t.dtype)
    yield "permuted", t.reshape(2, rows // 2, cols).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield "channels last", t.reshape(rows, cols, 1, 1).contiguous(memory_format=torch.channels_last)
    yield "size-1 axes", t.clone().as_strided((1, rows, 1, cols), (999, cols, 7, 1))


@pytest.mark.parametrize("dtype", TENSORS)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_strides(name, dtype):
    t = tensors(name, dtype)["x"]
    for layout, view in layouts(t):
        axis = 1 if layout == "channels last" else -1
        before = view.clone()
        result = CALLS[name].function(view, axis)
        assert same_bits(result, CALLS[name].function(view.contiguous().clone(), axis)), layout
        assert same_bits(view, before)
    for row in (t[:1].expand(6, 40), t[:, :1].expand(6, 40), t[0, 0].expand(6, 40), t[:1].expand(2, 3, 40)):
        assert same_bits(CALLS[name].function(row), CALLS[name].function(row.contiguous()))


@pytest.mark.parametrize("name", ["softmax_backward", "log_softmax_backward"])
def test_gradients_as_autograd_hands_them_on(name):
    probs, gradient = tensors(name).values()
    for upstream in (
        torch.tensor(0.3).expand(6, 40),
        gradient[:1].expand(6, 40),
        gradient[:, :1].expand(6, 40),
        gradient.t().contiguous().t(),
    ):
        assert same_bits(CALLS[name].function(probs, upstream), CALLS[name].function(probs, upstream.contiguous()))


def test_lazily_negated_tensors():
    """z.conj().imag is the imaginary part with a note to negate it, which only torch can read."""
    z = torch.complex(tensor(X), -2 * tensor(X))
    negated = z.conj().imag
    assert negated.is_neg()
    assert same_bits(gpusoftmax.softmax(negated), gpusoftmax.softmax(2 * tensor(X)))
    assert same_bits(negated, -2 * -tensor(X))


def test_lazily_negated_outputs():
    """Refused or written, never written somewhere else."""
    program = """
        x = torch.arange(120.0).view(3, 40)
        out = torch.zeros(3, 40, dtype=torch.complex64).conj().imag
        assert out.is_neg()
        try:
            gpusoftmax.softmax(x, out=out)
        except (TypeError, ValueError) as error:
            assert str(error).startswith("out "), error
        else:
            assert torch.equal(out.resolve_neg(), gpusoftmax.softmax(x))
    """
    run(program)


def test_one_number():
    for t in (torch.tensor(2.0), torch.tensor(2.0, dtype=torch.bfloat16)):
        for function, expected in zip(ROW_OPS, (1, 0, 2), strict=True):
            result = function(t)
            assert type(result) is torch.Tensor and result.shape == () and result == expected
    assert gpusoftmax.cross_entropy(tensor(X), torch.tensor([1, 2, 3])).shape == ()
    assert gpusoftmax.cross_entropy(tensor(X[0]), torch.tensor(3), reduction="none").shape == ()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)])
def test_empty(shape):
    t = torch.empty(shape)
    assert gpusoftmax.softmax(t).shape == shape and gpusoftmax.log_softmax(t, out=torch.empty(shape)).shape == shape
    assert torch.equal(gpusoftmax.logsumexp(t), torch.logsumexp(t, -1))


def test_tensors_that_share_memory_with_numpy():
    array = X.copy()
    t = torch.from_numpy(array)
    assert gpusoftmax.softmax(t, out=t) is t
    assert array.tobytes() == gpusoftmax.softmax(X).tobytes()


# ---------------------------------------------------------------- out and dtype


@pytest.mark.parametrize("dtype", [torch.float64, "float64", np.float64, torch.bfloat16, torch.half])
def test_dtype(dtype):
    expected = {"float64": torch.float64}.get(np.dtype(dtype).name if not isinstance(dtype, torch.dtype) else "", dtype)
    for function in ROW_OPS:
        result = function(tensor(X), dtype=dtype)
        assert result.dtype == expected
        out = torch.empty_like(result)
        assert function(tensor(X), out=out) is out
        assert same_bits(out, result)
        with pytest.raises(TypeError, match="^dtype is float32 but out has dtype"):
            function(tensor(X), dtype=torch.float32, out=out)
    for wrong in (torch.int64, torch.float8_e4m3fn, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=r"^dtype is torch\..*, expected one of"):
            gpusoftmax.softmax(tensor(X), dtype=wrong)


def test_out_of_any_strides():
    t = tensors("softmax")["x"]
    expected = gpusoftmax.softmax(t)
    for layout, out in layouts(torch.full_like(t, 7)):
        axis = 1 if layout == "channels last" else -1
        storage = out.untyped_storage()
        before, view = bytes(storage), out.clone()
        assert gpusoftmax.softmax(t.reshape(out.shape), axis, out=out) is out
        assert same_bits(out.reshape(6, 40), expected), layout
        out.copy_(view)
        assert bytes(storage) == before, layout


@pytest.mark.parametrize(("name", "argument"), IN_PLACE)
def test_in_place(name, argument):
    placed = tensors(name)
    expected = CALLS[name].function(*placed.values())
    result = CALLS[name].function(*placed.values(), out=placed[argument])
    assert (result[1] if isinstance(result, tuple) else result) is placed[argument]
    assert same_bits(result, expected)


def test_bad_outputs():
    t = tensor(X)
    storage = torch.zeros(300)
    for out, kind, message in (
        (torch.zeros(1, 40).expand(3, 40), ValueError, "^out .* its elements overlap"),
        (torch.zeros(3, 41), ValueError, r"^out has shape \(3, 41\), expected \(3, 40\)"),
        (torch.zeros(3, 40, dtype=torch.int32), TypeError, "^out has dtype int32"),
        (torch.zeros(3, 40, device="meta"), TypeError, "^out is on device meta"),
        (torch.zeros(3, 40, requires_grad=True), TypeError, "^out is a tensor that requires grad"),
        (torch.zeros(3, 40).to_sparse(), TypeError, "^out has layout torch.sparse_coo"),
        (np.zeros((3, 40), F32), TypeError, "a torch array on the CPU and out is a NumPy array on the CPU"),
        (storage[40:160].view(3, 40), ValueError, "^out overlaps x in part"),
    ):
        x = storage[:120].view(3, 40) if kind is ValueError and "overlaps x" in message else t
        with pytest.raises(kind, match=message):
            gpusoftmax.softmax(x, out=out)
    assert not storage.any()


# ---------------------------------------------------------------- calls that were made before


@pytest.fixture
def started(monkeypatch):
    """A list that grows by each call that is replayed."""
    found, play = [], _replay_cpu.play
    monkeypatch.setattr(_replay_cpu, "play", lambda *arguments: found.append(1) or play(*arguments))
    gpusoftmax.softmax(torch.zeros(2))  # torch's class has been met
    _replay_torch._recipes.clear()
    found.clear()
    return found


@pytest.mark.parametrize("dtype", TENSORS)
@pytest.mark.parametrize("name", ["softmax", "softmax_backward", "log_softmax", "logsumexp", "soft_argmax", "argmax"])
def test_replayed_calls(name, dtype, started):
    """A kernel is started at once at the addresses of other tensors; the results are those of the first call."""
    placed = {argument: t.clone() for argument, t in tensors(name, dtype).items()}  # at cache lines
    started.clear()  # NumPy's calls
    expected = CALLS[name].function(*placed.values())
    assert not started
    for _ in range(3):
        elsewhere = [t.clone() for t in placed.values()]
        result = CALLS[name].function(*elsewhere)
        assert same_bits(result, expected) and type(result) is torch.Tensor and not result.requires_grad
    assert len(started) == 3
    CALLS[name].function(*(t[:, :-1] for t in placed.values()))  # another layout
    assert len(started) == 3


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_with_grad of shares", "sample", "token_logprobs"])
def test_each_tensor_is_that_of_the_call(name, monkeypatch):
    function, _, options = EVERYTHING[name]
    calls = [
        {key: tuple(map(tensor, one)) if isinstance(one, tuple) else tensor(one) for key, one in arrays.items()}
        for arrays in (with_everything(name, seed) for seed in range(3))
    ]
    expected = []
    for placed in calls:
        _replay_torch._recipes.clear()
        expected.append(function(**placed, **options))
    monkeypatch.setattr(_replay_cpu, "record", lambda *_: pytest.fail("not replayed"))
    for placed, result in zip(calls, expected, strict=True):
        assert same_bits(function(**placed, **options), result)
    assert not same_bits(expected[0], expected[1])


def test_replayed_calls_with_out(started):
    x, out = tensor(X).clone(), torch.empty(3, 40)
    expected = gpusoftmax.softmax(x, out=out).clone()
    version = out.zero_()._version
    assert gpusoftmax.softmax(x, out=out) is out
    assert started and same_bits(out, expected) and out._version == version + 1
    for _ in range(2):
        in_place = x.clone()
        assert gpusoftmax.softmax(in_place, out=in_place) is in_place
        assert same_bits(in_place, expected)
    storage = torch.zeros(300)
    for start in (120, 140, 100):  # apart, and in parts the same memory
        with pytest.raises(ValueError, match="overlaps") if start < 120 else contextlib.nullcontext():
            gpusoftmax.softmax(storage[:120].view(3, 40), out=storage[start : start + 120].view(3, 40))


def test_what_is_looked_at_again(started):
    """Tensors of the layout of an earlier call, with something about them that only torch knows."""
    x = tensor(X).clone()
    expected = gpusoftmax.softmax(x)
    assert gpusoftmax.softmax(x.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert not gpusoftmax.softmax(x.clone().requires_grad_()).requires_grad
    assert len(started) == 1
    negated = torch.complex(x, -x).conj().imag.expand(3, 40)
    plain = torch.complex(x, x).imag
    gpusoftmax.softmax(plain)
    assert negated.is_neg() and same_bits(gpusoftmax.softmax(negated), gpusoftmax.softmax(plain))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(TypeError, match="tangent"):
        gpusoftmax.softmax(torch.autograd.forward_ad.make_dual(x, torch.ones(3, 40)))
    with pytest.raises(TypeError, match="^x has no memory"):
        torch.func.vmap(gpusoftmax.softmax)(torch.stack([x, x]))
    with pytest.raises(TypeError, match="^x has no memory"):
        torch.func.grad(lambda y: (y * gpusoftmax.softmax(x)).sum())(x)
    for t in (x, tensor(X)[:, 1:]):  # of a layout that was seen before, and not
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match="^torch makes fake or"):
            gpusoftmax.softmax(t)
    with pytest.raises(TypeError, match="^dtype is float32 but out"):
        gpusoftmax.softmax(x, dtype="float32", out=x.double())
    with torch.inference_mode():
        assert same_bits(gpusoftmax.softmax(x.clone()), expected)


def test_replayed_calls_with_other_thread_counts():
    x = torch.randn(512, 2048, generator=torch.manual_seed(0))
    expected = gpusoftmax.softmax(x)
    for _ in range(3):
        assert same_bits(gpusoftmax.softmax(x), expected)


# ---------------------------------------------------------------- what is refused


RECORDED = {
    "softmax",
    "softmax_backward",
    "softmax_jvp",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "cross_entropy",
    "kl_div",
    "token_logprobs",
    "soft_argmax",
    "top_logprobs",
    "topk_softmax",
}
INDICES = {"argmax", "sample"}


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_require_grad(name):
    """A gradient is recorded, or the tensor is refused: it is never detached in silence, but for indices."""
    for argument in CALLS[name].rows:
        placed = tensors(name)
        placed[argument].requires_grad_()
        expected = CALLS[name].function(*(t.detach() for t in placed.values()))
        if name in RECORDED:
            result = CALLS[name].function(*placed.values())
            for one, two in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True):
                assert one.requires_grad == one.is_floating_point()
                assert same_bits(one.detach(), two)
        elif name in INDICES:
            result = CALLS[name].function(*placed.values())
            assert same_bits(result, expected) and not result.requires_grad
        else:
            with pytest.raises(TypeError) as raised:
                CALLS[name].function(*placed.values())
            message = str(raised.value)
            assert message.startswith(f"{argument} is a tensor that requires grad")
            assert "gpusoftmax.torch" in message and f"{argument}.detach()" in message
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                result = CALLS[name].function(*placed.values())
            assert same_bits(result, expected)
            assert not any(one.requires_grad for one in (result if isinstance(result, tuple) else (result,)))


def test_gradients_of_the_core():
    """With the axes, dtypes and options of the core, and labels beside any axis."""
    x = sample((4, 6, 3), torch.float64).requires_grad_()
    labels = torch.tensor([[0, 5, -7], [1, 2, 3]] * 2)
    for ours, theirs in (
        (
            gpusoftmax.softmax(x, (0, 2)),
            torch.softmax(x.movedim(1, 0).reshape(6, -1), 1).reshape(6, 4, 3).movedim(0, 1),
        ),
        (gpusoftmax.softmax(x, None, temperature=0.5), torch.softmax(2 * x.flatten(), 0).reshape(4, 6, 3)),
        (gpusoftmax.log_softmax(x, dtype="float32"), torch.log_softmax(x, -1).float()),
        (gpusoftmax.logsumexp(x, 1, keepdims=True), torch.logsumexp(x, 1, keepdim=True)),
        (gpusoftmax.logsumexp(x, dtype=torch.float32), torch.logsumexp(x, -1).float()),
        (gpusoftmax.cross_entropy(x, labels, axis=1, ignore_index=-7), F.cross_entropy(x, labels, ignore_index=-7)),
        (
            gpusoftmax.cross_entropy(x.movedim(1, -1), labels, ignore_index=-7, reduction="none", label_smoothing=0.1),
            F.cross_entropy(x, labels, ignore_index=-7, reduction="none", label_smoothing=0.1),
        ),
        (
            gpusoftmax.token_logprobs(x, labels, axis=1, ignore_index=-7, temperature=0.5).logprob,
            -F.cross_entropy(2 * x, labels, ignore_index=-7, reduction="none"),
        ),
    ):
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(one.pow(2).sum(), x, retain_graph=True)[0] for one in (ours, theirs)]
        torch.testing.assert_close(*gradients)
    drawn = gpusoftmax.sample(x, rng=3, return_logprob=True, return_entropy=True)
    log_probs = torch.log_softmax(x, -1)
    expected = log_probs.gather(-1, drawn[0][..., None])[..., 0], -(log_probs.exp() * log_probs).sum(-1)
    assert not drawn[0].requires_grad
    for ours, theirs in zip(drawn[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(one.sum(), x, retain_graph=True) for one in (ours, theirs)))
    narrow = sample((3, 4)).requires_grad_()
    assert gpusoftmax.logsumexp(narrow, dtype="float64").dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):  # the core does what it was asked for
        assert gpusoftmax.softmax(narrow.bfloat16()).dtype == torch.bfloat16


def test_gradients_that_are_refused():
    x, labels = tensor(X).requires_grad_(), torch.tensor([1, 2, 3])
    for call in (
        lambda: gpusoftmax.softmax(x, out=torch.empty(3, 40)),
        lambda: gpusoftmax.log_softmax(x, out=torch.empty(3, 40)),
        lambda: gpusoftmax.logsumexp(x, out=torch.empty(3)),
    ):
        with pytest.raises(TypeError, match=r"^out is given and x requires grad, .*x\.detach\(\)"):
            call()
    with pytest.raises(TypeError, match="^temperature is a tensor that requires grad"):
        gpusoftmax.argmax(tensor(X), temperature=torch.ones(3, requires_grad=True))
    assert not gpusoftmax.argmax(x, bias=torch.ones(40)).requires_grad
    with pytest.raises(TypeError, match="^weight is a tensor that requires grad"):
        gpusoftmax.cross_entropy(tensor(X), labels, torch.ones(40, requires_grad=True))
    with pytest.raises(TypeError, match="^weight requires grad"):
        gpusoftmax.cross_entropy(x, labels, torch.ones(40, requires_grad=True))
    with pytest.raises(TypeError, match="^target is a ndarray, expected a torch tensor"):
        gpusoftmax.cross_entropy(x, np.array([1, 2, 3]))
    with pytest.raises(TypeError, match="^dprobs is a ndarray, expected a torch tensor"):
        gpusoftmax.softmax_backward(x, X)
    with pytest.raises(IndexError, match=r"^target\[0\] .* is 40"):
        gpusoftmax.cross_entropy(x, torch.tensor([40, 2, 3]))
    loss = gpusoftmax.cross_entropy(x, torch.tensor([40, 2, 3]), reduction="none", validate=False)
    assert loss[0].isnan() and loss[1:].isfinite().all()
    with pytest.raises(ValueError, match="^temperature is 0"):
        gpusoftmax.softmax(x, temperature=0)


def test_layers_and_parameters():
    parameter = torch.nn.Parameter(tensor(X))
    gpusoftmax.softmax(parameter)[0, 0].backward()
    assert parameter.grad[0].any() and not parameter.grad[1:].any()
    layer = torch.nn.Linear(40, 5)
    gpusoftmax.cross_entropy(layer(tensor(X)), torch.tensor([1, 2, 3])).backward()  # not a leaf
    assert layer.weight.grad.any()
    with torch.inference_mode():
        made_there = tensor(X) * 1
    assert same_bits(gpusoftmax.softmax(made_there), gpusoftmax.softmax(tensor(X)))


def test_the_core_imports_no_torch():
    program = """
        import sys
        import numpy as np
        import gpusoftmax
        gpusoftmax.softmax(np.zeros((2, 3)))
        assert "torch" not in sys.modules and "gpusoftmax.torch" not in sys.modules
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout == "done\n"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_differentiation():
    """A dual tensor does not say that it requires grad; its tangent would be dropped."""
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensor(X), torch.ones(3, 40))
        for function in ROW_OPS:
            with pytest.raises(TypeError, match=r"^x .*tangent.*\.detach\(\)"):
                function(dual)
            assert same_bits(function(dual.detach()), function(tensor(X)))
    with pytest.raises(TypeError, match="^x "):
        torch.func.jvp(lambda x: gpusoftmax.softmax(x), (tensor(X),), (torch.ones(3, 40),))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of every int() of a size
def test_traced_tensors():
    with pytest.raises(TypeError, match="^x is traced by torch"):
        torch.jit.trace(lambda x: gpusoftmax.softmax(x), tensor(X))


def of_a_state(x):
    state, others = (gpusoftmax.LogSumExpState.empty(3, like=x) for _ in range(2))
    others.update(x)
    state.merge(gpusoftmax.LogSumExpState.from_table(others.table, others.columns))
    return state.logsumexp()


COMPILED = {  # of logits and labels
    "softmax": lambda x, t: gpusoftmax.softmax(x),
    "cross_entropy": gpusoftmax.cross_entropy,
    "cross_entropy_with_grad": gpusoftmax.cross_entropy_with_grad,
    "linear_cross_entropy": lambda x, t: gpusoftmax.linear_cross_entropy(x, torch.ones(40, 40), t),
    "LogSumExpState": lambda x, t: of_a_state(x),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_around(name):
    """torch.compile made code of its own of what it found in a call, which ended in a segmentation fault."""
    torch.compiler.reset()
    function, target = COMPILED[name], torch.tensor([0, 3, 39])
    compiled = torch.compile(lambda x: function(x * 2, target), backend="eager")
    for rows in X, X + 1:
        x = tensor(rows)
        got, expected = (one if isinstance(one, tuple) else (one,) for one in (compiled(x), function(x * 2, target)))
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    whole = torch.compile(lambda x: function(x, target), backend="eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="the functions of gpusoftmax.torch inside of torch.compile"
    ):
        whole(tensor(X))


def nested(layout):
    return torch.nested.nested_tensor([torch.ones(3), torch.ones(4)], layout=layout)


REFUSED = {
    "int64": (lambda: torch.ones(3, 4, dtype=torch.int64), "^x has dtype int64, expected one of"),
    "bool": (lambda: torch.ones(3, 4, dtype=torch.bool), "^x has dtype bool"),
    "complex": (lambda: torch.ones(3, 4, dtype=torch.complex64), "^x has dtype complex64"),
    "float8": (lambda: torch.ones(3, 4).to(torch.float8_e4m3fn), "^x has dtype float8_e4m3fn"),
    "sparse": (lambda: torch.ones(3, 4).to_sparse(), r"^x has layout torch.sparse_coo, .* \.to_dense\(\)"),
    "csr": (lambda: torch.ones(3, 4).to_sparse_csr(), r"^x has layout torch.sparse_csr, .* \.to_dense\(\)"),
    "nested": (lambda: nested(torch.strided), r"^x is a nested tensor, .* \.values\(\)"),
    "jagged": (lambda: nested(torch.jagged), r"^x is a nested tensor, .* \.to_padded_tensor\(-math.inf\)"),
    "meta": (lambda: torch.ones(3, 4, device="meta"), "^x is on device meta, expected cpu or cuda"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    for function in ROW_OPS:
        with pytest.raises(TypeError, match=message):
            function(make())


def test_mixed_with_numpy():
    t, labels = tensor(X), np.array([1, 2, 3])
    torch_, numpy = "a torch array on the CPU", "a NumPy array on the CPU"
    for call, one, two in (
        (lambda: gpusoftmax.softmax(X, out=t), numpy, f"out is {torch_}"),
        (lambda: gpusoftmax.softmax_backward(t, X), f"probs is {torch_}", f"dprobs is {numpy}"),
        (lambda: gpusoftmax.log_softmax_backward(X, t), f"log_probs is {numpy}", f"dlog_probs is {torch_}"),
        (lambda: gpusoftmax.cross_entropy(t, labels), f"logits is {torch_}", f"target is {numpy}"),
        (lambda: gpusoftmax.cross_entropy(t, [1, 2, 3]), f"logits is {torch_}", f"target is {numpy}"),
        (lambda: gpusoftmax.cross_entropy(X, torch.from_numpy(labels)), f"logits is {numpy}", f"target is {torch_}"),
        (lambda: gpusoftmax.cross_entropy(t, torch.from_numpy(labels), X[0]), torch_, f"weight is {numpy}"),
    ):
        with pytest.raises(TypeError, match="expected both from one library on one device") as raised:
            call()
        assert one in str(raised.value) and two in str(raised.value)


def test_labels_that_are_no_indices():
    for labels in (torch.zeros(3), torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match="^target has dtype .*, expected an integer dtype"):
            gpusoftmax.cross_entropy(tensor(X), labels)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64):
        labels = torch.tensor([39, 0, 7], dtype=dtype)
        assert same_bits(
            gpusoftmax.cross_entropy(tensor(X), labels), gpusoftmax.cross_entropy(tensor(X), torch.tensor([39, 0, 7]))
        )
    with pytest.raises(IndexError, match=r"^target\[1\] \(counted in C order\) is 40"):
        gpusoftmax.cross_entropy(tensor(X), torch.tensor([0, 40, -1]))


def test_tensors_without_memory():
    """Traced and fake tensors: an error that says so, not a read of address 0. In a process of its own."""
    program = """
        import warnings
        from torch._subclasses.fake_tensor import FakeTensorMode
        warnings.simplefilter("ignore")
        with FakeTensorMode():
            fake = torch.zeros(3, 4)
        def under_vmap():
            torch.func.vmap(gpusoftmax.softmax)(torch.zeros(3, 4))
        x = torch.zeros(3, 4)
        def functionalized():  # x has memory, the result would have none
            torch.func.functionalize(lambda y: y * gpusoftmax.softmax(x))(torch.zeros(3, 4))
        def functional():
            torch._enable_functionalization(reapply_views=True)
            try:
                gpusoftmax.softmax(x)
            finally:
                torch._disable_functionalization()
        def of_fake():
            gpusoftmax.softmax(fake)
        gpusoftmax.softmax(x), gpusoftmax.softmax(x)  # replayed
        for call, start in ((of_fake, "x "), (under_vmap, "x "), (functionalized, "torch "), (functional, "torch ")):
            try:
                call()
            except TypeError as error:
                assert str(error).startswith(start), error
            else:
                raise AssertionError("no error")
    """
    run(program)


def test_large_results_astride():
    """Elements of a tensor on bytes may start anywhere. Whoever waits for one at the start of a cache line, to write
    past the caches from there on, finds none. In a process of its own.
    """
    program = """
        shape = 65, 65536
        x = torch.randn(shape, generator=torch.manual_seed(0))
        expected = gpusoftmax.log_softmax(x)
        memory = bytearray(x.nbytes + 68)
        first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 64
        for offset in (first + 4, first + 1, first + 4):  # the layout is recorded, and another one, and replayed
            out = torch.frombuffer(memory, dtype=torch.float32, offset=offset, count=x.numel()).view(shape)
            for _ in range(2):
                assert torch.equal(gpusoftmax.log_softmax(x, out=out.zero_()), expected)
    """
    run(program)


# ---------------------------------------------------------------- torch's samples and torch's answers

S, M = 5, 10
SOFTMAX_SAMPLES = [((S,), 0), ((S, S), 0), ((S, S), 1), ((S, S), -1), ((S, M, S), 2), ((S, M, S), 1), ((S, M, S), -3)]
SOFTMAX_SAMPLES += [((S, 0, 0), -1), ((), 0), ((), -1), ((1,), 0), ((S, 1), 1), ((2, S, 1, M), 3), ((2, 3, 4, 5), 1)]
LOGSUMEXP_SAMPLES = [((), 0), ((S, S), 1), ((S, S), -2), ((S, S), (0, 1)), ((S, M, S), (0, 2)), ((2, 3, 4, 5), (-1, 1))]


def sample(shape, dtype=torch.float32, low=-9.0, high=9.0):
    return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=torch.manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", TENSORS)
def test_torch_agrees_on_softmax(dtype):
    for shape, axis in SOFTMAX_SAMPLES:
        x = sample(shape, TENSORS[dtype])
        for ours, theirs in ((gpusoftmax.softmax, torch.softmax), (gpusoftmax.log_softmax, torch.log_softmax)):
            exact = theirs(x.double(), axis)  # torch sums half types in half precision along some axes
            torch.testing.assert_close(ours(x, axis), exact.to(x.dtype))
            if dtype == "float32":
                torch.testing.assert_close(ours(x, axis, dtype=torch.float64), theirs(x, axis, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TENSORS)
def test_torch_agrees_on_logsumexp(dtype):
    for (shape, axis), keepdims in itertools.product(LOGSUMEXP_SAMPLES, (False, True)):
        x = sample(shape, TENSORS[dtype])
        expected = torch.logsumexp(x.to(torch.float64), axis, keepdim=keepdims)
        lse = gpusoftmax.logsumexp(x, axis, keepdims=keepdims)
        torch.testing.assert_close(lse, expected.to(lse.dtype))


SPECIAL = [
    [float("-inf")] * 4,
    [float("-inf"), 0.0, float("-inf"), 1.0],
    [float("inf"), 0.0, 1.0, 2.0],
    [float("nan"), 0.0, 1.0, 2.0],
    [float("inf"), float("-inf"), 0.0, 0.0],
    [float("inf"), float("nan"), 0.0, 0.0],
    [3e38, -3e38, 3e38, 0.0],
]


def test_torch_agrees_on_special_values():
    x = torch.tensor(SPECIAL)
    torch.testing.assert_close(gpusoftmax.softmax(x), torch.softmax(x, -1), equal_nan=True)
    torch.testing.assert_close(gpusoftmax.logsumexp(x), torch.logsumexp(x, -1), equal_nan=True)
    ours, theirs = gpusoftmax.log_softmax(x), torch.log_softmax(x, -1)
    usual = torch.isfinite(torch.logsumexp(x, -1))  # a row with +inf is NaN here, in torch partly -inf
    torch.testing.assert_close(ours[usual], theirs[usual])
    assert ours[~usual].isnan().all()


def test_torch_agrees_on_gradients():
    x = sample((4, 7)).requires_grad_()
    upstream = sample((4, 7), low=-1, high=1)
    for forward, backward in (
        (torch.softmax, gpusoftmax.softmax_backward),
        (torch.log_softmax, gpusoftmax.log_softmax_backward),
    ):
        for temperature in (1.0, 0.7):
            result = forward(x / temperature, -1)
            (expected,) = torch.autograd.grad(result, x, upstream)
            torch.testing.assert_close(
                backward(result.detach(), upstream, temperature=temperature), expected, rtol=1e-5, atol=1e-6
            )


CROSS_ENTROPY_SHAPES = [(2, 3), (3, 5, 2), (2, 3, 4, 5), (2, 4, 2, 1, 3)]  # torch's layout (N, C, d1, ...)
OPTIONS = list(itertools.product(("none", "mean", "sum"), (0.0, 0.1, 1.0), ("no weight", "weight"), (-100, 1)))


@pytest.mark.parametrize("shape", CROSS_ENTROPY_SHAPES, ids=str)
def test_torch_agrees_on_cross_entropy(shape):
    """Loss and gradient, over every combination of the options that both have."""
    n_classes, generator = shape[1], torch.manual_seed(1)
    for number, (reduction, smoothing, weighted, ignored) in enumerate(OPTIONS):
        logits = 3 * torch.randn(shape, generator=generator)
        if number % 2:  # the classes lie together
            logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
        labels = torch.randint(0, n_classes, (shape[0], *shape[2:]), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = ignored
        labels.view(-1)[0] = 0  # not every row is ignored
        weight = None if weighted == "no weight" else torch.rand(n_classes, generator=generator) + 0.5
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignored}
        exact = logits.double().requires_grad_()
        expected = F.cross_entropy(exact, labels, None if weight is None else weight.double(), **options)
        (gradient,) = torch.autograd.grad(expected.sum(), exact)
        loss, dlogits = gpusoftmax.cross_entropy_with_grad(logits, labels, weight, axis=1, **options)
        close = {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(loss, expected.detach().float(), **close)
        torch.testing.assert_close(dlogits, gradient.float(), **close)
        assert same_bits(loss, gpusoftmax.cross_entropy(logits, labels, weight, axis=1, **options))
        tolerances.check_loss(values(loss), values(logits), values(labels), _numpy(weight), axis=1, **options)
        tolerances.check_dlogits(values(dlogits), values(logits), values(labels), _numpy(weight), axis=1, **options)


def _numpy(weight):
    return None if weight is None else weight.numpy()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_torch_agrees_on_cross_entropy_of_other_dtypes(dtype):
    logits = sample((6, 40), TENSORS[dtype])
    labels = torch.tensor([0, 39, 3, -100, 7, 7])
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    loss = gpusoftmax.cross_entropy(logits, labels, reduction="none")
    assert loss.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    torch.testing.assert_close(loss, expected.to(loss.dtype))


def test_torch_agrees_on_edge_cases_of_cross_entropy():
    """One row without a batch, everything ignored, weights of 0, a label with probability 0."""
    row = sample((5,))
    torch.testing.assert_close(gpusoftmax.cross_entropy(row, torch.tensor(2)), F.cross_entropy(row, torch.tensor(2)))
    x, ignored = sample((3, 5)), torch.full((3,), -100)
    for reduction in ("none", "sum", "mean"):
        ours = gpusoftmax.cross_entropy(x, ignored, reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(x, ignored, reduction=reduction), equal_nan=True)
    weight, labels = torch.tensor([0.0, 1, 1, 1, 1]), torch.zeros(3, dtype=torch.long)
    ours, theirs = gpusoftmax.cross_entropy(x, labels, weight), F.cross_entropy(x, labels, weight)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours.isnan()
    x[0, 0] = float("-inf")
    torch.testing.assert_close(
        gpusoftmax.cross_entropy(x, labels, reduction="none"), F.cross_entropy(x, labels, reduction="none")
    )
    empty = torch.empty(0, 5), torch.empty(0, dtype=torch.long)
    for reduction in ("none", "sum", "mean"):
        ours = gpusoftmax.cross_entropy(*empty, reduction=reduction)
        torch.testing.assert_close(ours, F.cross_entropy(*empty, reduction=reduction), equal_nan=True)


def test_labels_with_three_strides():
    """They are copied; the copy lives as long as it is read. Freed memory is overwritten at once here."""
    program = """
        labels = torch.randint(0, 9, (12, 14, 10)).permute(2, 0, 1)[::2, ::2]
        logits = torch.randn((*labels.shape, 9))
        expected = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), labels)
        torch.testing.assert_close(gpusoftmax.cross_entropy(logits, labels), expected)
    """
    run(program, MALLOC_PERTURB_="165")
