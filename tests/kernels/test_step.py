"""The kernels of a decode step without a GPU: interpreted."""

import pytest

from tests.kernels.processes import interpreted

pytest.importorskip("triton", reason="kernels need triton")


@pytest.mark.full
def test_the_kernels_are_the_eager_ops() -> None:
    done = interpreted("interpret_step.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 94
    for name, error, limit in rows:
        assert float(error) <= float(limit), name
