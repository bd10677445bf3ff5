"""What the steps of cross_entropy.py hand to each other, and where they keep what they know of chunks and rows."""

from typing import NamedTuple

from gpusoftmax.kernels.cpu.states import MEASURED_FIELDS, OWN, WRITER
from gpusoftmax.kernels.operands import Labels, Rows


class Loss(NamedTuple):
    """What the steps need besides the logits."""

    rows: Rows
    labels: Labels
    weight: int  # addresses of numbers in the computation format, 0: none
    weight_sum: int
    ignore_index: int
    confidence: object  # 1 - eps
    share: object  # eps/V
    scale: object  # 1 / temperature
    scale_low: object  # None: the scale is 1
    shares: object  # None unless a row has several labels, which have these shares,
    n_labels: int
    label_stride: int
    share_stride: int
    is_dense: object  # or unless a row has a share for each class
    row_weight: object  # None where there are no extras
    z_loss: object
    results: object  # arrays for what is told of each row
    upstream: object  # what the gradient of each row is multiplied by


class Results(NamedTuple):
    losses: object
    z_losses: object
    lse: object
    correct: object


class Summary(NamedTuple):
    """What the gradient of a row, or of one row per lane, is made of, see `gradient_of`."""

    shift: object
    exponent: object
    on_probs: object
    on_share: object
    on_mass: object


# What is kept of a chunk beside its state: the logit of its label, or its part of S; its distances and their mass.
LOGIT, DISTANCE, DISTANCE_LOW, MASS = range(OWN, OWN + 4)
PART_OF_S = LOGIT
# Of a row, where the chunks end.
LABEL_LOGIT, ROW_S, ROW_LOSS, Z_LOSS, ROW_LSE, UPSTREAM, ROW_WEIGHT = range(7)
# Known to whoever has the label's chunk: whether the label is the first of its largest logits.
IS_FIRST = MEASURED_FIELDS
# When a chunk is written: the label's exponential, and what the gradient of its logit is made of.
LABEL_EXP, ON_PROBS, ON_SHARE, ON_MASS, SHIFT, EXPONENT = range(WRITER, WRITER + 6)
