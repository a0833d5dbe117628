"""The kernels that add up what ranks computed in prefill, in Triton's interpreter.

Those for few tokens wait for words of other GPUs in inline PTX: `tests/gpu/sums.py` runs them.
"""

import pytest

from tests.kernels.processes import interpreted

pytest.importorskip("triton", reason="kernels need triton")


@pytest.mark.full
def test_sums_in_prefill_are_right_on_all_ranks() -> None:
    done = interpreted("interpret_peers.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["right"] * (2 + 2 + 4 + 4)
