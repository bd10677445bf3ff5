"""The divergence between two rows of logits and its gradients, on the GPU. kernels/cuda/device/kl_div.py holds the
kernels; what the arguments mean stands in kernels/cpu/kl_div.py.
"""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import STORAGE, Numbers, Operand, Place, Rows, scale_of


def kl_div(
    rows: Rows,
    logits: Operand,
    target_logits: Operand,
    weight: Operand,
    losses: Operand,
    dlogits: Operand,
    normaliser: Numbers,
    upstream: float,
    temperature: float,
    place: Place,
) -> None:
    arrays = logits, target_logits, weight, losses, dlogits
    numbers = _numbers(normaliser, upstream, temperature)
    launch_rows("kl_div.kl_div_rows", place, rows, *arrays, *numbers, reads=2, writes_rows=dlogits.pointer != 0)


def kl_div_target_grad(
    rows: Rows,
    logits: Operand,
    target_logits: Operand,
    weight: Operand,
    dtarget: Operand,
    normaliser: Numbers,
    upstream: float,
    temperature: float,
    place: Place,
) -> None:
    arrays = logits, target_logits, weight, dtarget
    numbers = _numbers(normaliser, upstream, temperature)
    launch_rows("kl_div.kl_div_target_grad_rows", place, rows, *arrays, *numbers, reads=2)


def _numbers(normaliser: Numbers, upstream: float, temperature: float) -> tuple:
    dtype = normaliser.dtype
    return normaliser, STORAGE[dtype](upstream), *scale_of(2.0, temperature, dtype)
