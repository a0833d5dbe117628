"""The kernels of a decode step without a GPU: interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_kernels_are_the_eager_ops() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret_step.py")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 67
    for name, error, limit in rows:
        assert float(error) <= float(limit), name
