"""The programs in examples/, on a small scale: what they say of themselves is so."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from gpusoftmax import _demo

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    """The example as a module: they are programs in no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_softmax_classifier(capsys):
    results = load("softmax_classifier").main(steps=300)
    assert abs(results["accuracy"] - results["scikit-learn"]) <= 0.01
    assert results["sigmoid"] < 1e-15 and results["log loss"] < 1e-15
    assert "step  200: loss 0." in capsys.readouterr().out


def test_language_model(monkeypatch):
    monkeypatch.setattr(_demo, "_CORPUS_BYTES", 600_000)
    results = load("language_model").main(steps=30, n_vocab=2048, batch=256, chunk_size=16)
    assert results["first loss"] == pytest.approx(7.62, abs=0.05)  # log 2048: at first all tokens are alike
    assert results["last loss"] < 6
    logits = 256 * 2048 * 4 / 2**20
    assert logits < results["MiB with all logits"] < 1.5 * logits and results["MiB"] < 0.4 * logits


def test_chunks_of_the_language_model_change_nothing():
    model, random = load("language_model"), np.random.default_rng(0)
    batch = random.integers(0, 500, (64, model.CONTEXT)), random.integers(0, 500, 64)
    parameters = model.new_parameters(500)
    loss, gradients = model.loss_and_gradients(parameters, *batch, chunk_size=64)
    in_chunks, gradients_in_chunks = model.loss_and_gradients(parameters, *batch, chunk_size=5)
    assert in_chunks == pytest.approx(loss, rel=1e-6)
    for one, other in zip(gradients, gradients_in_chunks, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[!t]*.py")), ids=lambda path: path.stem)
def test_help_is_the_beginning_of_the_file(path, monkeypatch, capsys):
    """And nothing runs before it has been asked for."""
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    first = path.read_text().removeprefix('"""').splitlines()[0]
    assert first in capsys.readouterr().out
