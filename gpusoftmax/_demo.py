"""Train a small language model on the source code of Python's standard library, found on this machine.

From the last few tokens the model predicts the next one out of a vocabulary of 32,768: the logits over the whole
vocabulary are nearly all of its arithmetic, as they are in training and scoring large models. Loss and gradient come
from cross_entropy_with_grad, the score on files held out from training from log_softmax, the predictions from softmax.
"""

import argparse
import json
import math
import platform
import re
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpusoftmax
from gpusoftmax import _arrays, _info, cross_entropy_with_grad, log_softmax, softmax
from gpusoftmax._progress import Progress

HELP = "train a small language model on this machine's Python sources"
_CORPUS_BYTES = 8_000_000
"""Enough for 32,768 different tokens, and read in a few seconds."""
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_TOKEN = re.compile(r"\n[ \t]*|[^\W\d]\w*|\d\w*|\*\*|//|->|[-+*/=<>!]=|[^\w\s]")
"""A line break with the indentation after it, a name, a number, or an operator. Other blanks are not kept."""
_UNKNOWN = "<unk>"
_HELD_OUT = 16
"""Every so many-th file is not trained on."""

_CONTEXT = 3
_WIDTH = 32
_BATCH = 256
_LEARNING_RATE = 0.1
_SEED = 0
_STEPS = 250
_TRAINING_SECONDS = 20
"""The demonstration is to take less than a minute on two slow or busy cores too."""
_HELD_OUT_BATCHES = 16
_EXAMPLES_AFTER = ("raise", "return", "is", "self", "(")
_TIMINGS = 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if it can be used")
    parser.add_argument(
        "--steps", type=_positive, help=f"of training (default: {_STEPS}, or what {_TRAINING_SECONDS} seconds allow)"
    )
    parser.add_argument("--vocab", type=_positive, default=32768, help="how many tokens to tell apart (default: 32768)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def run(arguments: argparse.Namespace) -> None:
    report = demonstrate(arguments, say=_silent if arguments.json else _print)
    if arguments.json:
        print(json.dumps(report))


def _print(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    pass


def demonstrate(arguments: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole demonstration: `say` is told the results as they come; they are returned too."""
    start = time.monotonic()
    device, why_not_cuda = _info.choose_device(arguments.device)
    xp = _arrays.array_module(device)
    say(f"Running on {_device_name(xp)}{f': {why_not_cuda}' if why_not_cuda else ''}.")

    corpus = read_corpus(arguments.vocab)
    n_vocab = len(corpus.words)
    if n_vocab < arguments.vocab:
        print(f"gpusoftmax demo: the corpus has only {n_vocab:,} different tokens", file=sys.stderr)
    say(
        f"Corpus: {corpus.files} files of {corpus.directory}, {len(corpus.training):,} tokens to train on, "
        f"{len(corpus.held_out):,} held out; {n_vocab:,} different ones are told apart."
    )

    model = Model(xp, n_vocab)
    losses = train(model, corpus.training, arguments.steps)
    first, last = _perplexity(losses[:1]), _perplexity(losses[-20:])
    held_out = held_out_perplexity(model, corpus.held_out)
    say(f"Perplexity: {first:,.0f} at first, {last:,.0f} after {len(losses)} steps, {held_out:,.0f} on held-out files.")

    examples = predictions(model, corpus)
    say("Likeliest next tokens in held-out files:")
    for example in examples:
        likeliest = ", ".join(f"{token!r} {probability:.0%}" for token, probability in example["likeliest"])
        say(f"  {' '.join(example['context'])!r} -> {likeliest}; it was {example['next']!r}")

    times = compare_times(model, corpus.training)
    say(
        f"Loss and gradient of {_BATCH} x {n_vocab:,} logits: {times['gpusoftmax_ms']:.1f} ms, in plain "
        f"{times['baseline']} {times['baseline_ms']:.1f} ms: {times['speedup']:.1f} times as fast."
    )
    seconds = time.monotonic() - start
    say(f"Took {seconds:.0f} s.")
    return {
        "device": device,
        "device_name": _device_name(xp),
        "why_not_cuda": why_not_cuda or None,
        "steps": len(losses),
        "batch": _BATCH,
        "vocab": n_vocab,
        "corpus": {
            "directory": corpus.directory,
            "files": corpus.files,
            "training_tokens": len(corpus.training),
            "held_out_tokens": len(corpus.held_out),
        },
        "losses": [round(loss, 6) for loss in losses],
        "first_perplexity": first,
        "last_perplexity": last,
        "held_out_perplexity": held_out,
        "predictions": examples,
        "times": times,
        "speedup": times["speedup"],
        "seconds": seconds,
        "versions": {
            "gpusoftmax": gpusoftmax.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            **({} if xp is np else {xp.__name__: xp.__version__}),
        },
    }


def _device_name(xp) -> str:
    if xp is np:
        return "the CPU"
    return xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)["name"].decode()


# ---------------------------------------------------------------- the corpus


class Corpus(NamedTuple):
    directory: str
    files: int
    words: list[str]
    """The vocabulary: _UNKNOWN, then the most frequent tokens of the training files."""
    training: np.ndarray
    held_out: np.ndarray
    """Tokens as their places in `words`, int64."""


def read_corpus(n_vocab: int) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))
    training: list[list[str]] = []
    held_out: list[list[str]] = []
    done = 0
    with Progress("reading", _CORPUS_BYTES) as progress:
        for number, path in enumerate(paths):
            try:
                text = path.read_text("utf-8", errors="replace")
            except OSError:
                continue
            tokens = _TOKEN.findall(re.sub(r"\n\s*\n", "\n", text))
            (held_out if number % _HELD_OUT == _HELD_OUT - 1 else training).append(tokens)
            done += len(text)
            progress.update(done)
            if done >= _CORPUS_BYTES:
                break
    if len(training) < 2 or not held_out:
        raise ValueError(f"{root} has too few Python source files ({len(paths)}) for this demonstration")
    counts = Counter(token for tokens in training for token in tokens)
    words = [_UNKNOWN, *(token for token, _ in counts.most_common(n_vocab - 1))]
    places = {word: place for place, word in enumerate(words)}

    def encoded(files: list[list[str]]) -> np.ndarray:
        return np.array([places.get(token, 0) for tokens in files for token in tokens], np.int64)

    return Corpus(str(root), len(training) + len(held_out), words, encoded(training), encoded(held_out))


def contexts_at(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The tokens before each position, the nearest first: shape (len(positions), _CONTEXT)."""
    return tokens[positions[:, None] - np.arange(1, _CONTEXT + 1)]


# ---------------------------------------------------------------- the model


class Model:
    """hidden = tanh([e(c1) ... e(ck)] mix), logits = hidden embedding^T + bias, for the k tokens c before the next.

    The rows e of `embedding` (n_vocab, width) serve both ends: Press and Wolf, arXiv:1608.05859.
    """

    def __init__(self, xp, n_vocab: int):
        random = np.random.default_rng(_SEED)
        self.xp = xp
        self.embedding = xp.asarray(0.05 * random.standard_normal((n_vocab, _WIDTH), np.float32))
        self.bias = xp.zeros(n_vocab, np.float32)
        scale = 1 / math.sqrt(_CONTEXT * _WIDTH)
        self.mix = xp.asarray(scale * random.standard_normal((_CONTEXT * _WIDTH, _WIDTH), np.float32))
        self.parameters = (self.embedding, self.bias, self.mix)
        self.squares = [xp.zeros_like(parameter) for parameter in self.parameters]
        self.buffer = xp.empty((_BATCH, n_vocab), np.float32)

    def logits(self, context) -> Any:
        """The logits of one batch, in a buffer that the next call overwrites."""
        self.inputs = self.embedding[context].reshape(len(context), -1)
        self.hidden = self.xp.tanh(self.inputs @ self.mix)
        logits = self.buffer[: len(context)]
        self.xp.matmul(self.hidden, self.embedding.T, out=logits)
        logits += self.bias
        return logits

    def gradients(self, context, target) -> tuple[Any, tuple]:
        """The loss of a batch and its gradient with respect to each of the parameters."""
        logits = self.logits(context)
        loss, dlogits = cross_entropy_with_grad(logits, target, out=logits)
        dsum = (dlogits @ self.embedding) * (1 - self.hidden**2)
        dembedding = dlogits.T @ self.hidden
        dinputs = (dsum @ self.mix.T).reshape(-1, _WIDTH)
        self.xp.add.at(dembedding, context.reshape(-1), dinputs)
        return loss, (dembedding, dlogits.sum(axis=0), self.inputs.T @ dsum)

    def step(self, context, target) -> float:
        """One step of training on a batch; the loss before it."""
        loss, gradients = self.gradients(context, target)
        # Adagrad (Duchi, Hazan and Singer 2011): rare tokens keep a high rate.
        for parameter, square, gradient in zip(self.parameters, self.squares, gradients, strict=True):
            square += gradient * gradient
            parameter -= _LEARNING_RATE * gradient / (self.xp.sqrt(square) + 1e-8)
        return float(loss)


def _perplexity(losses: list[float]) -> float:
    return math.exp(min(statistics.fmean(losses), 700.0))


def _batch(model: Model, tokens: np.ndarray, positions: np.ndarray):
    """(context, target) on the model's device."""
    return model.xp.asarray(contexts_at(tokens, positions)), model.xp.asarray(tokens[positions])


def train(model: Model, tokens: np.ndarray, steps: int | None) -> list[float]:
    """The loss of every step. Without a number of steps there are _STEPS, fewer if the time is up before."""
    random = np.random.default_rng(_SEED)
    losses: list[float] = []
    deadline = math.inf
    with Progress("training", steps or _STEPS) as progress:
        progress.update(0, "compiling, the first time")
        while len(losses) < (steps or _STEPS) and (time.monotonic() < deadline or steps):
            losses.append(model.step(*_batch(model, tokens, random.integers(_CONTEXT, len(tokens), _BATCH))))
            deadline = min(deadline, time.monotonic() + _TRAINING_SECONDS)  # from the end of the first step
            progress.update(len(losses), f"perplexity {_perplexity(losses[-20:]):,.0f}")
    return losses


def held_out_perplexity(model: Model, tokens: np.ndarray) -> float:
    """exp of the mean negative log-probability of tokens spread evenly over the held-out files."""
    wanted = min(_HELD_OUT_BATCHES * _BATCH, len(tokens) - _CONTEXT)
    positions = np.linspace(_CONTEXT, len(tokens) - 1, wanted).astype(np.int64)
    total = 0.0
    for first in range(0, wanted, _BATCH):
        context, target = _batch(model, tokens, positions[first : first + _BATCH])
        logits = model.logits(context)
        log_probs = log_softmax(logits, out=logits)
        total -= float(log_probs[model.xp.arange(len(target)), target].sum())
    return _perplexity([total / wanted])


def predictions(model: Model, corpus: Corpus) -> list[dict]:
    """The five likeliest tokens after contexts from the held-out files, and the token that came."""
    tokens = corpus.held_out
    contexts = contexts_at(tokens, np.arange(_CONTEXT, len(tokens)))
    known = (contexts > 0).all(axis=1)
    found = []
    for word in _EXAMPLES_AFTER:
        ends = contexts[:, 0] == corpus.words.index(word) if word in corpus.words else False
        matches = np.flatnonzero(known & ends)
        found += [matches[len(matches) // 2] + _CONTEXT] if len(matches) else []
    positions = np.array(found or [len(tokens) // 2])
    context, _ = _batch(model, tokens, positions)
    logits = model.logits(context)
    probs = softmax(logits, out=logits)
    order = model.xp.argsort(-probs, axis=1)[:, :5]
    likeliest = zip(order.tolist(), model.xp.take_along_axis(probs, order, axis=1).tolist(), strict=True)
    return [
        {
            "context": [corpus.words[place] for place in tokens[position - _CONTEXT : position]],
            "next": corpus.words[tokens[position]],
            "likeliest": [[corpus.words[place], p] for place, p in zip(*row, strict=True)],
        }
        for position, row in zip(positions, likeliest, strict=True)
    ]


# ---------------------------------------------------------------- against plain NumPy


def plain_cross_entropy_with_grad(xp, logits, target) -> tuple[Any, Any]:
    """What one writes without this library, in NumPy (or CuPy) and the dtype of the logits."""
    rows = xp.arange(len(target))
    shifted = logits - logits.max(axis=1, keepdims=True)
    exp = xp.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    loss = (xp.log(total[:, 0]) - shifted[rows, target]).mean()
    dlogits = exp / total
    dlogits[rows, target] -= 1
    dlogits /= len(target)
    return loss, dlogits


def compare_times(model: Model, tokens: np.ndarray) -> dict[str, Any]:
    """Loss and gradient of one batch, by the library and in plain array code: medians of alternating calls."""
    xp = model.xp
    context, target = _batch(model, tokens, np.arange(_CONTEXT, _CONTEXT + _BATCH))
    logits = model.logits(context)

    def ours():
        return cross_entropy_with_grad(logits, target)  # a new gradient array, as the other makes

    def plain():
        return plain_cross_entropy_with_grad(xp, logits, target)

    seconds: dict[Callable, list[float]] = {ours: [], plain: []}
    for _ in range(_TIMINGS):
        for call, times in seconds.items():
            start = time.perf_counter()
            loss, dlogits = call()
            float(loss + dlogits[-1, -1])  # waits for the GPU
            times.append(time.perf_counter() - start)
    gap = float(abs(ours()[1] - plain()[1]).max())
    mine, other = (1e3 * statistics.median(times) for times in seconds.values())
    return {
        "gpusoftmax_ms": mine,
        "baseline_ms": other,
        "baseline": "NumPy" if xp is np else "CuPy",
        "speedup": other / mine,
        "largest_difference": gap,
    }
