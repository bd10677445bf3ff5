"""Softmax, log-softmax, log-sum-exp and cross-entropy over rows of logits, on NVIDIA GPUs and CPUs."""

from gpusoftmax.compile import compile
from gpusoftmax.cross_entropy import cross_entropy, cross_entropy_with_grad
from gpusoftmax.explain import explain
from gpusoftmax.log_softmax import log_softmax, log_softmax_backward
from gpusoftmax.logsumexp import logsumexp
from gpusoftmax.mask_logits import top_k_mask_logits, top_p_mask_logits
from gpusoftmax.sample import sample
from gpusoftmax.softmax import softmax, softmax_backward

__version__ = "0.1.0"

__all__ = [
    "compile",
    "cross_entropy",
    "cross_entropy_with_grad",
    "explain",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "sample",
    "softmax",
    "softmax_backward",
    "top_k_mask_logits",
    "top_p_mask_logits",
]
