"""The linear layer and attention for many tokens on a GPU, against float64 and float32."""

from functools import partial

import pytest
import torch

many_cases = pytest.importorskip("tests.kernels.many_cases", reason="kernels need triton")

LINEAR = (*many_cases.LINEAR, (7168, 5120, 129), (5120, 5120, 1000))
ATTENTION = (
    *many_cases.ATTENTION,
    (40, 8, 128, 300, 1500, (299, 425, 426, 1234)),
    (8, 8, 64, 1024, 1024, (1023,)),
)


def kernels() -> list[int]:
    """The architecture of the GPU, and 0, which has the kernels for any."""
    major, minor = torch.cuda.get_device_capability()
    return [10 * major + minor, 0]


@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_linear(case: tuple[int, int, int], programs: int) -> None:
    given, expected = many_cases.linear("cuda", *case)
    for kernel in kernels():
        call = partial(many_cases.linear_by_kernel, given, kernel, programs)
        assert many_cases.checked(call, expected, 6e-3) == "", kernel


@pytest.mark.parametrize("programs", [3, 132])
@pytest.mark.parametrize("case", (*ATTENTION, None), ids=str)
def test_attention(
    case: tuple[int, int, int, int, int, tuple[int, ...]] | None, programs: int
) -> None:
    """None stands for sizes that are drawn here."""
    case = case or many_cases.random_attention()
    given, expected = many_cases.attention("cuda", *case)
    for kernel in kernels():
        call = partial(many_cases.attention_by_kernel, given, kernel, programs)
        assert many_cases.checked(call, expected) == "", (case, kernel)
