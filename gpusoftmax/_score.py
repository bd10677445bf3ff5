"""Log-probability, entropy and rank of every token of a text, from a .npy file of logits that may be larger than the
memory.

LOGITS.npy has the shape (..., n_cols), TOKENS.npy the shape (...), of integers. The result is a .npz archive with one
number per token: logprob and entropy (nats) and rank (1: the most likely token); with --top the most likely tokens of
each place, top_token and top_logprob. It appears under its name complete or not at all.
"""

import argparse
import io
import json
import math
import time
from typing import Any

import numpy as np

from gpusoftmax import _arrays, _checks, _info, _npy, token_logprobs, top_logprobs
from gpusoftmax._new_file import check_output, check_space, new_file
from gpusoftmax._progress import Progress, size_text

HELP = "log-probabilities, entropies, ranks and perplexity of tokens, from a .npy file of logits of any size"
_CHUNK_BYTES = 64 * 2**20
"""For a piece of the logits, unless a single row needs more."""
_ARCHIVE_BYTES = 4096
"""What an .npz archive needs beside its arrays, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logits", metavar="LOGITS.npy")
    parser.add_argument("tokens", metavar="TOKENS.npy")
    parser.add_argument("-o", "--output", metavar="OUT.npz", required=True)
    parser.add_argument("--top", type=int, default=0, metavar="K", help="the K most likely tokens too")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    parser.add_argument(
        "--ignore-index", type=int, default=-100, metavar="TOKEN", help="a token that is not scored (default: -100)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--force", action="store_true", help="replace OUT.npz if it exists")
    parser.add_argument("--json", action="store_true", help="print the totals as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    with _npy.open_input(arguments.logits) as file, _npy.open_input(arguments.tokens) as tokens_file:
        source, tokens = _npy.read_header(file), _read_tokens(tokens_file)
        _check_shapes(arguments, source, tokens)
        results = _empty_results(arguments, source, tokens)
        check_output(arguments.output, [file, tokens_file], arguments.force)
        check_space(arguments.output, sum(array.nbytes for array in results.values()) + _ARCHIVE_BYTES)
        _score(arguments, file, source, tokens.reshape(-1), results, start)
        shaped = {name: array.reshape((*tokens.shape, *array.shape[1:])) for name, array in results.items()}
        with new_file(arguments.output, arguments.force) as target:
            writer = io.BufferedWriter(target)
            np.savez(writer, **shaped)
            writer.flush()
            writer.detach()
    totals = _totals(results, tokens.reshape(-1) != arguments.ignore_index)
    if arguments.json:
        print(json.dumps({**totals, "seconds": time.monotonic() - start}))
    else:
        print(f"{arguments.output}: {_text(totals)}, in {time.monotonic() - start:.1f} s")


def _read_tokens(file: io.FileIO) -> np.ndarray:
    source = _npy.read_header(file)
    if source.dtype.name not in _checks.INTEGERS:
        raise ValueError(f"{file.name}: its elements are {source.dtype.name}, expected integers")
    tokens = np.empty(source.size, source.dtype)
    _npy.read(file, source.offset, memoryview(tokens.view(np.uint8)))
    tokens = tokens.reshape(source.shape, order="F" if source.fortran_order else "C")
    return np.asarray(tokens, source.dtype.newbyteorder("="), order="C")


def _check_shapes(arguments: argparse.Namespace, source: _npy.Source, tokens: np.ndarray) -> None:
    name = arguments.logits
    if not source.shape or not source.shape[-1]:
        raise ValueError(f"{name}: has the shape {source.shape}, expected (..., n_cols) with at least one column")
    if source.fortran_order and len(source.shape) > 1:
        raise ValueError(f"{name}: is in Fortran order, expected C order, in which the logits of a token lie together")
    if tokens.shape != source.shape[:-1]:
        raise ValueError(
            f"{arguments.tokens}: has the shape {tokens.shape}, expected {source.shape[:-1]} for logits {source.shape}"
        )
    n_cols = source.shape[-1]
    bad = np.flatnonzero(((tokens < 0) | (tokens >= n_cols)) & (tokens != arguments.ignore_index))
    if bad.size:
        token = tokens.reshape(-1)[bad[0]]
        raise ValueError(f"{arguments.tokens}: token number {bad[0]} is {token}, expected 0 to {n_cols - 1}")
    if arguments.top:
        _checks.token_count(arguments.top, n_cols)


def _empty_results(arguments: argparse.Namespace, source: _npy.Source, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays for the archive: what a row gives is a few numbers, and kept in memory until all of them are there."""
    n_rows = tokens.size
    dtype = np.float64 if source.dtype == np.float64 or source.dtype.name not in _checks.FLOATING else np.float32
    results = {"logprob": np.empty(n_rows, dtype), "entropy": np.empty(n_rows, dtype), "rank": np.empty(n_rows, int)}
    if arguments.top:
        results["top_logprob"] = np.empty((n_rows, arguments.top), dtype)
        results["top_token"] = np.empty((n_rows, arguments.top), int)
    return results


