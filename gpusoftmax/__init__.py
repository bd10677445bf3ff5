"""Softmax, log-softmax, log-sum-exp, cross-entropy and divergences over rows of logits, on NVIDIA GPUs and CPUs."""

from gpusoftmax.argmax import argmax
from gpusoftmax.compile import compile
from gpusoftmax.cross_entropy import (
    CrossEntropy,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_with_grad,
)
from gpusoftmax.explain import explain
from gpusoftmax.kl_div import KlDivWithGrad, kl_div, kl_div_with_grad
from gpusoftmax.linear_cross_entropy import (
    LinearCrossEntropyGrad,
    linear_cross_entropy,
    linear_cross_entropy_with_grad,
)
from gpusoftmax.log_softmax import log_softmax, log_softmax_backward
from gpusoftmax.logsumexp import logsumexp
from gpusoftmax.logsumexp_state import LogSumExpState
from gpusoftmax.mask_logits import top_k_mask_logits, top_p_mask_logits
from gpusoftmax.sample import Sample, sample
from gpusoftmax.soft_argmax import soft_argmax, soft_argmax_backward
from gpusoftmax.softmax import softmax, softmax_backward, softmax_jvp
from gpusoftmax.spatial_softmax import spatial_softmax, spatial_softmax_backward
from gpusoftmax.token_logprobs import TokenLogprobs, token_logprobs, token_logprobs_backward
from gpusoftmax.top_logprobs import TopLogprobs, top_logprobs
from gpusoftmax.topk_softmax import TopkSoftmax, topk_softmax

__version__ = "0.1.0"

__all__ = [
    "CrossEntropy",
    "KlDivWithGrad",
    "LinearCrossEntropyGrad",
    "LogSumExpState",
    "Sample",
    "TokenLogprobs",
    "TopLogprobs",
    "TopkSoftmax",
    "argmax",
    "compile",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_with_grad",
    "explain",
    "kl_div",
    "kl_div_with_grad",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "sample",
    "soft_argmax",
    "soft_argmax_backward",
    "softmax",
    "softmax_backward",
    "softmax_jvp",
    "spatial_softmax",
    "spatial_softmax_backward",
    "token_logprobs",
    "token_logprobs_backward",
    "top_k_mask_logits",
    "top_logprobs",
    "top_p_mask_logits",
    "topk_softmax",
]
