"""gpusoftmax score: the same numbers as the library's, whatever the pieces; totals; and it fails without a trace."""

import json
import os

import numpy as np
import pytest

import gpusoftmax
from gpusoftmax import _score, cli
from tests import inputs


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def score(*arguments):
    return cli.main(["score", "logits.npy", "tokens.npy", "-o", "out.npz", *arguments])


def save(shape=(3, 5, 40), dtype=np.float32, tokens_dtype=np.int64):
    logits = inputs.make("spread", shape, dtype)
    tokens = np.random.default_rng(0).integers(0, shape[-1], shape[:-1]).astype(tokens_dtype)
    np.save("logits.npy", logits)
    np.save("tokens.npy", tokens)
    return logits, tokens


def fails(capsys, *arguments):
    """Its one line of complaint; no file has changed."""
    before = {name: os.lstat(name).st_mtime_ns for name in os.listdir()}
    assert score(*arguments) == cli.FAILED
    output, message = capsys.readouterr()
    assert output == "" and message.startswith("gpusoftmax score: ") and message.count("\n") == 1, message
    assert {name: os.lstat(name).st_mtime_ns for name in os.listdir()} == before
    return message


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 2**26])
@pytest.mark.parametrize("dtype", inputs.DTYPES, ids=str)
def test_same_bits_as_the_library_whatever_the_pieces(monkeypatch, capsys, dtype, chunk_bytes):
    monkeypatch.setattr(_score, "_CHUNK_BYTES", chunk_bytes)
    logits, tokens = save(dtype=dtype)
    tokens[1, 2] = -100
    np.save("tokens.npy", tokens)
    temperature = 0.7 if dtype == np.float32 else 1.0  # of the others, kernels that many tests use
    assert score("--top", "3", "--temperature", str(temperature)) == 0
    expected = gpusoftmax.token_logprobs(logits, tokens, temperature=temperature, return_entropy=True, return_rank=True)
    top = gpusoftmax.top_logprobs(logits, 3, temperature=temperature)
    with np.load("out.npz") as found:
        assert sorted(found) == ["entropy", "logprob", "rank", "top_logprob", "top_token"]
        for name, array in (*expected._asdict().items(), ("top_logprob", top.logprob), ("top_token", top.token)):
            if array is not None:
                assert found[name].dtype == array.dtype and found[name].shape == array.shape
                assert found[name].tobytes() == array.tobytes(), name


def test_totals(capsys):
    logits, tokens = save()
    tokens[0] = 7
    np.save("tokens.npy", tokens)
    assert score("--ignore-index", "7", "--json") == 0
    totals = json.loads(capsys.readouterr().out)
    is_scored = tokens != 7
    scores = gpusoftmax.token_logprobs(logits, tokens, return_entropy=True, return_rank=True)
    logprob = scores.logprob[is_scored].astype(np.float64)
    assert totals["tokens"] == is_scored.sum() and totals["ignored"] == (~is_scored).sum() >= 5
    assert totals["logprob"] == pytest.approx(logprob.sum(), rel=1e-12)
    assert totals["perplexity"] == pytest.approx(np.exp(-logprob.mean()), rel=1e-12)
    assert totals["mean_entropy"] == pytest.approx(scores.entropy[is_scored].astype(np.float64).mean(), rel=1e-12)
    assert totals["most_likely"] == (scores.rank[is_scored] == 1).mean()


def test_text(capsys):
    np.save("logits.npy", np.zeros((2, 4), np.float32))
    np.save("tokens.npy", np.array([0, 3], np.uint8))
    assert score() == 0
    assert capsys.readouterr().out.startswith(
        "out.npz: 2 tokens, perplexity 4 (log-probability -1.38629 each), entropy 1.38629, 100.0% the most likely, in "
    )


