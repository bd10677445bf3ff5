"""A training loop in PyTorch, once with torch's cross_entropy and once with ours: nothing changes but the time.

    pip install gpusoftmax torch
    python examples/torch_training.py

A small language model predicts tokens of Python's standard library. Both runs begin with the same parameters and see
the same batches, so that their losses are the same numbers, to rounding.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import gpusoftmax.torch
from gpusoftmax._demo import contexts_at, read_corpus

CONTEXT, WIDTH = 3, 32


class Model(nn.Module):
    def __init__(self, n_vocab: int):
        super().__init__()
        self.embedding = nn.Embedding(n_vocab, WIDTH)
        self.mix = nn.Linear(CONTEXT * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, n_vocab)

    def forward(self, context: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(context).flatten(1))))


def train(
    cross_entropy: Callable[[Tensor, Tensor], Tensor], batches: list[tuple[Tensor, Tensor]], n_vocab: int
) -> tuple[list[float], float]:
    """The losses, and the seconds of the quickest step."""
    torch.manual_seed(0)
    model = Model(n_vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, seconds = [], []
    for context, target in batches:
        start = time.perf_counter()
        loss = cross_entropy(model(context), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, min(seconds)


def main(steps: int, n_vocab: int, batch: int) -> dict[str, float]:
    tokens = read_corpus(n_vocab).training
    positions = torch.randint(CONTEXT, len(tokens), (steps, batch), generator=torch.Generator().manual_seed(0))
    contexts = [torch.from_numpy(contexts_at(tokens, some.numpy())) for some in positions]
    batches = [(context, torch.from_numpy(tokens)[some]) for context, some in zip(contexts, positions, strict=True)]

    theirs, their_seconds = train(nn.functional.cross_entropy, batches, n_vocab)
    ours, our_seconds = train(gpusoftmax.torch.cross_entropy, batches, n_vocab)
    for step in range(0, steps, max(1, steps // 5)):
        print(f"step {step:4}: loss {ours[step]:.6f}, with torch's function {theirs[step]:.6f}")
    apart = max(abs(one - other) / other for one, other in zip(ours, theirs, strict=True))
    print(f"at most {apart:.1e} of a loss apart")
    print(f"a step takes {1e3 * our_seconds:.0f} ms, with torch's function {1e3 * their_seconds:.0f}")
    return {"first loss": ours[0], "last loss": ours[-1], "apart": apart, "speedup": their_seconds / our_seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.vocab, arguments.batch)
