"""The MoE kernels for few tokens without a GPU: interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moec.spec.errors import MoecError

pytest.importorskip("triton", reason="kernels need triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_kernels_are_the_eager_op() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret.py")],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 4
    for experts, tokens, error, repeats in rows:
        assert float(error) < 2e-2, (experts, tokens)  # as in step_cases.limit
        assert repeats == "True"


@pytest.mark.parametrize(
    ("sizes", "tokens", "named"),
    [((80, 128, 4), 1, "dim"), ((256, 80, 4), 1, "hidden"), ((256, 256, 4), 65, "tokens"),
     ((256, 256, 4), 0, "tokens")],
)  # fmt: skip
def test_sizes_that_the_tiles_do_not_divide_are_refused(
    sizes: tuple[int, int, int], tokens: int, named: str
) -> None:
    from moec.kernels.launches.decode import decode_moe
    from moec.kernels.sizes import Sizes

    with pytest.raises(MoecError, match=f"decode_moe: {named}"):
        decode_moe(Sizes(*sizes), tokens)
