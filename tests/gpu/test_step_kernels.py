"""The kernels of a decode step on a GPU, against the eager ops."""

import pytest

step_cases = pytest.importorskip("tests.kernels.step_cases", reason="kernels need triton")


def check(found: object) -> None:
    for name, error in found:  # type: ignore[attr-defined]
        assert error <= step_cases.limit(name), (name, error)


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 33, 64, 65, 300])
@pytest.mark.parametrize("dim", [128, 1536, 5120])
def test_steps_on_packed_tokens(dim: int, tokens: int) -> None:
    check(step_cases.steps("cuda", dim, tokens))


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (64, 1), (1, 3000), (3, 7)])
@pytest.mark.parametrize("size", [32, 128])
def test_positions(size: int, batch: int, count: int) -> None:
    check(step_cases.tables("cuda", size, batch, count))


@pytest.mark.parametrize("heads", [(40, 8, 128), (4, 2, 32), (16, 16, 64), (6, 3, 16)])
@pytest.mark.parametrize(
    ("batch", "slots", "count"),
    [(1, 5000, 1), (3, 700, 1), (64, 90, 1), (1, 900, 300), (2, 400, 5)],
)
def test_attention(heads: tuple[int, int, int], batch: int, slots: int, count: int) -> None:
    check(step_cases.attention("cuda", batch, *heads, slots, count))


@pytest.mark.parametrize(
    "heads", [(32, 4, 128), (16, 16, 128), (40, 8, 128), (4, 2, 32), (6, 3, 16)]
)
@pytest.mark.parametrize(("batch", "slots"), [(1, 1), (1, 5000), (3, 701), (64, 1120)])
def test_attention_of_plain_programs(heads: tuple[int, int, int], batch: int, slots: int) -> None:
    check(step_cases.plain("cuda", batch, *heads, slots))


@pytest.mark.parametrize("tokens", [1, 3, 5, 16, 17, 40, 64, 200])
@pytest.mark.parametrize(
    "sizes",
    [
        (128, 64, 16),
        (1024, 2048, 5),
        (512, 1024, 128),
        (2048, 4096, 16),
        (640, 1536, 1),
        (640, 4608, 17),
    ],
)
def test_experts(sizes: tuple[int, int, int], tokens: int) -> None:
    check(step_cases.experts("cuda", *sizes, tokens))
