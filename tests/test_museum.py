"""Every mutant of tests/museum.py is rejected by a check that the real library passes."""

import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import gpusoftmax
from tests import museum


@functools.cache
def passes(check):
    """The real library passes; asked once for all mutants that the check is for."""
    check(gpusoftmax)
    return True


# Not in the default run until the mutants of formulas.py that the CPU no longer goes through have edits of their own.
@pytest.mark.matrix
@pytest.mark.parametrize("mutant", museum.MUTANTS, ids=lambda mutant: mutant.name)
def test_is_rejected(mutant):
    assert passes(mutant.check)
    with (
        museum.mutated(*mutant.edits, compiles=mutant.compiles) as library,
        pytest.raises(mutant.raises, match=mutant.says),
    ):
        mutant.check(library)


def test_every_edit_fits():
    """All that have to follow a change of the library, at once."""
    edits = [edit for mutant in museum.MUTANTS for edit in mutant.edits]
    stale = [edit for edit in edits if _source(edit.module).count(edit.old) != 1]
    assert not stale, stale


def _source(module):
    return Path(importlib.util.find_spec(module).origin).read_text()


def test_every_kind_is_on_show():
    assert {mutant.kind for mutant in museum.MUTANTS} == museum.KINDS.keys()


def test_a_mutant_leaves_nothing_behind(tmp_path, monkeypatch):
    """Neither among the modules nor on disk, on the CPU and on the GPU."""
    monkeypatch.setenv("GPUSOFTMAX_CACHE_DIR", str(tmp_path))
    modules = _modules()
    for name in ("padding counted", "additions that the assembler may contract"):
        mutant = next(mutant for mutant in museum.MUTANTS if mutant.name == name)
        with museum.mutated(*mutant.edits, compiles=mutant.compiles) as library, pytest.raises(AssertionError):
            mutant.check(library)
        assert library is not gpusoftmax
    assert _modules() == modules
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _modules():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "gpusoftmax"}


def test_an_edit_that_does_not_fit_is_an_error():
    with (
        pytest.raises(AssertionError, match="0 times"),
        museum.mutated(museum.Edit("gpusoftmax.kernels.formulas", "no such words", "")) as library,
    ):
        library.logsumexp(np.zeros(2))
    with (
        pytest.raises(AssertionError, match="never imported"),
        museum.mutated(museum.Edit("gpusoftmax.kernels.cuda.plan", "WARP_SIZE = 32", "WARP_SIZE = 64")),
    ):
        pass
