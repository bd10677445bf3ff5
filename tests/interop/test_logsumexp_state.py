"""LogSumExpState of torch and JAX arrays: NumPy's bits, in arrays of their own kind."""

import jax
import numpy as np
import pytest
import torch

import gpusoftmax
from gpusoftmax import LogSumExpState
from tests import inputs

LIBRARIES = {"torch": (torch.from_numpy, torch.Tensor), "jax": (jax.numpy.asarray, jax.Array)}


@pytest.mark.parametrize("library", LIBRARIES)
def test_same_bits_as_numpy(library):
    array, kind = LIBRARIES[library]
    logits = inputs.make("spread", (3, 2 * 2048 + 50), np.float32)
    state = LogSumExpState.empty(3, like=array(logits))
    state.update(array(logits[:, 2048:]), 2048)
    sent = LogSumExpState.empty(3, like=array(logits))
    sent.update(array(logits[:, :2048]))
    assert isinstance(sent.table, kind)
    state.merge(LogSumExpState.from_table(sent.table, sent.columns))
    lse = state.logsumexp()
    assert isinstance(lse, kind) and np.asarray(lse).tobytes() == gpusoftmax.logsumexp(logits).tobytes()
    with pytest.raises(TypeError, match="the state is a .* array on the CPU and columns is a NumPy array on the CPU"):
        state.update(logits[:, :0], 4 * 2048)
