"""The example that trains with torch: replacing torch's cross_entropy changes nothing but the time."""

import pytest

from gpusoftmax import _demo
from tests.test_examples import load

pytest.importorskip("gpusoftmax.torch")


def test_torch_training(monkeypatch, capsys):
    monkeypatch.setattr(_demo, "_CORPUS_BYTES", 600_000)
    results = load("torch_training").main(steps=60, n_vocab=2048, batch=128)
    assert results["first loss"] == pytest.approx(7.7, abs=0.2)  # log 2048: at first all tokens are alike
    assert results["last loss"] < results["first loss"] - 1
    assert results["apart"] < 1e-4 and results["speedup"] > 0
    assert "step   48: loss" in capsys.readouterr().out
