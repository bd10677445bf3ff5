"""Softmax regression on the digits that come with scikit-learn: 1,797 images of 8 x 8 pixels, ten classes.

    pip install 'gpusoftmax[examples]'
    python examples/softmax_classifier.py

Gradient descent on the fused loss and gradient finds what scikit-learn's LogisticRegression finds. With two classes the
softmax is the sigmoid of the difference of the two logits, and cross-entropy is the log loss.
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import gpusoftmax


def train(images: np.ndarray, target: np.ndarray, n_classes: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of the classes, by gradient descent with momentum."""
    parameters = np.zeros((images.shape[1], n_classes)), np.zeros(n_classes)
    velocities = [np.zeros_like(parameter) for parameter in parameters]
    for step in range(steps):
        logits = images @ parameters[0] + parameters[1]
        # The gradient takes the place of the logits: no second array of that size.
        loss, dlogits = gpusoftmax.cross_entropy_with_grad(logits, target, out=logits)
        gradients = images.T @ dlogits, dlogits.sum(axis=0)
        for parameter, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
            velocity *= 0.9
            velocity -= 0.2 * gradient
            parameter += velocity
        if step % 100 == 0:
            print(f"step {step:4}: loss {loss:.4f}")
    return parameters


def accuracy(images: np.ndarray, target: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> float:
    return float((gpusoftmax.argmax(images @ weights + bias) == target).mean())


def two_classes(images: np.ndarray, is_second: np.ndarray, steps: int) -> tuple[float, float]:
    """The largest differences between two-class softmax and sigmoid, and between cross-entropy and log loss."""
    weights, bias = train(images, is_second, 2, steps)
    logits = images @ weights + bias
    difference = logits[:, 1] - logits[:, 0]
    sigmoid = 1 / (1 + np.exp(-difference))
    log_loss = np.logaddexp(0, np.where(is_second, -difference, difference))
    probs = gpusoftmax.softmax(logits)[:, 1]
    losses = gpusoftmax.cross_entropy(logits, is_second, reduction="none")
    return float(np.abs(probs - sigmoid).max()), float(np.abs(losses - log_loss).max())


def main(steps: int) -> dict[str, float]:
    images, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images / 16, digits, test_size=0.25, random_state=0)

    ours = accuracy(test_x, test_y, *train(train_x, train_y, 10, steps))
    theirs = float(LogisticRegression(max_iter=1000).fit(train_x, train_y).score(test_x, test_y))
    print(f"test accuracy: {ours:.1%}, scikit-learn {theirs:.1%}")

    chosen = (train_y == 3) | (train_y == 8)
    probs, loss = two_classes(train_x[chosen], (train_y[chosen] == 8).astype(np.int64), steps)
    print(f"3 or 8: softmax is the sigmoid to {probs:.1e}, cross-entropy the log loss to {loss:.1e}")
    return {"accuracy": ours, "scikit-learn": theirs, "sigmoid": probs, "log loss": loss}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    main(parser.parse_args().steps)
