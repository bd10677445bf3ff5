"""Every kernel the library launches, by name and signature: recorded from the public calls, so that it cannot drift."""

import functools
from contextlib import contextmanager
from unittest import mock

import ml_dtypes
import numpy as np

import gpusoftmax
from gpusoftmax.kernels.cuda import driver

DTYPES = {
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
}


class PaperArray:
    """A device array without memory: enough for the library to plan and compile a launch."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, np.dtype(dtype)
        # Nothing is ever read there; apart, so that no two arrays overlap.
        self.pointer = (id(self) << 16) & ((1 << 47) - 1)

    @property
    def __cuda_array_interface__(self):
        return {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False)}

    def __dlpack_device__(self):
        return 2, 0

    def __gpusoftmax_empty__(self, shape, dtype):
        return PaperArray(shape, dtype)

    def item(self):
        return 2**63 - 1


@contextmanager
def recorded_launches():
    """A list that fills with the image of every launch; nothing runs."""
    images = []
    device = driver.Device(0, "sm_80", 132)
    with (
        mock.patch.object(driver, "device", lambda ordinal: device),
        mock.patch.object(driver, "load", lambda image, device: image),
        mock.patch.object(driver, "launch", lambda image, plan, stream, words: images.append(image)),
    ):
        yield images


@functools.cache
def kernels() -> dict[tuple[str, str], tuple[str, ...]]:
    """(kernel, dtype of the logits) -> signature, for every kernel and dtype, results of the same dtype."""
    found = {}
    for name, dtype in DTYPES.items():
        x = PaperArray((4, 100), dtype)
        labels, weight = PaperArray((4,), "int64"), PaperArray((200,), dtype)
        strided_weight = PaperArray((100,), dtype)
        strided_weight.strides = None
        with recorded_launches() as images:
            gpusoftmax.softmax(x)
            gpusoftmax.softmax_backward(x, PaperArray((4, 100), dtype))
            gpusoftmax.log_softmax(x)
            gpusoftmax.log_softmax_backward(x, PaperArray((4, 100), dtype))
            gpusoftmax.logsumexp(x)
            gpusoftmax.softmax(PaperArray((2, 3, 4), dtype), axis=(0, 2))  # copies
            gpusoftmax.cross_entropy_with_grad(
                x, labels, PaperArray((100,), dtype), label_smoothing=0.1, validate=True
            )
        for image in images:
            found.setdefault((image.kernel, name), image.signature)
    return found
