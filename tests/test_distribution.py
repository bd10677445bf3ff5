"""What is in a source distribution."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def test_a_source_distribution_is_whole(tmp_path):
    """setuptools by itself adds tests/test_*.py, without what they import and read."""
    copy, made = tmp_path / "copy", tmp_path / "made"
    shutil.copytree(
        ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    )
    subprocess.run([sys.executable, "-c", BUILD, str(made)], cwd=copy, check=True, capture_output=True)
    (archive,) = made.iterdir()
    with tarfile.open(archive) as opened:
        found = {name.partition("/")[2] for name in opened.getnames()}
    folders = "gpusoftmax", "kernels", "tests", "benchmarks", "examples"
    paths = [*copy.glob("*.md"), *(path for folder in folders for path in (copy / folder).rglob("*"))]
    expected = {path.relative_to(copy).as_posix() for path in paths if path.is_file()}
    assert {"README.md", "tests/oracle.py", "tests/driver/stub.c", "kernels/README.md"} <= expected
    assert expected <= found, sorted(expected - found)
