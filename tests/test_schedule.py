"""No kernel depends on the order in which warps and blocks run, and none has a race on shared memory.

Rows of several chunks are in test_regimes.py (`test_schedule_of_a_cluster`); here are short ones, the copies, and the
kernels that run as one block. The emulator looks for races in all of them.
"""

from unittest import mock

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax.kernels.cuda import driver
from gpusoftmax.kernels.cuda.plan import PART_ROWS
from tests import codegen, inputs
from tests.calls import CALLS, arguments
from tests.emulator import emulated_gpu
from tests.test_regimes import force

F32 = np.dtype(np.float32)
SHORT = 40, 70  # several rows in a warp, several warps in a block, several blocks
MANY = 700, 3  # more rows than a block has threads, by more than one turn


def _op(name):
    def call(gpu):
        return CALLS[name].function(*(gpu.array(array) for array in arguments(name, SHORT, F32).values()))

    return call


def _sums(gpu):
    """All that a loss launches beside its rows: labels checked, weights summed, rows counted, losses added."""
    x, target = gpu.array(inputs.make("spread", MANY, F32)), gpu.array(inputs.targets(*MANY, share_ignored=0.2))
    weight = gpu.array(np.array([0.5, 1.0, 3.0], F32))
    return tuple(
        gpusoftmax.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=0.1, validate=True)
        for reduction in ("mean", "sum")
    )


def _sums_of_parts(gpu):
    n_rows = PART_ROWS + 100
    x, target = gpu.array(inputs.make("spread", (n_rows, 2), F32)), gpu.array(inputs.targets(n_rows, 2))
    return gpusoftmax.cross_entropy(x, target)


def _correct(gpu):
    x, target = gpu.array(inputs.make("spread", MANY, F32)), gpu.array(inputs.targets(*MANY))
    return gpusoftmax.cross_entropy(x, target, return_correct=True).n_correct


def _soft_losses(gpu):
    """Of labels with shares, and the gradient from the lse."""
    x, rng = gpu.array(inputs.make("spread", SHORT, F32)), np.random.default_rng(0)
    soft = gpu.array(rng.integers(0, SHORT[1], (SHORT[0], 3))), gpu.array(rng.random((SHORT[0], 3)).astype(F32))
    told, dlogits = gpusoftmax.cross_entropy_with_grad(x, soft, return_lse=True, reduction="none")
    return told.loss, dlogits, gpusoftmax.cross_entropy_backward(x, soft, told.lse, told.loss)


def _tempered_backwards(gpu):
    x, g = (gpu.array(inputs.make("spread", SHORT, F32, seed)) for seed in (0, 1))
    temperature = gpu.array(np.linspace(0.5, 2, SHORT[0]).astype(F32))
    functions = gpusoftmax.softmax_backward, gpusoftmax.log_softmax_backward
    return tuple(function(x, g, temperature=temperature) for function in functions)


def _target_gradients(gpu):
    x, y = (gpu.array(inputs.make("spread", SHORT, F32, seed)) for seed in (0, 1))
    return tuple(gpusoftmax.kl_div_with_grad(x, y, target_grad=True))


def _logprobs_alone(gpu):
    """Without entropies, and the gradient without theirs."""
    x, target = (gpu.array(array) for array in arguments("cross_entropy", SHORT, F32).values())
    scores = gpusoftmax.token_logprobs(x, target, return_rank=True)
    return scores.logprob, scores.rank, gpusoftmax.token_logprobs_backward(x, target, scores.logprob)


def _limited_sample(gpu):
    x = gpu.array(inputs.make("spread", SHORT, F32))
    return gpusoftmax.sample(x, top_k=9, top_p=0.9, min_p=0.01, rng=gpu.array(np.arange(SHORT[0])))


def _different_requests(gpu):
    x, rows = gpu.array(inputs.make("spread", SHORT, F32)), np.arange(SHORT[0])
    temperature, top_k = gpu.array((rows % 3 / 2).astype(F32)), gpu.array(rows % 5)
    drawn = gpusoftmax.sample(x, temperature=temperature, top_k=top_k, top_p=0.9, rng=gpu.array(rows))
    return drawn, gpusoftmax.top_k_mask_logits(x, top_k)


def _state(gpu):
    x = gpu.array(inputs.make("spread", SHORT, F32))
    state = gpusoftmax.LogSumExpState.empty(SHORT[0], like=x)
    state.update(x)
    return state.logsumexp()


def _copies(n_cols):
    """No single stride walks such rows: they are copied first, and their results back."""

    def call(gpu):
        return gpusoftmax.softmax(gpu.array(inputs.make("spread", (3, 4, n_cols), F32)), axis=(0, 2))

    return call


def _maps(gpu):
    features = gpu.array(inputs.make("spread", (40, 7, 10), F32))
    points = gpusoftmax.spatial_softmax(features)
    return points, gpusoftmax.spatial_softmax_backward(features, points, points)


CASES = {
    **{name: _op(name) for name in CALLS},
    "spatial_softmax": _maps,
    "sums over rows": _sums,
    "sums over rows by several blocks": _sums_of_parts,
    "correct predictions": _correct,
    "losses of soft targets": _soft_losses,
    "temperatures of gradients": _tempered_backwards,
    "gradients of a target": _target_gradients,
    "log-probabilities alone": _logprobs_alone,
    "samples of what is kept": _limited_sample,
    "different requests": _different_requests,
    "log-sum-exp in parts": _state,
    "copies of short rows": _copies(40),
    "copies of long rows": _copies(1500),
}


@pytest.mark.parametrize("name", CASES)
def test_any_order_gives_the_same_bits(name):
    found = set()
    for seed in (None, 1):
        with emulated_gpu("sm_90", seed=seed, track=False) as gpu:
            results = gpu.get(CASES[name](gpu))
            parts = results if isinstance(results, tuple) else (results,)
            found.add(tuple(np.asarray(part).tobytes() for part in parts if part is not None))
    assert len(found) == 1


def test_a_bad_label_is_found_in_any_order():
    labels = np.zeros(MANY[0], np.int64)
    labels[[650, 300, 301]] = 3, -7, 9
    for seed in (None, 1):
        with emulated_gpu("sm_90", seed=seed, track=False) as gpu:
            x, target = gpu.array(np.zeros(MANY, F32)), gpu.array(labels)
            with pytest.raises(IndexError, match=r"target\[300\].* is -7"):
                gpusoftmax.cross_entropy(x, target, validate=True)


def test_copies_share_rows_among_blocks(monkeypatch):
    """A cluster, whose blocks copy each their part and fill their slots twice."""
    expected = None
    for ways in ((1, 2, 1), (2, 1, 2), (2, 2, 1)):
        force(monkeypatch, *ways)
        with emulated_gpu("sm_90", seed=3, track=False) as gpu:
            found = gpu.get(_copies(1500)(gpu)).tobytes()
        expected = expected or found
        assert found == expected


def test_every_kernel_is_among_them():
    loaded = set()
    for case in CASES.values():
        with emulated_gpu("sm_90", track=False, check_race=False) as gpu:

            def load(image, *where, load=driver.load):
                loaded.add(image.kernel)
                return load(image, *where)

            with mock.patch.object(driver, "load", load):
                case(gpu)
    assert loaded == codegen.kernels_on_disk()
