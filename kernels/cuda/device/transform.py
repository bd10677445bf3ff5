"""What every logit goes through on its way into a kernel. New options (bias, softcap, mask) are added here alone."""

from gpusoftmax.kernels.cuda.device._cuda import device


@device
def transform(x, col, row, params):
    """The logit of (row, col), not yet multiplied by the scale, params[0]: exponential.py does that to differences, so
    that the maximum is subtracted first.
    """
    return x
