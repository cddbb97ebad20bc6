"""Run the tests of ``tests/interpreted``, each file in a process of its own.

Triton decides at import whether it interprets or compiles, and the rest of the tests compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="this torch comes without Triton")

HERE = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in HERE.glob("test_*.py"))
SLOW = [name for name in FILES if "mark.slow" in (HERE / name).read_text()]


def run(name, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", marks, HERE / name]
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    for variable in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[variable]
    done = subprocess.run(
        command,
        cwd=HERE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # Deselected ones were collected: a file that the interpreter does not reach has none.
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and " deselected" in done.stdout:
        pytest.skip(f"no test of it is {marks!r}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_files():
    assert "test_conv.py" in FILES
    assert SLOW


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name):
    run(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_interpreted_at_length(name):
    run(name, "slow")