def _score(arguments, file, source, tokens, results, start) -> None:
    """Fills the results, piece by piece."""
    temperature = _checks.temperature(arguments.temperature)
    device, _ = _info.choose_device(arguments.device)
    library = _arrays.array_module(device)
    n_cols = source.shape[-1]
    row_bytes = n_cols * source.dtype.itemsize
    n_rows = max(_CHUNK_BYTES // row_bytes, 1)
    with Progress("score", tokens.size) as progress:
        for first in range(0, tokens.size, n_rows):
            rows = slice(first, min(first + n_rows, tokens.size))
            logits = np.empty((rows.stop - first, n_cols), source.dtype)
            _npy.read(file, source.offset + first * row_bytes, memoryview(logits.reshape(-1).view(np.uint8)))
            if not logits.dtype.isnative:
                logits = logits.byteswap(inplace=True).view(logits.dtype.newbyteorder("="))
            x, given = library.asarray(logits), library.asarray(tokens[rows])
            options = {"temperature": temperature, "ignore_index": arguments.ignore_index}
            found = token_logprobs(x, given, return_entropy=True, return_rank=True, **options)._asdict()
            if arguments.top:
                found["top_logprob"], found["top_token"] = top_logprobs(x, arguments.top, temperature=temperature)
            for name, array in results.items():
                array[rows] = found[name] if library is np else found[name].get()
            progress.update(rows.stop, f"{size_text(rows.stop * row_bytes / (time.monotonic() - start))}/s")


def _totals(results: dict[str, np.ndarray], is_scored: np.ndarray) -> dict[str, Any]:
    """Of the tokens that are scored. Logarithms in nats; None where there is no such number."""
    count = int(is_scored.sum())
    logprob = float(results["logprob"].sum(where=is_scored, dtype=np.float64))
    mean = logprob / count if count else math.nan
    with np.errstate(over="ignore"):
        totals = {
            "logprob": logprob,
            "mean_logprob": mean,
            "perplexity": float(np.exp(-mean)),
            "mean_entropy": float(results["entropy"].sum(where=is_scored, dtype=np.float64)) / count
            if count
            else math.nan,
            "most_likely": int((results["rank"] == 1).sum(where=is_scored)) / count if count else math.nan,
        }
    finite = {name: value if math.isfinite(value) else None for name, value in totals.items()}
    return {"tokens": count, "ignored": int(is_scored.size) - count, **finite}


def _text(totals: dict[str, Any]) -> str:
    def number(name: str, format: str) -> str:
        return "not a finite number" if totals[name] is None else f"{totals[name]:{format}}"

    if not totals["tokens"]:
        return "no token to score"
    return (
        f"{totals['tokens']} tokens, perplexity {number('perplexity', '.6g')} "
        f"(log-probability {number('mean_logprob', '.5f')} each), entropy {number('mean_entropy', '.5f')}, "
        f"{number('most_likely', '.1%')} the most likely"
    )
