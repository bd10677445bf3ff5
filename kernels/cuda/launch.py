"""Starts a kernel by name: its image for the device, loaded once, with the arguments packed for the driver."""

import numpy as np

from gpusoftmax.kernels.cuda import compile, driver
from gpusoftmax.kernels.cuda.plan import Plan, row_plan
from gpusoftmax.kernels.operands import Labels, Numbers, Operand, Place, Rows


def launch(kernel: str, plan: Plan, place: Place, *arguments) -> None:
    """Starts `kernel`, "<file>.<function>" under kernels/cuda/device; compile.image explains the signature."""
    signature, words = [], []
    for argument in arguments:
        if isinstance(argument, Operand):
            *numbers, dtype = argument
            signature.append(f"strided {dtype}")
            words += numbers
        elif isinstance(argument, Numbers):
            signature.append(f"*{argument.dtype}")
            words.append(argument.pointer)
        elif isinstance(argument, Rows | Labels):
            signature.append("rows" if isinstance(argument, Rows) else "labels")
            words += argument
        elif isinstance(argument, np.floating):
            signature.append(argument.dtype.name)
            words.append(argument)
        else:
            signature.append("int64")
            words.append(argument)
    device = driver.device(place.device)
    image = compile.image(kernel, tuple(signature), device.arch)
    driver.launch(driver.load(image, device), plan, place.stream, tuple(words))


def launch_rows(kernel: str, place: Place, rows: Rows, *arguments) -> None:
    """Starts a kernel that takes one block per row."""
    launch(kernel, row_plan(rows.n_rows, rows.n_cols), place, rows, *arguments)
