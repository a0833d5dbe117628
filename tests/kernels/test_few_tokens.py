"""Which layers have Hopper's pipelined products; GPU tests say what those compute."""

import pytest

pytest.importorskip("triton", reason="kernels need triton")

from moec.kernels.ahead_of_time.compile import compile_launch
from moec.kernels.hopper import linear, moe_decode
from moec.kernels.launches.few_tokens import Stages, few_linear, few_moe
from moec.kernels.launches.launch import Launch
from moec.kernels.sizes import Sizes

SCOUT = Sizes(5120, 8192, 16)


def pipelined(launches: tuple[Launch, ...]) -> list[str]:
    ours = linear.linear, moe_decode.gate_up, moe_decode.down
    return [each.name for each in launches if each.kernel in ours]


@pytest.mark.parametrize(
    ("sizes", "tokens", "architecture", "has"),
    [
        (SCOUT, 1, 90, True), (SCOUT, 16, 90, True), (Sizes(5120, 8192, 128), 16, 90, True),
        (SCOUT, 17, 90, False), (SCOUT, 1, 89, False), (SCOUT, 1, 120, False),
        (SCOUT, 1, 100, False), (SCOUT, 1, 0, False),
        (Sizes(128, 512, 4), 4, 90, True), (Sizes(128, 512, 4), 5, 90, False),
        (Sizes(192, 512, 4), 1, 90, False), (Sizes(128, 256, 4), 1, 90, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("combine", [True, False])
def test_layers_that_have_pipelines(
    sizes: Sizes, tokens: int, architecture: int, has: bool, combine: bool
) -> None:
    launches, written = few_moe(sizes, tokens, architecture, combine=combine)
    assert pipelined(launches) == (["gate_up", "down"] if has else [])
    names = ["route", "gate_up", "encode", "down", *(["combine"] if combine else [])]
    assert [each.name for each in launches] == names
    arguments = {name for each in launches for name in each.arguments}
    assert written.keys() <= arguments and ("out" in written) == combine
    if has:
        assert written["parts"] == ((Stages().split, tokens, sizes.dim), "fp32")
        assert all(each.constants["PARTS"] == Stages().split for each in launches[4:])


@pytest.mark.parametrize(
    ("hidden", "rows", "grid"),
    [
        (8192, 64, (128, 1, 1)),
        (4608, 64, (72, 1, 1)),
        (4096, 32, (128, 1, 1)),
        (2048, 32, (64, 2, 1)),
    ],
)
def test_narrow_layers_have_lower_tiles(hidden: int, rows: int, grid: tuple[int, ...]) -> None:
    _, gate_up, *_ = few_moe(Sizes(5120, hidden, 16), 1, 90)[0]
    assert (gate_up.constants["ROWS"], gate_up.grid) == (rows, grid)


@pytest.mark.parametrize(
    ("width", "dim", "tokens", "architecture", "has"),
    [
        (7168, 5120, 1, 90, True), (5120, 5120, 16, 90, True), (64, 128, 1, 90, True),
        (7168, 5120, 17, 90, False), (7168, 5120, 1, 120, False), (96, 128, 1, 90, False),
        (64, 96, 1, 90, False),
    ],
)  # fmt: skip
def test_linear_layers_that_have_pipelines(
    width: int, dim: int, tokens: int, architecture: int, has: bool
) -> None:
    launch = few_linear(width, dim, tokens, architecture)
    assert bool(pipelined((launch,))) == has and launch.name == "linear"


@pytest.mark.full
@pytest.mark.parametrize("sizes", [Sizes(128, 512, 4), Sizes(2048, 1024, 64)])
def test_small_layers_compile(sizes: Sizes) -> None:
    """They have fewer steps than stages."""
    for launch in (*few_moe(sizes, 3, 90)[0], few_linear(64, 128, 1, 90)):
        found = compile_launch(launch, 90)
        assert found.overlap and found.cubin
