"""The MoE kernels for few tokens without a GPU: interpreted."""

import pytest

from moec.spec.errors import MoecError
from tests.kernels.processes import interpreted

pytest.importorskip("triton", reason="kernels need triton")


@pytest.mark.full
def test_the_kernels_are_the_eager_op() -> None:
    done = interpreted("interpret.py")
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
