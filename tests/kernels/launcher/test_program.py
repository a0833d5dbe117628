"""Programs hold exactly the launches that torch would make, for every number of tokens."""

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need triton")

from moec.kernels.ahead_of_time.operations import moe_layer
from moec.kernels.ahead_of_time.program import build_program, identity
from moec.kernels.ahead_of_time.quantities import Quantity, fit
from moec.kernels.ahead_of_time.variants import EVERY
from moec.kernels.launches.launch import SHARED
from moec.kernels.sizes import Sizes
from moec.spec.errors import MoecError
from tests.kernels.launcher import expected
from tests.kernels.launcher.expected import MULTIPROCESSORS
from tests.kernels.launcher.reader import read

pytestmark = pytest.mark.full

SMALL = Sizes(dim=256, hidden=128, experts=20)
MOST = 600


@pytest.fixture(scope="module")
def program() -> bytes:
    return build_program(moe_layer(SMALL, MOST), tuple(SHARED))


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 20, 21, 33, 64, 65, 128, 129, 300, MOST])
def test_a_program_has_the_launches(program: bytes, architecture: int, tokens: int) -> None:
    found = read(program)
    variant = found.variant(architecture, tokens=tokens)
    slots = found.slots(variant)
    launches, buffers = expected.launches(SMALL, tokens, architecture)
    assert {name: each.at(tokens) for name, each in variant.buffers.items()} == {
        name: size for name, (_, size) in buffers.items()
    }
    assert len(variant.launches) == len(launches)
    for one, each in zip(variant.launches, launches, strict=True):
        made = expected.compiled(each, architecture)
        kernel = one.kernel
        assert (kernel.name, kernel.cubin) == (made.name, made.cubin)
        assert (kernel.threads, kernel.shared) == (made.block, made.shared)
        assert kernel.offset % 16 == 0
        assert one.overlap == made.overlap
        grid = [MULTIPROCESSORS if q.at(tokens) == EVERY else q.at(tokens) for q in one.grid]
        assert tuple(grid) == each.grid
        parameters = []
        for kind, *rest in one.parameters:
            if kind == "number":
                parameters.append((kind, rest[0], rest[1].at(tokens)))
            else:
                name = None if rest[0] < 0 else slots[rest[0]]
                parameters.append((kind, name, *(_at(part, tokens) for part in rest[1:])))
        assert parameters == list(expected.values(made, SMALL, tokens, buffers))


def _at(part: object, tokens: int) -> object:
    return part.at(tokens) if isinstance(part, Quantity) else part


def test_a_program_says_what_it_is(program: bytes) -> None:
    found = read(program)
    assert (found.operation, found.constants, found.most) == ("moe_layer", "", MOST)
    assert [(each.name, each.role, each.type, each.shape) for each in found.given] == [
        ("x", 0, 16, ["tokens", 256]), ("router", 0, 16, [20, 256]),
        ("gate_up", 0, 17, [21, 256, 256]), ("gate_up_scale", 0, 1, [21, 256]),
        ("down", 0, 17, [21, 256, 128]), ("down_scale", 0, 1, [21, 256]),
        ("out", 1, 16, ["tokens", 256]),
    ]  # fmt: skip
    assert list(found.targets) == sorted(SHARED)
    assert identity(program) == program[8:40].hex() == sha256(program[40:]).hexdigest()
    assert len({each.cubin for each in found.kernels}) == len(found.kernels)
    assert build_program(moe_layer(SMALL, MOST), (120, 90, 89, 90)) == program


def test_a_program_holds_no_paths(program: bytes) -> None:
    for path in (b"moec/", b"kernels", b".py", b"/home", b"/tmp"):
        assert path not in program


@pytest.mark.parametrize(
    ("sizes", "architecture"),
    [(Sizes(5120, 8192, 16), 90), (Sizes(5120, 8192, 128), 120), (Sizes(256, 128, 100), 89)],
)
def test_quantities_hold_for_every_number_of_tokens(sizes: Sizes, architecture: int) -> None:
    most, last = 2500, 0
    for variant in moe_layer(sizes, most).variants(architecture):
        first = variant.ranges["tokens"][0]
        assert first == last + 1
        last = variant.ranges["tokens"][1]
        for tokens in range(first, last + 1):
            launches, buffers = expected.launches(sizes, tokens, architecture)
            for grid, each in zip(variant.grids, launches, strict=True):
                of = (axis.at(tokens) for axis in grid)
                assert each.grid == tuple(MULTIPROCESSORS if n == EVERY else n for n in of)
            for name, each in variant.bytes.items():
                assert each.at(tokens) == buffers[name][1]
            for name in variant.rows.keys() & buffers.keys():
                assert variant.rows[name].at(tokens) == buffers[name][0][0]
        ends = first, last
        assert all(q.at(ends[0]) <= q.at(ends[1]) for q in variant.bytes.values())
    assert last == most


@given(
    first=st.integers(1, 300), count=st.integers(1, 500), add=st.integers(-9, 9),
    period=st.sampled_from([1, 16, 128]),
    terms=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 127)), max_size=3),
)  # fmt: skip
def test_what_repeats_is_found(
    first: int, count: int, add: int, period: int, terms: list[tuple[int, int]]
) -> None:
    values = [Quantity(add, period, tuple(terms)).at(first + i) for i in range(count)]
    found = fit(first, values)
    assert found and [found.at(first + i) for i in range(count)] == values


def test_what_does_not_repeat_is_not_found() -> None:
    assert fit(1, [tokens * tokens for tokens in range(1, 300)]) is None


def test_a_layer_that_prefill_does_not_fit_runs_in_parts_of_64() -> None:
    found = read(build_program(moe_layer(Sizes(64, 64, 2), MOST), (89,)))
    assert found.most == 64
    assert found.targets[89][-1].ranges["tokens"][1] == 64


@pytest.mark.parametrize(
    ("sizes", "most", "architectures", "message"),
    [
        (SMALL, MOST, (89, 80), "compute capabilities of kernels\n  found:    80"),
        (SMALL, MOST, (), "compute capabilities of kernels\n  found:    none"),
        (SMALL, 0, (89,), "at least 1"),
        (Sizes(100, 128, 4), MOST, (89,), "dim"),
    ],
)
def test_refusals(sizes: Sizes, most: int, architectures: tuple[int, ...], message: str) -> None:
    with pytest.raises(MoecError, match=message):
        build_program(moe_layer(sizes, most), architectures)
