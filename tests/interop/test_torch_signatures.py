"""What the functions and modules of gpusoftmax.torch can be given: torch's arguments, in torch's order."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch.nn import LinearCrossEntropyOptions, functional

from gpusoftmax import _torch_layer, _torch_warnings
from gpusoftmax import torch as ours

N_ROWS, N_FEATURES, N_CLASSES = 7, 5, 11


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS = {
    "softmax": functional.softmax,
    "log_softmax": functional.log_softmax,
    "cross_entropy": functional.cross_entropy,
    "linear_cross_entropy": functional.linear_cross_entropy,
    "CrossEntropyLoss": torch.nn.CrossEntropyLoss,
    "LinearCrossEntropyLoss": torch.nn.LinearCrossEntropyLoss,
}


@pytest.mark.parametrize("name", PAIRS)
def test_arguments_have_the_names_places_and_defaults_of_torch(name):
    mine = inspect.signature(getattr(ours, name)).parameters
    theirs = inspect.signature(PAIRS[name]).parameters
    for one in theirs.values():
        assert mine[one.name].kind == one.kind, one
        if one.name != "dim":  # torch guesses it where it is not given, and warns that it should be
            assert mine[one.name].default == one.default, one
    placed = [[one.name for one in given.values() if one.kind == one.POSITIONAL_OR_KEYWORD] for given in (mine, theirs)]
    assert placed[0] == placed[1]


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_dtype_by_place_and_by_name(name):
    """Of torch.softmax it is the third argument, of torch.nn.functional.softmax the fourth."""
    function, x = getattr(ours, name), random(3, 4).float()
    expected = getattr(functional, name)(x, 1, 3, torch.float64)
    for made in (
        function(x, 1, torch.float64),
        function(x, 1, 3, torch.float64),
        function(x, 1, dtype=torch.float64),
        function(x, 1, _stacklevel=5, dtype=float),
    ):
        torch.testing.assert_close(made, expected)
    assert function(x, 1, 3).dtype == function(x, dim=1, _stacklevel=5).dtype == torch.float32


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dtype", ["float64", torch.int64, torch.complex64, None])
def test_a_dtype_that_is_none(recorded, dtype):
    """Of torch's own; a string had been taken where a kernel is called at once, and nowhere else."""
    x = random(3, 4).requires_grad_(recorded)
    for function in (ours.softmax, ours.log_softmax):
        if dtype is None:
            assert function(x, 1, dtype).dtype == x.dtype
            continue
        with pytest.raises(TypeError, match=r"^dtype is .*torch\.float64$"):
            function(x, 1, dtype=dtype)


@pytest.mark.parametrize(
    ("size_average", "reduce"), [(None, True), (None, False), (True, None), (False, None), (False, True)]
)
def test_what_torch_had_before_reduction(size_average, reduce):
    given = random(N_ROWS, N_CLASSES), torch.arange(N_ROWS), None, size_average, -100, reduce, "none", 0.1
    with pytest.warns(UserWarning, match="will be deprecated"):
        expected = functional.cross_entropy(*given)
    with pytest.warns(UserWarning, match="will be deprecated"):
        torch.testing.assert_close(ours.cross_entropy(*given), expected)


# ---------------------------------------------------------------- options of the layers


