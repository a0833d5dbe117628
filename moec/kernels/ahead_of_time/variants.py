"""An operation: what a program computes, as launches for every size of a call.

A variable is a size that differs from call to call, such as the number of tokens. A variant has the
launches for a range of sizes: the same kernels, on grids that follow from the variables.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from math import prod

from moec.kernels.ahead_of_time.quantities import VARIABLES, Quantity, longest
from moec.kernels.launches.descriptors import block_shapes
from moec.kernels.launches.launch import Buffers, Launch
from moec.spec.data import DTYPES

#: a grid size that stands for the number of the GPU's multiprocessors
EVERY = -1
#: bytes of an element
BYTES = {each.triton: each.bits // 8 for each in DTYPES if each.triton}


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor that the caller gives: a size of its shape is a number or the name of a variable.

    `dtype` is Triton's name. An output that `continues` an input is that input, changed in place.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    continues: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """A launch, and the buffers for its arguments where they have other names; None: null."""

    launch: Launch
    names: Mapping[str, str | None] = field(default_factory=dict)

    def buffer(self, argument: str) -> str | None:
        """The name of the buffer for `argument`."""
        return self.names.get(argument, argument)


@dataclass(frozen=True, slots=True)
class Variant:
    """The steps where each variable of `ranges` is within its range, first to last.

    `grids` replaces the grids of the launches. `bytes` is the size of each buffer of scratch.
    `rows` and `columns` are those of every matrix that has a descriptor.
    """

    ranges: Mapping[str, tuple[int, int]]
    steps: tuple[Step, ...]
    grids: tuple[tuple[Quantity, Quantity, Quantity], ...]
    bytes: Mapping[str, Quantity]
    rows: Mapping[str, Quantity]
    columns: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Operation:
    """An op of `moec.graph_builder.ops` with fixed sizes and `constants`, such as an eps.

    `inputs` and `outputs` are those of the op. An input that is None is one that the op may have,
    and this operation does not. Calls of more than `most` tokens run in several parts; 0: calls
    cannot be divided. `variants` gives the variants for a compute capability.
    """

    name: str
    constants: Mapping[str, int | float]
    inputs: tuple[Given | None, ...]
    outputs: tuple[Given, ...]
    most: int
    variants: Callable[[int], Iterator[Variant]]


#: for a number of tokens and a compute capability: the steps and the buffers of scratch
Launched = Callable[[int, int], tuple[tuple[Step, ...], Buffers]]


def by_tokens(
    launched: Launched,
    given: Sequence[Given | None],
    most: int,
    architecture: int,
    variable: str = "tokens",
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> Iterator[Variant]:
    """The steps for 1 to `most` of a variable, in as few variants as possible.

    `ranges` are those of other variables.
    """
    of = VARIABLES.index(variable)
    known = {each.name: each for each in given if each}
    found = [_described(*launched(n, architecture), n, variable, known) for n in range(1, most + 1)]
    first = 1
    for _, group in groupby(found, _constant):
        alike = list(group)
        rows = [each.numbers() for each in alike]
        while rows:
            count, quantities = longest(first, rows, of)
            bounds = {variable: (first, first + count - 1), **(ranges or {})}
            yield alike[0].variant(bounds, quantities)
            first, rows = first + count, rows[count:]


@dataclass(frozen=True, slots=True)
class _Described:
    """The steps for one number of tokens, the bytes of their scratch, and the described matrices"""

    steps: tuple[Step, ...]
    bytes: dict[str, int]
    matrices: dict[str, tuple[int, int]]

    def numbers(self) -> list[int]:
        """The numbers that may differ within a variant: grids, bytes, rows."""
        grids = chain(*(each.launch.grid for each in self.steps))
        return [*grids, *self.bytes.values(), *(rows for rows, _ in self.matrices.values())]

    def variant(
        self, ranges: Mapping[str, tuple[int, int]], quantities: Sequence[Quantity]
    ) -> Variant:
        rest = iter(quantities)
        return Variant(
            ranges,
            self.steps,
            grids=tuple((next(rest), next(rest), next(rest)) for _ in self.steps),
            bytes=dict(zip(self.bytes, rest, strict=False)),
            rows=dict(zip(self.matrices, rest, strict=True)),
            columns={name: columns for name, (_, columns) in self.matrices.items()},
        )


def _described(
    steps: tuple[Step, ...],
    written: Buffers,
    value: int,
    variable: str,
    given: Mapping[str, Given],
) -> _Described:
    used = {each.buffer(name) for each in steps for name in each.launch.arguments}
    scratch = {name: each for name, each in written.items() if name in used and name not in given}
    shapes = {name: shape for name, (shape, _) in scratch.items()}
    for each in given.values():
        shape = [value if size == variable else size for size in each.shape]
        if all(isinstance(size, int) for size in shape):
            shapes[each.name] = tuple(map(int, shape))
    described = [each.buffer(name) for each in steps for name in block_shapes(each.launch)]
    matrices = {
        name: (prod(shapes[name][:-1]), shapes[name][-1]) for name in described if name is not None
    }
    sizes = {name: BYTES[kind] * prod(shape) for name, (shape, kind) in scratch.items()}
    return _Described(steps, sizes, matrices)


def _constant(of: _Described) -> object:
    steps = [(replace(each.launch, grid=(0, 0, 0)), dict(each.names)) for each in of.steps]
    return steps, list(of.bytes)
