"""The memory that gpusoftmax.torch makes for gradients."""

import mmap

import pytest
import torch

import gpusoftmax
import gpusoftmax.torch as ours
from gpusoftmax import _memory

GRADIENTS = {
    "softmax": lambda x: ours.softmax(x, 1).square().sum(),
    "cross_entropy": lambda x: ours.cross_entropy(x, torch.zeros(len(x), dtype=torch.long)),
    "weighted rows": lambda x: ours.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), z_loss=0.1),
    "probabilities": lambda x: ours.cross_entropy(x, torch.full_like(x, 1 / x.shape[1], requires_grad=False)),
    "transform": lambda x: ours.cross_entropy(x, torch.zeros(len(x), dtype=torch.long), softcap=9.0),
    "tokens": lambda x: ours.token_logprobs(x, torch.zeros(len(x), dtype=torch.long), softcap=9.0).logprob.sum(),
    "soft_argmax": lambda x: gpusoftmax.soft_argmax(x).sum(),
    "spatial_softmax": lambda x: gpusoftmax.spatial_softmax(x[None, None]).sum(),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_large_gradients_are_made_in_huge_pages(name, monkeypatch):
    """What torch allocates comes in pages of 4 KiB, each of which costs the first to write to it: 30 ms for 128 MB."""
    asked = []
    monkeypatch.setattr(_memory, "_madvise", lambda start, size, advice: asked.append((start, start + size)))
    x = torch.randn(32, 32768).requires_grad_()
    (gradient,) = torch.autograd.grad(GRADIENTS[name](x), x)
    end = gradient.data_ptr() + gradient.nbytes
    assert any(0 <= first - gradient.data_ptr() < mmap.PAGESIZE and last == end for first, last in asked)
