"""The language model of `gpusoftmax demo`, trained without ever holding its logits.

    python examples/language_model.py

From three tokens of Python's standard library the model predicts the next one out of 32,768. A batch of 1,024 has
128 MiB of logits, and as many bytes of gradients where these have an array of their own. linear_cross_entropy_with_grad
makes them 64 rows at a time, in one buffer of 8 MiB.
"""

import argparse
import tracemalloc

import numpy as np

import gpusoftmax
from gpusoftmax._demo import contexts_at, read_corpus

WIDTH, CONTEXT = 32, 3
Arrays = tuple[np.ndarray, ...]


def new_parameters(n_vocab: int) -> Arrays:
    """embedding, bias and mix of: hidden = tanh([e(c1) e(c2) e(c3)] mix), logits = hidden embedding^T + bias."""
    random = np.random.default_rng(0)
    embedding = 0.05 * random.standard_normal((n_vocab, WIDTH), np.float32)
    mix = random.standard_normal((CONTEXT * WIDTH, WIDTH), np.float32) / np.float32((CONTEXT * WIDTH) ** 0.5)
    return embedding, np.zeros(n_vocab, np.float32), mix


def loss_and_gradients(
    parameters: Arrays, context: np.ndarray, target: np.ndarray, chunk_size: int
) -> tuple[float, Arrays]:
    embedding, bias, mix = parameters
    inputs = embedding[context].reshape(len(context), -1)
    hidden = np.tanh(inputs @ mix)
    loss, dhidden, dembedding, dbias = gpusoftmax.linear_cross_entropy_with_grad(
        hidden, embedding, target, linear_bias=bias, chunk_size=chunk_size
    )
    dsum = dhidden * (1 - hidden**2)
    np.add.at(dembedding, context.reshape(-1), (dsum @ mix.T).reshape(-1, WIDTH))
    return float(loss), (dembedding, dbias, inputs.T @ dsum)


def peak_mebibytes(parameters: Arrays, context: np.ndarray, target: np.ndarray, chunk_size: int) -> float:
    """Of the arrays that a step of training makes."""
    loss_and_gradients(parameters, context, target, chunk_size)  # the first call of a kind may compile
    tracemalloc.start()
    loss_and_gradients(parameters, context, target, chunk_size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 2**20


def main(steps: int, n_vocab: int, batch: int, chunk_size: int) -> dict[str, float]:
    tokens = read_corpus(n_vocab).training
    parameters = new_parameters(n_vocab)
    squares = [np.zeros_like(parameter) for parameter in parameters]
    random = np.random.default_rng(0)
    losses = []
    for step in range(steps):
        positions = random.integers(CONTEXT, len(tokens), batch)
        context, target = contexts_at(tokens, positions), tokens[positions]
        loss, gradients = loss_and_gradients(parameters, context, target, chunk_size)
        for parameter, square, gradient in zip(parameters, squares, gradients, strict=True):  # Adagrad
            square += gradient * gradient
            parameter -= 0.1 * gradient / (np.sqrt(square) + 1e-8)
        losses.append(loss)
        if step % 20 == 0:
            print(f"step {step:4}: perplexity {np.exp(loss):8,.0f}")

    chunked, whole = (peak_mebibytes(parameters, context, target, size) for size in (chunk_size, batch))
    print(f"memory of a step: {chunked:.0f} MiB by {chunk_size} rows, {whole:.0f} MiB with all logits of the batch")
    return {"first loss": losses[0], "last loss": losses[-1], "MiB": chunked, "MiB with all logits": whole}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--chunk-size", type=int, default=64)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.vocab, arguments.batch, arguments.chunk_size)
