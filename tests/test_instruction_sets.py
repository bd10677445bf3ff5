"""The CPU kernels for vectors of another width than the host's: compiled for an older CPU in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
import gpusoftmax
from gpusoftmax.kernels.cpu import vector
from tests import inputs, tolerances
assert vector.REGISTER_BYTES == {register_bytes}, vector.REGISTER_BYTES
for dtype in {dtypes}:
    for shape in ((3, 2100), (40, 33)):
        logits = inputs.make("spread", shape, dtype)
        probs = gpusoftmax.softmax(logits)
        tolerances.check_softmax(probs, logits)
        across = gpusoftmax.softmax(np.ascontiguousarray(logits.T), axis=0).T
        assert np.array_equal(across.astype(np.float64), probs.astype(np.float64)), (dtype, shape)
    if {register_bytes} < 32:
        continue  # one op shows the width
    labels = np.arange(40) % 33
    loss, dlogits = gpusoftmax.cross_entropy_with_grad(logits, labels, reduction="none")
    tolerances.check_loss(loss, logits, labels, reduction="none")
    tolerances.check_dlogits(dlogits, logits, labels, reduction="none")
print("done")
"""
CPUS = {
    "AVX2": (32, "haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2", ("float32",)),
    "AVX2, bfloat16": (32, "haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+sse4.2", ("bfloat16",)),
    "SSE": (16, "nehalem", "+sse4.2,-avx,-avx2,-fma", ("float32",)),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the features are those of x86")
@pytest.mark.parametrize("name", ["AVX2", *(pytest.param(one, marks=pytest.mark.matrix) for one in [*CPUS][1:])])
def test_narrower_vectors(name, tmp_path):
    register_bytes, cpu, features, dtypes = CPUS[name]
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(register_bytes=register_bytes, dtypes=dtypes)],
        env={**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert completed.stdout == "done\n", completed.stderr[-3000:]
