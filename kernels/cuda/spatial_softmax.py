"""Expected coordinates under the softmax over the pixels of an image, and their backward, on the GPU.

kernels/cuda/device/spatial_softmax.py holds the kernels.
"""

from gpusoftmax.kernels.cuda.launch import launch_rows
from gpusoftmax.kernels.operands import Operand, Place, Rows, compute_dtype, scale_of


def spatial_softmax(
    rows: Rows, features: Operand, x: Operand, y: Operand, width: int, temperature: float, place: Place
) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(features.dtype, x.dtype))
    launch_rows("spatial_softmax.spatial_softmax_rows", place, rows, features, x, y, width, *scale, passes=1)


def spatial_softmax_backward(
    rows: Rows,
    features: Operand,
    x: Operand,
    y: Operand,
    dx: Operand,
    dy: Operand,
    dfeatures: Operand,
    width: int,
    temperature: float,
    place: Place,
) -> None:
    scale = scale_of(2.0, temperature, compute_dtype(features.dtype, x.dtype, dfeatures.dtype))
    # The array that rows are written to comes last.
    arrays = features, x, y, dx, dy, dfeatures
    launch_rows("spatial_softmax.spatial_softmax_backward_rows", place, rows, *arrays, width, *scale)
