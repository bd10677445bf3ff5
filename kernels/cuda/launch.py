"""Starts a kernel by name: looks up its plan, its image for the device and the loaded kernel, and hands them on."""

from gpusoftmax.kernels.cuda import compile, driver
from gpusoftmax.kernels.cuda.plan import Plan
from gpusoftmax.kernels.operands import Place

COUNT = "i64"


def strided(dtype: str) -> tuple[str, ...]:
    """The signature of one Operand: its pointer and three strides."""
    return f"*{dtype}", "i64", "i64", "i64"


def launch(kernel: str, signature: tuple[str, ...], plan: Plan, words: tuple, place: Place) -> None:
    device = driver.device(place.device)
    image = compile.image(kernel, signature, device.arch)
    driver.launch(driver.load(image, device), plan, place.stream, words)