def test_a_token_that_cannot_be(capsys):
    """Its probability is 0: the perplexity is infinite, and JSON has no such number."""
    logits = np.zeros((2, 4), np.float32)
    logits[0, 1] = -np.inf
    np.save("logits.npy", logits)
    np.save("tokens.npy", np.array([1, 0]))
    assert score("--json") == 0
    totals = json.loads(capsys.readouterr().out)
    assert totals["perplexity"] is None and totals["logprob"] is None and totals["mean_entropy"] > 0
    assert score("--force") == 0
    assert "perplexity not a finite number" in capsys.readouterr().out


def test_nothing_to_score(capsys):
    np.save("logits.npy", np.zeros((0, 4), np.float32))
    np.save("tokens.npy", np.zeros(0, int))
    assert score() == 0
    assert "no token to score" in capsys.readouterr().out
    with np.load("out.npz") as found:
        assert found["logprob"].shape == (0,)


def test_one_token_and_integers(capsys):
    np.save("logits.npy", np.array([0, 0, 3]))
    np.save("tokens.npy", np.array(2))
    assert score() == 0
    with np.load("out.npz") as found:
        assert found["rank"].shape == () and found["rank"] == 1 and found["logprob"].dtype == np.float64


def test_big_endian_files(capsys):
    logits, tokens = save()
    np.save("logits.npy", logits.astype(">f4"))
    np.save("tokens.npy", np.asfortranarray(tokens).astype(">i2"))
    assert score() == 0
    with np.load("out.npz") as found:
        assert found["logprob"].tobytes() == gpusoftmax.token_logprobs(logits, tokens).logprob.tobytes()


def test_what_is_refused(capsys):
    logits, tokens = save()
    np.save("tokens.npy", tokens.astype(float))
    assert "tokens.npy: its elements are float64, expected integers" in fails(capsys)
    np.save("tokens.npy", tokens[:2])
    assert "tokens.npy: has the shape (2, 5), expected (3, 5) for logits (3, 5, 40)" in fails(capsys)
    tokens[2, 1] = 40
    np.save("tokens.npy", tokens)
    assert "tokens.npy: token number 11 is 40, expected 0 to 39" in fails(capsys)
    tokens[2, 1] = -1
    np.save("tokens.npy", tokens)
    assert "token number 11 is -1" in fails(capsys)
    _, tokens = save()
    assert "k is 41, expected 1 to 40" in fails(capsys, "--top", "41")
    assert "k is -1, expected 1 to 40" in fails(capsys, "--top", "-1")
    assert "temperature is 0.0, expected a finite number above 0" in fails(capsys, "--temperature", "0")
    np.save("logits.npy", np.asfortranarray(logits))
    assert "logits.npy: is in Fortran order, expected C order" in fails(capsys)
    np.save("logits.npy", np.zeros((3, 5, 0), np.float32))
    assert "expected (..., n_cols) with at least one column" in fails(capsys)
    save()
    assert score() == 0
    capsys.readouterr()
    assert "out.npz: exists (--force replaces it)" in fails(capsys)
    assert cli.main(["score", "logits.npy", "tokens.npy", "-o", "tokens.npy", "--force"]) == cli.FAILED
    assert "is the input itself" in capsys.readouterr().err


def test_an_error_midway_leaves_nothing(monkeypatch, capsys):
    save()
    monkeypatch.setattr(_score, "_CHUNK_BYTES", 1)
    calls = []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("the device is lost")
        return gpusoftmax.token_logprobs(*arguments, **options)

    monkeypatch.setattr(_score, "token_logprobs", failing)
    assert fails(capsys) == "gpusoftmax score: the device is lost\n"


def test_memory_is_that_of_a_piece(monkeypatch, capsys):
    """No call sees more rows than a piece has."""
    save((100, 40))
    monkeypatch.setattr(_score, "_CHUNK_BYTES", 7 * 40 * 4)
    seen = []

    def counting(x, *arguments, **options):
        seen.append(x.shape)
        return gpusoftmax.token_logprobs(x, *arguments, **options)

    monkeypatch.setattr(_score, "token_logprobs", counting)
    assert score() == 0
    assert seen == [(7, 40)] * 14 + [(2, 40)]