def chunk_sizes(monkeypatch, options, n_rows=100, dtype=torch.float64):
    """What the layer is told by the function and by the module."""
    found = []
    told = _torch_layer.linear_cross_entropy
    monkeypatch.setattr(
        _torch_layer,
        "linear_cross_entropy",
        lambda layer, given, options: found.append(options.chunk_size) or told(layer, given, options),
    )
    x, target = random(n_rows, N_FEATURES).to(dtype), torch.arange(n_rows) % N_CLASSES
    module = ours.LinearCrossEntropyLoss(N_FEATURES, N_CLASSES, dtype=dtype, options=options)
    loss = ours.linear_cross_entropy(x, module.linear.weight, target, options=options)
    torch.testing.assert_close(loss, module(x, target), rtol=0, atol=0)
    expected = functional.linear_cross_entropy(x.double(), module.linear.weight.double(), target)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(set(found)) == 1
    return found[0]


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, None),
        ({"batch_chunk_size": 3}, 3),
        ({"batch_chunk_size": 3, "chunking_method": None}, 3),
        ({"chunking_method": None}, 100),
        ({"chunking_method": "aspect_ratio"}, 64),
        ({"chunking_method": "aspect_ratio:4"}, 16),
        ({"chunking_method": "aspect_ratio:1000"}, 1),
        ({"chunking_method": "aspect_ratio", "batch_chunk_size": 64, "allow_retain_graph": True}, 64),
    ],
    ids=str,
)
def test_chunks_are_those_of_torch(monkeypatch, given, size):
    options = LinearCrossEntropyOptions(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chunk_sizes(monkeypatch, options) == size
    if size is not None:
        assert options._adjust(100, N_FEATURES, N_CLASSES, torch.float64).batch_chunk_size == size


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (torch.float32, {"acc_policy": "compact"}),
        (torch.bfloat16, {"acc_policy": "accurate"}),
        (torch.bfloat16, {"acc_dtype": torch.bfloat16}),
    ],
    ids=str,
)
def test_sums_that_are_ours_whatever_is_asked_for(monkeypatch, dtype, given):
    _torch_warnings._warn.cache_clear()
    with pytest.warns(UserWarning, match="sums in float32.*acc_policy"):
        chunk_sizes(monkeypatch, LinearCrossEntropyOptions(**given), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunk_sizes(monkeypatch, LinearCrossEntropyOptions(**given), dtype=dtype)
        chunk_sizes(monkeypatch, LinearCrossEntropyOptions(acc_dtype=torch.float32), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "more", "error", "message"),
    [
        (LinearCrossEntropyOptions(batch_chunk_size=3), {"chunk_size": 3}, ValueError, "chunk_size and options"),
        (LinearCrossEntropyOptions(acc_dtype=torch.float32), {}, ValueError, r"acc_dtype .*expected torch\.float64"),
        (
            LinearCrossEntropyOptions(batch_chunk_size=3, chunking_method="aspect_ratio"),
            {},
            ValueError,
            "batch_chunk_size is 3, .*makes it 4, expected one",
        ),
        ({"batch_chunk_size": 3}, {}, TypeError, r"options is a dict, expected torch\.nn\.LinearCrossEntropyOptions"),
    ],
    ids=["two", "dtype", "sizes", "dict"],
)
def test_options_that_cannot_be_followed(options, more, error, message):
    x, w, target = random(N_ROWS, N_FEATURES), random(N_CLASSES, N_FEATURES), torch.arange(N_ROWS)
    with pytest.raises(error, match=message):
        ours.linear_cross_entropy(x, w, target, options=options, **more)


@pytest.mark.parametrize("given", [{"batch_chunk_size": 3}, {"chunking_method": "aspect_ratio:2"}], ids=str)
def test_options_compiled_whole(given):
    w, options = random(N_CLASSES, N_FEATURES).requires_grad_(), LinearCrossEntropyOptions(**given)
    compiled = torch.compile(ours.linear_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_rows in (N_ROWS, 9):
        x, target = random(n_rows, N_FEATURES).requires_grad_(), torch.arange(n_rows)
        found, expected = (one(x, w, target, options=options) for one in (compiled, functional.linear_cross_entropy))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(one, (x, w)) for one in (found, expected)))


def test_a_module_tells_and_carries_its_options():
    options = LinearCrossEntropyOptions(batch_chunk_size=3)
    given = {"bias": True, "out_features": (2,), "weight": torch.ones(4), "ignore_index": 1, "options": options}
    module, theirs = (one(3, 4, **given) for one in (ours.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss))
    assert set(theirs.extra_repr().split(", ")) <= set(module.extra_repr().split(", "))
    x, target = torch.ones(2, 3), torch.tensor([[0, 2], [3, 1]])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.options == options
        torch.testing.assert_close(other(x, target), module(x, target), rtol=0, atol=0)
    assert module.half().linear.weight.dtype == module.weight.dtype == torch.float16
