"""What every logit goes through on its way into a kernel. New options (bias, softcap, mask) are added here alone."""

from gpusoftmax.kernels.cuda.device._cuda import device
from gpusoftmax.kernels.cuda.device.arithmetic import transform_logit


@device
def transform(x, col, row, params):
    """The logit of (row, col) as the kernels hold it. params = (scale, scale_low); the scale multiplies differences
    later, in `gap`, so that the maximum is subtracted first.
    """
    return transform_logit(x)
