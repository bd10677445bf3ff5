"""What the benchmarks do with tensors on a GPU, here with tensors on the CPU."""

import pytest
import torch

from benchmarks import layer


@pytest.fixture
def problem():
    x, weight, target = map(torch.from_numpy, layer._problem(300, 64, 500))
    wanted = layer._with_gradients(layer._whole, x.double(), weight.double(), target)()
    return (x, weight, target), wanted


@pytest.mark.parametrize("dtype", layer.DTYPES["gpu"])
def test_a_layer_of_tensors_is_measured(problem, dtype):
    (x, weight, target), _ = problem
    x, weight = (one.to(getattr(torch, dtype)) for one in (x, weight))
    wanted = layer._with_gradients(layer._whole, x.double(), weight.double(), target)()
    calls = layer._torch_calls(x, weight, target)
    waits = []
    measured = layer._measured(calls, wanted, dtype, 2, lambda call: 2**20, lambda: waits.append(None))
    assert [one["provider"] for one in measured][:2] == ["gpusoftmax", "torch"]
    assert all(one["error"] < layer._FAR_OFF[dtype] and len(one["attempts_ms"]) == 2 for one in measured)
    assert len(waits) == 2 * 2 * len(measured)  # before and after each call


def test_wrong_gradients_of_tensors_are_seen(problem):
    tensors, wanted = problem

    def wrong():
        loss, dx, dweight = layer._with_gradients(layer._whole, *tensors)()
        return loss, dx, 1.001 * dweight

    with pytest.raises(ValueError, match="answer is wrong: off by 0.001"):
        layer._measured({"gpusoftmax": wrong}, wanted, "float32", 1, lambda call: 0, lambda: None)
