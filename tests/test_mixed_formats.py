"""Results of float64 from logits of sixteen bits: those of the same logits as float64."""

import numpy as np
import pytest

import gpusoftmax
from tests import inputs

SHAPES = {"short": ((4, 40), -1), "long": ((4, 3000), -1), "side by side": ((40, 64), 0)}


def results(target, op, x, labels, probs, axis):
    def room():
        return target.array(np.empty(x.shape))

    options = {"axis": axis, "reduction": "sum"}
    if op == "logsumexp":
        return (gpusoftmax.logsumexp(x, axis, out=target.array(np.empty(len(labels)))),)
    if op == "cross_entropy":
        return gpusoftmax.cross_entropy_with_grad(x, labels, **options, label_smoothing=0.1, out=room())
    if op == "probabilities":
        return gpusoftmax.cross_entropy_with_grad(x, probs, **options, z_loss=0.1, out=room())
    if op == "token_logprobs":
        scores = gpusoftmax.token_logprobs(x, labels, axis=axis, return_entropy=True)
        upstream = scores.logprob, scores.entropy
        return (gpusoftmax.token_logprobs_backward(x, labels, *upstream, axis=axis, out=room()),)
    return (getattr(gpusoftmax, op)(x, axis, out=room()),)


@pytest.mark.parametrize("split", SHAPES)
@pytest.mark.parametrize(
    "op", ["softmax", "log_softmax", "logsumexp", "cross_entropy", "probabilities", "token_logprobs"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.matrix)])
def test_float64_from_sixteen_bits(target, op, split, dtype):
    shape, axis = SHAPES[split]
    narrow = inputs.make("spread", shape, inputs.BFLOAT16 if dtype == "bfloat16" else dtype)
    wide = narrow.astype(np.float64)
    n_rows, n_cols = shape if axis == -1 else shape[::-1]
    labels = target.array(inputs.targets(n_rows, n_cols))
    probs = np.random.default_rng(0).integers(0, 8, shape) / 64  # which sixteen bits hold
    found, expected = (
        [
            target.get(one)
            for one in results(target, op, target.array(x), labels, target.array(probs.astype(x.dtype)), axis)
        ]
        for x in (narrow, wide)
    )
    gradient, of_wide = found[-1], expected[-1]
    assert gradient.dtype == np.float64
    if op == "token_logprobs":  # float32 is what flows back
        np.testing.assert_allclose(gradient, of_wide, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_allclose(gradient, of_wide, rtol=1e-13, atol=1e-15)
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
