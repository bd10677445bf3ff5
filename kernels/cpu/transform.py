"""What every logit goes through on its way into a kernel. New options (bias, softcap, mask) are added here alone."""

from gpusoftmax.kernels.cpu.cache import device
from gpusoftmax.kernels.cpu.vector import transform_logit


@device
def transform(x, col, row, params):
    """The logits of (row, col), (row, col + 1), ... as the kernels hold them; x is a vector or a single number.

    params = (scale, scale_low); the scale multiplies differences later, in `gap`: the maximum is subtracted first.
    """
    return transform_logit(x)
