"""The kernels for many tokens without a GPU: interpreted."""

import pytest

from moec.spec.errors import MoecError
from tests.kernels.processes import interpreted

pytest.importorskip("triton", reason="kernels need triton")


@pytest.mark.full
def test_the_kernels_are_float32_rounded() -> None:
    done = interpreted("interpret_many.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 22
    for *case, wrong in rows:
        assert wrong == "", case


@pytest.mark.parametrize(
    ("heads", "named"), [((4, 2, 24), "size"), ((4, 2, 512), "size"), ((5, 2, 64), "heads")]
)
def test_heads_that_the_kernels_do_not_take_are_refused(
    heads: tuple[int, int, int], named: str
) -> None:
    from moec.kernels.launches.attend_many import attend_many
    from moec.kernels.sizes import Heads

    with pytest.raises(MoecError, match=f"attend_many: {named}"):
        attend_many(Heads(*heads), 1, 100, 90)


@pytest.mark.parametrize(("width", "dim", "named"), [(100, 128, "width"), (128, 16, "dim")])
def test_a_layer_that_no_tiles_divide_is_refused(width: int, dim: int, named: str) -> None:
    from moec.kernels.launches.many_linear import many_linear

    with pytest.raises(MoecError, match=f"many_linear: {named}"):
        many_linear(width, dim, 100, 90)


@pytest.mark.parametrize(
    ("tokens", "columns"), [(8192, 128), (1024, 128), (64, 64)], ids=["many", "some", "few"]
)
def test_tiles_are_narrow_where_wide_ones_would_leave_programs_idle(
    tokens: int, columns: int
) -> None:
    from moec.kernels.launches.many_linear import cut_for

    assert cut_for(7168, tokens, 132).columns == columns
