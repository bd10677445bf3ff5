"""Calls that are replayed: the same results, errors and launches as the first call of their layout."""

import gc
import importlib
import weakref

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _arrays, _recipe, _replay, _replay_cpu, _transform
from tests import inputs, tolerances
from tests.calls import CALLS, EVERYTHING, IN_PLACE, arguments, same_bits, with_everything
from tests.conftest import Cpu
from tests.emulator import emulated_gpu
from tests.emulator.gpu import EmulatedArray

F32 = np.dtype(np.float32)
SHAPE = (3, 40)


class OnCpu(Cpu):
    module = _replay_cpu
    share = Cpu.array

    def array(self, host):
        return host.copy()


@pytest.fixture
def gpu():
    with emulated_gpu("sm_90", devices=2, track=False) as gpu:
        gpu.module, gpu.share = _replay, gpu.array
        yield gpu


@pytest.fixture(params=["cpu", "gpu"])
def target(request):
    return OnCpu() if request.param == "cpu" else request.getfixturevalue("gpu")


def placed(target, name, seed, dtype=F32):
    host = arguments(name, SHAPE, dtype, seed)
    return host, {argument: target.array(array) for argument, array in host.items()}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_on_the_cpu_is_replayed_with_its_own_arrays(monkeypatch, name):
    call, calls = CALLS[name], [placed(OnCpu(), name, seed) for seed in (1, 2)]
    _replay_cpu._recipes.clear()
    kept = call.function(**calls[0][1])
    with monkeypatch.context() as patched:
        patched.setattr(_replay_cpu, "record", lambda *_: pytest.fail("not replayed"))
        patched.setattr(_arrays, "logits", lambda *_: pytest.fail("not replayed"))
        result = call.function(**calls[1][1])
    kinds = [[type(part) for part in one] if isinstance(one, tuple) else type(one) for one in (kept, result)]
    assert kinds[0] == kinds[1]
    for (host, _), got in zip(calls, (kept, result), strict=True):
        _replay_cpu._recipes.clear()
        assert same_bits(got, call.function(**host))


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_is_replayed_with_its_own_arrays(gpu, monkeypatch, name):
    call = CALLS[name]
    first, on_gpu = placed(gpu, name, seed=1)
    kept = call.function(**on_gpu)
    before = [type(part) for part in kept] if isinstance(kept, tuple) else type(kept)
    n_launches, launched = len(gpu.stats), [stats.entry for stats in gpu.stats]
    monkeypatch.setattr(_replay, "record", lambda *_: pytest.fail("not replayed"))
    other, on_gpu = placed(gpu, name, seed=2)
    result = call.function(**on_gpu)
    assert ([type(part) for part in result] if isinstance(result, tuple) else type(result)) == before
    assert [stats.entry for stats in gpu.stats[n_launches:]] == launched
    monkeypatch.undo()
    with emulated_gpu("sm_90", track=False) as fresh:  # another device: nothing to replay
        for host, got in ((first, kept), (other, result)):
            expected = call.function(**{argument: fresh.array(array) for argument, array in host.items()})
            assert same_bits(gpu.get(got), fresh.get(expected))


def given(place, arrays):
    """Arguments by name, on their place; a pair of arrays as a pair."""
    return {
        argument: tuple(map(place, array)) if isinstance(array, tuple) else place(array)
        for argument, array in arrays.items()
    }


def check_replayed(target, monkeypatch, function, calls, options):
    """Calls of one layout have the results that they have by themselves, whatever was called before."""
    recipes = target.module._recipes
    placed = [given(target.share, arrays) for arrays in calls]  # held: each in memory of its own
    expected = []
    for arrays in placed:
        recipes.clear()
        expected.append(target.get(function(**arrays, **options)))
    assert not any(same_bits(*pair) for pair in zip(expected, expected[1:], strict=False))
    with monkeypatch.context() as patched:
        patched.setattr(target.module, "record", lambda *_: pytest.fail("not replayed"))
        for arrays, result in zip(placed, expected, strict=True):
            assert same_bits(target.get(function(**arrays, **options)), result)


TARGETS = ["cpu", pytest.param("gpu", marks=pytest.mark.matrix)]
# Each is a kernel to compile. What the logits of the others go through is replayed in test_transform.py.
_WITH_MORE = ("cross_entropy", "sample", "token_logprobs")
NAMES = [name if name.startswith(_WITH_MORE) else pytest.param(name, marks=pytest.mark.matrix) for name in EVERYTHING]


