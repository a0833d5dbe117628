"""The MoE kernels for many tokens without a GPU: interpreted."""

import pytest

from moec.spec.errors import MoecError
from tests.kernels.processes import interpreted

pytest.importorskip("triton", reason="kernels need triton")


@pytest.mark.full
def test_the_kernels_are_the_eager_op() -> None:
    done = interpreted("interpret_prefill.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 3
    for experts, tokens, cut, error, repeats in rows:
        assert float(error) < 1e-2, (experts, tokens, cut)
        assert repeats == "True"


@pytest.mark.parametrize(
    ("sizes", "tokens", "named"),
    [((192, 1024, 4), 9, "dim"), ((1024, 100, 4), 9, "hidden"), ((1024, 1024, 4), 0, "tokens")],
)
def test_sizes_that_the_tiles_do_not_divide_are_refused(
    sizes: tuple[int, int, int], tokens: int, named: str
) -> None:
    from moec.kernels.launches.prefill import prefill_moe
    from moec.kernels.sizes import Sizes

    with pytest.raises(MoecError, match=f"prefill_moe: {named}"):
        prefill_moe(Sizes(*sizes), tokens)


@pytest.mark.parametrize("experts", [1, 4, 16])
@pytest.mark.parametrize("tokens", [1, 65, 128, 129, 4096])
def test_scratch_is_enough_for_the_worst_routing(experts: int, tokens: int) -> None:
    """All experts but the first have one token, each a tile of its own."""
    from moec.kernels.launches.prefill import most_tiles
    from moec.kernels.sizes import Sizes

    alone = min(experts, tokens) - 1
    needed = -(-tokens // 128) + alone + -(-(tokens - alone) // 128)
    assert most_tiles(Sizes(256, 256, experts), tokens, 128) >= needed
