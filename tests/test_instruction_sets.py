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
    "SSE": (16, "nehalem", "+sse4.2,-avx,-avx2,-fma", ("float32", "float16")),
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


LOOPS = """
import re
import numpy as np
from numba.core.codegen import CPUCodeLibrary
from gpusoftmax.kernels.cpu import vector
if vector.REGISTER_BYTES != 64:
    print("not AVX-512")
    raise SystemExit
texts, finalize = [], CPUCodeLibrary.finalize
def listen(library):
    finalize(library)
    texts.append(library.get_asm_str())
CPUCodeLibrary.finalize = listen
import gpusoftmax
gpusoftmax.logsumexp(np.zeros((4, 5000), np.float32))
lines = next(text for text in texts if re.search("^_ZN.*logsumexp_rows.*:", text, re.M)).splitlines()
labels = {line[:-1]: number for number, line in enumerate(lines) if re.match(r"\\.L\\w+:$", line)}
loops = []
for number, line in enumerate(lines):
    jump = re.match(r"\\s+j\\w+\\s+(\\.L\\w+)$", line)
    if jump and labels[jump[1]] < number:
        loops.append(lines[labels[jump[1]]:number])
exponentials = min((loop for loop in loops if sum("vfmadd" in line and "zmm" in line for line in loop) >= 9), key=len)
print(len(exponentials), sum("broadcast" in line for line in exponentials), sum("rsp" in line for line in exponentials))
"""


@pytest.mark.matrix
def test_a_loop_of_exponentials_keeps_its_constants(tmp_path):
    completed = subprocess.run(
        [sys.executable, "-c", LOOPS],
        env={**os.environ, "GPUSOFTMAX_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    if completed.stdout == "not AVX-512\n":
        pytest.skip("there are fewer registers")
    _, n_broadcast, n_on_stack = map(int, completed.stdout.split())
    assert n_broadcast <= 1 and n_on_stack == 0
