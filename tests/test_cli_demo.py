"""gpusoftmax demo: a model that learns, on a small scale; and the progress bar."""

import io
import json
import math

import numpy as np
import pytest

from gpusoftmax import _demo, _info, _progress, cli


@pytest.fixture(scope="module")
def report():
    """What `gpusoftmax demo --steps 30 --vocab 2048 --json` prints, on a part of the corpus."""
    patch = pytest.MonkeyPatch()
    stdout = io.StringIO()
    patch.setattr(_demo, "_CORPUS_BYTES", 600_000)
    patch.setattr("sys.stdout", stdout)
    try:
        assert cli.main(["demo", "--device", "cpu", "--steps", "30", "--vocab", "2048", "--json"]) == 0
    finally:
        patch.undo()
    return json.loads(stdout.getvalue())  # one JSON object and nothing else


def test_perplexity_falls(report):
    assert report["steps"] == len(report["losses"]) == 30
    assert report["first_perplexity"] == pytest.approx(2048, rel=0.05)  # at first all tokens are alike
    assert report["last_perplexity"] < 1000 and report["held_out_perplexity"] < 500
    assert math.exp(report["losses"][0]) == pytest.approx(report["first_perplexity"], rel=1e-4)


def test_predictions_are_probabilities(report):
    assert report["predictions"]
    for prediction in report["predictions"]:
        assert len(prediction["context"]) == 3 and isinstance(prediction["next"], str)
        probabilities = [probability for _, probability in prediction["likeliest"]]
        assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1


def test_the_rest_of_the_report(report):
    assert report["device"] == "cpu" and report["vocab"] == 2048
    times = report["times"]
    assert times["baseline"] == "NumPy" and min(times["gpusoftmax_ms"], times["baseline_ms"]) > 0
    assert report["speedup"] == times["baseline_ms"] / times["gpusoftmax_ms"]
    assert times["largest_difference"] < 1e-6  # of gradients up to 1 / 256
    assert report["corpus"]["files"] > 10 and report["versions"]["numpy"] == np.__version__


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 40 small files."""
    for number in range(40):
        (tmp_path / f"module{number:02}.py").write_text(f"def f{number}(x):\n    return self.x + {number}\n\n\n" * 20)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "ignored.py").write_text("ignored = 1")
    (tmp_path / "latin.py").write_bytes(b"name = '\xe9'")
    monkeypatch.setattr(_demo.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_text_output_and_a_corpus_with_few_tokens(library, capsys):
    assert cli.main(["demo", "--device", "cpu", "--steps", "3"]) == 0
    output, errors = capsys.readouterr()
    assert "Running on the CPU.\n" in output
    assert "Corpus: 41 files of" in output and "after 3 steps" in output and "times as fast" in output
    assert errors == "gpusoftmax demo: the corpus has only 92 different tokens\n"


def test_the_corpus(library):
    corpus = _demo.read_corpus(20)
    assert len(corpus.words) == 20 and corpus.words[0] == "<unk>"
    assert "ignored" not in corpus.words and "\n    " in corpus.words
    for tokens in (corpus.training, corpus.held_out):
        assert tokens.dtype == np.int64 and tokens.min() >= 0 and tokens.max() < 20
    assert list(_demo.contexts_at(np.arange(10), np.array([3, 9]))[1]) == [8, 7, 6]


def test_no_python_sources(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_demo.sysconfig, "get_path", lambda name: str(tmp_path))
    assert cli.main(["demo", "--device", "cpu", "--json"]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and "has too few Python source files (0)" in errors


def test_gradients_are_those_of_the_loss():
    """Along each gradient the loss rises as it says: central differences."""
    random = np.random.default_rng(0)
    model = _demo.Model(np, 50)
    context, target = random.integers(0, 50, (64, _demo._CONTEXT)), random.integers(0, 50, 64)
    _, gradients = model.gradients(context, target)
    for parameter, gradient in zip(model.parameters, gradients, strict=True):
        slope = float(np.linalg.norm(gradient))
        step = (0.05 / slope * gradient).astype(np.float32)
        rise = 0.0
        for sign in (1, -1):
            parameter += sign * step
            rise += sign * float(model.gradients(context, target)[0])
            parameter -= sign * step
        assert rise / 0.1 == pytest.approx(slope, rel=0.02)


def test_training_stops_when_the_time_is_up(library, monkeypatch):
    monkeypatch.setattr(_demo, "_TRAINING_SECONDS", -1)
    corpus = _demo.read_corpus(20)
    assert len(_demo.train(_demo.Model(np, 20), corpus.training, None)) == 1
    assert len(_demo.train(_demo.Model(np, 20), corpus.training, 4)) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "'0' is not a whole number above 0"),
        (["--vocab", "-1"], "'-1' is not a whole number above 0"),
        (["--steps", "x"], "'x' is not a whole number above 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    assert cli.main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_without_a_gpu_the_cpu_is_chosen_and_said_why(monkeypatch):
    path = {"device": "cpu", "why": "there is no driver", "fix": "install one"}
    monkeypatch.setattr(_info, "gather", lambda for_path_only: {"path": path})
    assert _info.choose_device(None) == ("cpu", "there is no driver")
    assert _info.choose_device("cpu") == ("cpu", "")
    with pytest.raises(ValueError, match="device cuda cannot be used: there is no driver; install one"):
        _info.choose_device("cuda")
    monkeypatch.setattr(_info, "gather", lambda for_path_only: {"path": {"device": "cuda"}})
    assert _info.choose_device(None) == _info.choose_device("cuda") == ("cuda", "")


# ---------------------------------------------------------------- the progress bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "79")
    return now


def test_a_terminal_shows_one_line_that_is_redrawn(clock):
    stream = Terminal()
    with _progress.Progress("training", 100, stream) as progress:
        for done in (0, 25, 26, 50, 100):
            progress.update(done, f"at {done}")
            clock[0] += 0.06 if done == 25 else 1.0
    frames = stream.getvalue().split("\r")
    assert [frame.strip() for frame in frames] == [
        "",
        "training [........................]    0%  at 0",
        "training [######..................]   25%  at 25",
        "training [############............]   50%  at 50  2 s left",
        "training [########################]  100%  at 100",
    ]
    assert stream.getvalue().endswith("\n") and stream.getvalue().count("\n") == 1


def test_a_log_gets_a_line_every_few_seconds(clock):
    stream = io.StringIO()
    with _progress.Progress("training", 100, stream) as progress:
        for done in range(101):
            progress.update(done)
            clock[0] += 0.2
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["25%", "50%", "75%", "100%"]


def test_a_narrow_terminal_is_not_wrapped(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with _progress.Progress("training", 10, stream) as progress:
        progress.update(5, "a long note")
    assert max(map(len, stream.getvalue().strip().split("\r"))) < 20


def test_a_stream_that_is_closed_or_missing(monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr("sys.stderr", None)
    for given in (stream, None):
        with _progress.Progress("training", 10, given) as progress:
            progress.update(10)
