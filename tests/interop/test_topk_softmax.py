"""topk_softmax of torch and JAX arrays: NumPy's bits, and torch's own answer."""

import jax
import numpy as np
import torch

import gpusoftmax
from tests import inputs


def test_same_as_numpy_and_torch():
    logits = inputs.make("spread", (50, 64), np.float32)
    probs, indices = gpusoftmax.topk_softmax(logits, 8)
    for array, kind in ((torch.from_numpy(logits), torch.Tensor), (jax.numpy.asarray(logits), jax.Array)):
        top = gpusoftmax.topk_softmax(array, 8)
        assert isinstance(top.probs, kind) and isinstance(top.indices, kind)
        assert np.asarray(top.probs).tobytes() == probs.tobytes() and np.array_equal(np.asarray(top.indices), indices)
    weights, experts = torch.topk(torch.softmax(torch.from_numpy(logits), -1), 8)
    assert np.array_equal(experts.numpy(), indices)
    np.testing.assert_allclose(probs, (weights / weights.sum(-1, keepdim=True)).numpy(), rtol=5e-6)
