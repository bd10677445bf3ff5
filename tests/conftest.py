"""One test body, three places to run: the `target` fixture is the CPU, an emulated GPU, or (with -m gpu) a real one."""

import gc
import inspect
import os
import tempfile

# Before any import of the library: tests neither read nor fill the user's cache. A directory that is given is kept and
# spares the compilations of the next run.
if "GPUSOFTMAX_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="gpusoftmax-tests-")
    os.environ["GPUSOFTMAX_CACHE_DIR"] = _cache.name

import numpy as np
import pytest

# What Numba keeps of each kernel is a hundred thousand objects, and there are hundreds of kernels: a search of them all
# for garbage takes ten seconds. It is made when memory has grown, see collect_what_is_left.
gc.set_threshold(50_000, 50, 1000)
COLLECTED_BYTES = 1 << 30
"""Two workers share the 24 GB of the machine that CI runs on; with automatic collections alone one had reached 13."""


def _memory():
    """Of this process, in bytes, where that is known."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


_memory_after_collection = [0]


@pytest.fixture(autouse=True)
def collect_what_is_left():
    """Emulated devices leave gigabytes in cycles. Whatever survives a search for them is not searched again."""
    yield
    if _memory() - _memory_after_collection[0] > COLLECTED_BYTES:
        gc.collect()
        gc.freeze()
        _memory_after_collection[0] = _memory()


class Cpu:
    name = "cpu"

    def array(self, a):
        return a

    def get(self, result):
        return result


class Emulated:
    name = "emulated"

    def __init__(self, gpu):
        self.gpu = gpu
        self.array = gpu.array
        self.get = gpu.get


class Gpu:
    name = "gpu"

    def array(self, a):
        import cupy

        return cupy.asarray(a)

    def get(self, result):
        if result is None:
            return None
        if isinstance(result, tuple):
            parts = map(self.get, result)
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
        return result.get() if hasattr(result, "get") else np.asarray(result)


TARGETS = ["cpu", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=TARGETS)
def target(request):
    """Where to run: target.array(numpy_array) gives an array of the place, target.get(result) brings it back."""
    if request.param == "cpu":
        yield Cpu()
    elif request.param == "gpu":
        yield Gpu()
    else:
        from tests.emulator import emulated_gpu

        with emulated_gpu("sm_90", approx="adversarial", track=False) as gpu:
            yield Emulated(gpu)


_NEWER = {
    *("test_argmax", "test_kl_div", "test_logsumexp_state", "test_mask_logits", "test_sample", "test_soft_argmax"),
    *("test_spatial_softmax", "test_token_logprobs", "test_top_logprobs", "test_topk_softmax", "test_transform"),
}
_FOR_THE_CPU = {
    *("test_sampling", "test_gradients_of_soft_argmax", "test_no_valid_columns", "test_experts"),
    *("test_strides_change_no_bit", "test_the_batch_changes_no_bit", "test_log_probability_of_what_was_drawn"),
    *("test_backward_is_the_derivative", "test_smoothing_under_a_softcap", "test_another_axis"),
    *("test_candidates_of_float64_far_below_the_first", "test_empty_rows", "test_own_numbers_side_by_side"),
    *("test_a_bad_temperature_makes_its_row_nan", "test_no_columns_and_no_rows"),
}
"""By default. Of newer ops: each compiles kernels for the GPU that nothing else takes."""
_BY_NAME = {"test_arrays", "test_bits", "test_jax", "test_torch"}
_NEWER_OPERATIONS = ("soft_cross_entropy", "cross_entropy_backward")


def _is_for_the_gpu(item):
    """Whether a test takes kernels for the GPU. Those for the CPU come first, so that of two processes that share the
    tests one compiles for the CPU and one for the GPU: what kernels of a target have in common, each compiles anew.
    """
    if hasattr(item, "callspec") and "target" in item.callspec.params:
        return item.callspec.params["target"] != "cpu"
    return "gpu" in item.fixturenames or _mentions(item.function, {"emulated_gpu", "codegen", "WARM_CALL"}, set())


def _mentions(function, names, seen):
    """Whether a function, or one of its module that it calls, names one of these."""
    seen.add(function)
    used = {*function.__code__.co_names}
    called = {function.__globals__.get(name) for name in used if inspect.isfunction(function.__globals__.get(name))}
    called = {one for one in called if one.__module__ == function.__module__} - seen
    return not used.isdisjoint(names) or any(_mentions(one, names, seen) for one in called)


_OLDER_OPS = {
    *("softmax", "softmax_backward", "softmax_jvp", "log_softmax", "log_softmax_backward", "logsumexp"),
    *("cross_entropy", "cross_entropy_with_grad"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The emulator's bits are asked of float32. float16 and float64 take the paths of bfloat16 and float32, and each is
    a kernel to compile for every way to walk rows: the marker `matrix` has them, for the emulated GPU and, of the newer
    ops, for the CPU, also where something is asked of every op by its name. Of newer ops on the emulator it has
    bfloat16 too, and what many kernels are compiled for.
    """
    items.sort(key=_is_for_the_gpu)
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        dtypes = {str(getattr(value, "name", value)) for key, value in parameters.items() if key.endswith("dtype")}
        is_newer = item.path.stem in _NEWER and parameters.get("target") != "gpu"
        on_emulator = parameters.get("target") == "emulated"
        if on_emulator and item.path.stem == "test_bits" and "bfloat16" in dtypes:
            item.add_marker(pytest.mark.matrix)
        is_newer_operation = parameters.get("name") in _NEWER_OPERATIONS
        if is_newer_operation and (item.path.stem == "test_regimes" or dtypes - {"float32"}):
            item.add_marker(pytest.mark.matrix)
        is_by_name = item.path.stem in _BY_NAME and parameters.get("target") != "gpu"
        if is_by_name and parameters.get("name", "softmax") not in _OLDER_OPS and dtypes & {"float16", "float64"}:
            item.add_marker(pytest.mark.matrix)
        if (is_newer or on_emulator) and dtypes & {"float16", "float64"}:
            item.add_marker(pytest.mark.matrix)
        if is_newer and on_emulator and ("bfloat16" in dtypes or item.originalname in _FOR_THE_CPU):
            item.add_marker(pytest.mark.matrix)
        if item.get_closest_marker("gpu"):  # one command runs everything that needs a GPU
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "matrix"]