@pytest.mark.parametrize("target", TARGETS, indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_each_array_is_that_of_the_call(target, monkeypatch, name):
    call = EVERYTHING[name]
    calls = [with_everything(name, seed) for seed in range(3)]
    check_replayed(target, monkeypatch, call.function, calls, call.options)


@pytest.mark.matrix
@pytest.mark.parametrize("name, argument", [(name, one) for name, call in EVERYTHING.items() for one in call.arrays])
def test_one_array_is_another_one(monkeypatch, name, argument):
    """And all others have the same values: those of each array count."""
    call, one, other = EVERYTHING[name], with_everything(name, 1), with_everything(name, 2)
    check_replayed(OnCpu(), monkeypatch, call.function, [one, one | {argument: other[argument]}], call.options)


@pytest.mark.parametrize("name, argument", IN_PLACE)
def test_in_place_and_out_of_place_are_different_calls(target, name, argument):
    call = CALLS[name]
    for seed, in_place in enumerate((False, True, False, True)):
        host, there = placed(target, name, seed)
        out = there[argument] if in_place else target.array(np.zeros(SHAPE, F32))
        result = call.function(**there, out=out)
        assert (result[1] if isinstance(result, tuple) else result) is out
        expected = call.function(**{key: target.array(array.copy()) for key, array in host.items()})
        assert same_bits(target.get(result), target.get(expected))
        if not in_place:
            assert all(same_bits(target.get(there[key]), host[key]) for key in host), "an input has changed"


def test_out_is_written_and_returned_again(target):
    out = target.array(np.zeros(SHAPE, F32))
    for seed in range(3):
        x = inputs.make("spread", SHAPE, F32, seed)
        assert gpusoftmax.softmax(target.array(x), out=out) is out
        tolerances.check_softmax(target.get(out), x)


def test_options_are_part_of_the_call(target):
    x = inputs.make("spread", (4, 4), F32)
    for _ in range(2):
        for temperature in (1.0, 2.0):
            for axis in (0, 1):
                result = gpusoftmax.softmax(target.array(x), axis, temperature=temperature)
                tolerances.check_softmax(target.get(result), x, axis, temperature)
        assert gpusoftmax.softmax(target.array(x), dtype="float64").dtype == np.float64
        assert gpusoftmax.logsumexp(target.array(x), keepdims=True).shape == (4, 1)
        assert gpusoftmax.logsumexp(target.array(x)).shape == (4,)


def test_options_that_are_equal_and_not_the_same(target):
    """True == 1 == 1.0, in keys of dictionaries too."""
    x = target.array(inputs.make("spread", SHAPE, F32))
    gpusoftmax.softmax(x, 1, temperature=1.0)
    gpusoftmax.softmax(x, (0, 1))
    with pytest.raises(TypeError, match="temperature is True"):
        gpusoftmax.softmax(x, 1, temperature=True)
    with pytest.raises(TypeError, match="axis is 1.0"):
        gpusoftmax.softmax(x, 1.0, temperature=1.0)
    with pytest.raises(TypeError, match="axis"):
        gpusoftmax.softmax(x, (0, 1.0))


def test_options_that_can_change_are_read_each_time(target):
    x = inputs.make("spread", SHAPE, F32)

    class Temperature:
        value = 1.0

        def __float__(self):
            return self.value

    temperature = Temperature()
    for temperature.value in (1.0, 3.0):
        result = gpusoftmax.softmax(target.array(x), temperature=temperature)
        tolerances.check_softmax(target.get(result), x, temperature=temperature.value)


@pytest.mark.parametrize("change", ["shape", "strides", "dtype", "alignment", "read-only out"])
def test_layouts_are_part_of_the_call(gpu, change):
    x = inputs.make("spread", (4, 40), F32)
    gpusoftmax.softmax(gpu.array(x), out=gpu.array(np.zeros_like(x)))
    other = {
        "shape": np.ascontiguousarray(x[:3]),
        "strides": np.asfortranarray(x),
        "dtype": x.astype(np.float16),
        "alignment": np.concatenate([[0], x.ravel()]).astype(F32)[1:].reshape(x.shape),
    }.get(change, x)
    out = np.zeros_like(other)
    if change == "read-only out":
        out.flags.writeable = False
        with pytest.raises(ValueError, match="out is read-only"):
            gpusoftmax.softmax(gpu.array(other), out=gpu.array(out))
    else:
        tolerances.check_softmax(gpu.get(gpusoftmax.softmax(gpu.array(other), out=gpu.array(out))), other)


def test_partial_overlap_is_refused_after_the_same_layout_was_replayed(target):
    buffer = target.array(inputs.make("spread", (8, 40), F32))
    host = np.zeros((8, 40), F32)
    apart, base = target.array(host), host.copy()
    rows = [target.share(base[k : k + 4]) for k in (0, 4, 2)]  # views of one buffer
    for _ in range(2):
        gpusoftmax.softmax(rows[0], out=rows[1])
    with pytest.raises(ValueError, match="out overlaps x in part"):
        gpusoftmax.softmax(rows[0], out=rows[2])
    with pytest.raises(ValueError, match="out overlaps x in part"):
        gpusoftmax.softmax(rows[2], out=rows[1])
    assert gpusoftmax.softmax(buffer, out=apart) is apart


def test_interleaved_halves_take_the_ordinary_way(target):
    base = inputs.make("spread", (4, 80), F32)
    for _ in range(2):
        buffer = base.copy()
        x, out = target.share(buffer[:, ::2]), target.share(buffer[:, 1::2])
        assert gpusoftmax.softmax(x, out=out) is out
        tolerances.check_softmax(target.get(out), base[:, ::2])


def test_a_number_for_all_rows_is_no_address(target, monkeypatch):
    """n_valid for all rows stands where the kernels have an address if rows have their own."""

    def probs(seed, n_valid):
        x = inputs.make("spread", SHAPE, F32, seed)
        made = target.get(gpusoftmax.softmax(target.array(x), n_valid=n_valid, empty_row="zero"))
        tolerances.check_softmax(made[:, :n_valid], np.ascontiguousarray(x[:, :n_valid]))
        assert (made[:, n_valid:] == 0).all()

    probs(1, 33), probs(1, 7)
    monkeypatch.setattr(target.module, "record", lambda *_: pytest.fail("not replayed"))
    monkeypatch.setattr(_transform, "applied", lambda *_, **__: pytest.fail("not replayed"))
    probs(2, 33), probs(3, 7), probs(4, 33)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_elements_that_lie_astride(is_recorded):
    """NumPy has arrays whose elements start anywhere; dtype, shape and strides are those of others."""

    def astride(array):
        moved = np.ndarray(array.shape, array.dtype, np.zeros(array.nbytes + 1, np.uint8), 1)
        moved[...] = array
        return moved

    x, other = inputs.make("spread", (40, 3), F32), inputs.make("spread", (40, 3), F32, 1)
    if is_recorded:
        _replay_cpu._recipes.clear()
        gpusoftmax.softmax(x, 0, out=np.zeros_like(x))
    for _ in range(2):
        tolerances.check_softmax(gpusoftmax.softmax(astride(other), 0), other, 0)
        out = astride(x)
        tolerances.check_softmax(gpusoftmax.softmax(other, 0, out=out), other, 0)
        assert same_bits(out, gpusoftmax.softmax(astride(other), 0, out=astride(other)))


def test_numbers_that_are_equal_and_not_the_same(target):
    """0.0 == -0.0: the gradient is the same for both, whichever came first."""
    x, labels = inputs.make("spread", SHAPE, F32), np.array([1, 2, 3])
    gradients = []
    for numbers in ((0.0, -0.0), (-0.0, 0.0)):
        target.module._recipes.clear()
        for number in numbers:
            given = target.array(x), target.array(labels)
            gradients.append(target.get(gpusoftmax.cross_entropy_with_grad(*given, grad_scale=number)[1]))
    assert all(same_bits(gradient, gradients[0]) for gradient in gradients)


def test_nothing_is_kept_of_the_first_call(target):
    """As of any other: what nobody uses any more is free at once, not when a cycle is found."""
    module, call = target.module, gpusoftmax.cross_entropy_with_grad
    x, labels = target.array(inputs.make("spread", SHAPE, F32)), target.array(np.array([1, 2, 3]))
    module._recipes.clear()
    gc.collect()
    gc.disable()
    try:
        loss, gradient = call(x, labels, reduction="none")
        assert module._recipes
        kept = [weakref.ref(array) for array in (x, labels, loss, gradient)]
        del x, labels, loss, gradient
        assert all(array() is None for array in kept)
    finally:
        gc.enable()


def test_a_call_in_the_middle_of_another(target, monkeypatch):
    """By a signal's handler or a finaliser, which Python runs anywhere: neither is replayed without what it did."""
    output, host = _arrays.output, [inputs.make("spread", SHAPE, F32, seed) for seed in range(4)]

    def interrupted(*arguments):
        monkeypatch.setattr(_arrays, "output", output)
        gpusoftmax.logsumexp(target.array(host[0]), -2)
        return output(*arguments)

    target.module._recipes.clear()
    monkeypatch.setattr(_arrays, "output", interrupted)
    for x in host:
        out = target.array(np.zeros(SHAPE[::-1], F32).T)
        gpusoftmax.softmax(target.array(x), -2, out=out)
        tolerances.check_softmax(target.get(out), x, -2)
        tolerances.check_logsumexp(target.get(gpusoftmax.logsumexp(target.array(x), -2)), x, -2)
    assert _arrays.output is output


def test_labels_are_checked_each_time(target):
    x, good = inputs.make("spread", SHAPE, F32), np.array([1, 2, 3])
    for _ in range(2):
        gpusoftmax.cross_entropy(target.array(x), target.array(good), validate=True)
        out = target.array(x)
        with pytest.raises(IndexError, match=r"target\[1\]"):
            gpusoftmax.cross_entropy_with_grad(out, target.array(np.array([1, 40, 3])), validate=True, out=out)
        assert same_bits(target.get(out), x)


def test_all_kernels_of_a_call_are_started_together(monkeypatch):
    """The check of the labels, the sum of the weights, the loss, its mean."""
    started, parallel = [], importlib.import_module("gpusoftmax.kernels.cpu.parallel")
    logits, labels = inputs.make("spread", SHAPE, F32), np.arange(3)
    first = gpusoftmax.cross_entropy(logits, labels)
    play = parallel.play
    monkeypatch.setattr(parallel, "play", lambda *arguments: started.append(1) or play(*arguments))
    assert gpusoftmax.cross_entropy(logits, labels) == first
    assert len(started) == 1


def test_a_bad_label_stops_what_would_be_written_in_place():
    """Of the kernels that are started together, those behind the check must not run."""
    logits, labels = inputs.make("spread", SHAPE, F32), np.arange(3)
    for _ in range(2):
        kept = logits.copy()
        gpusoftmax.cross_entropy_with_grad(kept, labels, out=kept)
    assert not np.array_equal(kept, logits)
    kept = logits.copy()
    with pytest.raises(IndexError, match="is 40, expected a class"):
        gpusoftmax.cross_entropy_with_grad(kept, np.array([0, 40, 1]), out=kept)
    assert np.array_equal(kept, logits)


def test_kernels_on_several_threads_are_started_together(monkeypatch):
    """The check of the labels and the mean are one thread's, the losses all threads'."""
    parallel, shape, programs = importlib.import_module("gpusoftmax.kernels.cpu.parallel"), (300, 1000), []
    monkeypatch.setattr(parallel, "thread_count", lambda: 4)
    play = parallel.play
    monkeypatch.setattr(parallel, "play", lambda program, *more: programs.append(program) or play(program, *more))
    for seed in range(3):
        logits, labels = inputs.make("spread", shape, F32, seed), np.random.default_rng(seed).integers(0, 1000, 300)
        programs.clear()
        loss, gradient = gpusoftmax.cross_entropy_with_grad(logits, labels)
        tolerances.check_loss(loss, logits, labels)
        assert not seed or len(programs) == 1 and programs[0].n_threads == 4
        _replay_cpu._recipes.clear()
        assert same_bits((loss, gradient), gpusoftmax.cross_entropy_with_grad(logits, labels))
        kept = logits.copy()
        gpusoftmax.cross_entropy_with_grad(kept, labels, out=kept)
        assert same_bits(kept, gradient)
        with pytest.raises(IndexError, match="expected a class"):
            gpusoftmax.cross_entropy_with_grad(kept, labels - 1000, out=kept)
        assert same_bits(kept, gradient)


def test_weights_that_are_converted_first(target):
    x, labels = inputs.make("spread", SHAPE, F32), np.array([1, 2, 3])
    for seed in range(3):
        weight = np.random.default_rng(seed).random(40)  # float64, to be rounded to float32
        loss = gpusoftmax.cross_entropy(target.array(x), target.array(labels), target.array(weight))
        tolerances.check_loss(target.get(loss), x, labels, weight.astype(F32))
        # And as they are, at another address.
        loss = gpusoftmax.cross_entropy(target.array(x), target.array(labels), target.array(weight.astype(F32)))
        tolerances.check_loss(target.get(loss), x, labels, weight.astype(F32))


def test_memory_of_a_copy_is_not_that_of_the_call():
    """Labels that are first flattened lie in memory that a recorded call gives back, perhaps to one of its arrays."""
    x = np.moveaxis(inputs.make("spread", (2, 3, 4, 40), F32), 0, 2)
    for seed in range(3):
        labels = np.random.default_rng(seed).integers(0, 40, (2, 3, 8))[..., ::2]
        labels = np.moveaxis(labels, 0, 2)
        tolerances.check_loss(gpusoftmax.cross_entropy(x, labels), x, labels)


def test_a_tail_of_rows_in_several_calls(target):
    """More batch axes than a kernel walks: the same kernel is started several times, at other places of the arrays."""
    for seed in range(3):
        x = inputs.make("spread", (2, 6, 10, 40), F32, seed)[:, ::2, ::2]
        tolerances.check_softmax(target.get(gpusoftmax.softmax(target.share(x))), np.ascontiguousarray(x))


def test_streams_and_devices_are_part_of_the_call(gpu):
    x = inputs.make("spread", SHAPE, F32)
    for _ in range(2):
        for device, stream in ((0, 7), (1, 7), (0, 11)):
            result = gpusoftmax.softmax(gpu.array(x, device=device, stream=stream))
            assert (gpu.stats[-1].device, gpu.stats[-1].stream) == (device, stream)
            assert result.__dlpack_device__() == (2, device)
            tolerances.check_softmax(gpu.get(result), x)


def test_two_arrays_of_the_call_may_become_one(target):
    """The gradient of a recorded call was another array than the probabilities; later it is the same one."""
    for seed, same in enumerate((False, True, False)):
        host, there = placed(target, "softmax_backward", seed)
        gradient = there["probs"] if same else there["dprobs"]
        result = gpusoftmax.softmax_backward(there["probs"], gradient)
        tolerances.check_softmax_backward(target.get(result), host["probs"], host["probs" if same else "dprobs"])


def test_an_error_is_not_recorded(gpu):
    x = gpu.array(inputs.make("spread", SHAPE, F32))
    for _ in range(2):
        with pytest.raises(ValueError, match="temperature"):
            gpusoftmax.softmax(x, temperature=-1.0)
        with pytest.raises(TypeError, match="out is a NumPy array"):
            gpusoftmax.softmax(x, out=np.zeros(SHAPE, F32))


def test_empty_batches_launch_nothing(gpu):
    for _ in range(2):
        result = gpusoftmax.softmax(gpu.array(np.zeros((0, 5), F32)))
        assert isinstance(result, EmulatedArray) and result.shape == (0, 5)
    assert not gpu.stats


def test_recipes_are_bounded(gpu, monkeypatch):
    monkeypatch.setattr(_recipe, "MAX_RECIPES", 3)
    monkeypatch.setattr(_replay, "_recipes", {})
    for n_cols in range(1, 9):
        gpusoftmax.softmax(gpu.array(np.zeros((2, n_cols), F32)))
        assert len(_replay._recipes) <= 3


def test_steps_are_bounded(target, monkeypatch):
    """A recipe takes memory for each of its steps."""
    monkeypatch.setattr(_recipe, "MAX_STEPS", 3)
    monkeypatch.setattr(target.module, "_recipes", {})
    for n_calls, is_kept in ((3, True), (4, False)):
        for seed in range(2):
            x = inputs.make("spread", (n_calls, 7, 4, 40), F32, seed)[:, 1::2, ::2]  # three axes that nothing joins
            tolerances.check_softmax(target.get(gpusoftmax.softmax(target.share(x))), np.ascontiguousarray(x))
        assert (list(target.module._recipes.values())[-1] is not None) is is_kept


def test_numpy_arrays_are_none_of_its_business(monkeypatch):
    monkeypatch.setattr(_replay, "_layout", lambda *_: pytest.fail("looked at a NumPy array"))
    gpusoftmax.softmax(inputs.make("spread", SHAPE, F32))
