"""Softmax, log-softmax, log-sum-exp and cross-entropy over rows of logits, on NVIDIA GPUs and CPUs."""

from gpusoftmax.compile import compile
from gpusoftmax.cross_entropy import cross_entropy, cross_entropy_with_grad
from gpusoftmax.explain import explain
from gpusoftmax.log_softmax import log_softmax, log_softmax_backward
from gpusoftmax.logsumexp import logsumexp
from gpusoftmax.softmax import softmax, softmax_backward
from gpusoftmax.token_logprobs import TokenLogprobs, token_logprobs, token_logprobs_backward
from gpusoftmax.top_logprobs import TopLogprobs, top_logprobs

__version__ = "0.1.0"

__all__ = [
    "TokenLogprobs",
    "TopLogprobs",
    "compile",
    "cross_entropy",
    "cross_entropy_with_grad",
    "explain",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "softmax",
    "softmax_backward",
    "token_logprobs",
    "token_logprobs_backward",
    "top_logprobs",
]
