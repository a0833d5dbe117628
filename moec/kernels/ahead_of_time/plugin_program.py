"""A program: everything that runs one MoE layer for any number of tokens where there is no Python.

It is bytes for a launcher in another language, the TensorRT plugin. Integers are little-endian,
signed, and 8 bytes each:

    magic (8 bytes), SHA-256 of all that follows (32 bytes), VERSION
    the number of integers, the number of bytes of data; then both, padded to 64 bytes

The integers follow in this order; "n of" stands for a count and then that many items:

    dim, hidden, experts, most tokens
    n of names          offset and length in the data
    n of given          name, bytes of one token's row (0: one buffer for all tokens)
    n of kernels        name, offset and length of a cubin, threads, bytes of shared memory
    n of targets        compute capability, then
      n of variants     first and last number of tokens, then
        n of buffers    name, bytes (a quantity)
        n of launches   kernel, 1 if it may start early, grid (three quantities), then
          n of          0, slot                       a pointer
                        1, bytes, quantity            a number
                        2, slot, rows (a quantity), columns, tile rows, tile columns, swizzle,
                        element, bytes of an element  a tensor map

A slot is -1 for null, or an index into given, or, counting on, into the variant's buffers. A
quantity depends on the number of tokens: see `Quantity`. After its parameters every kernel takes
two null pointers. A launcher splits more than `most tokens` into several runs.
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain, groupby, pairwise

from triton import knobs

from moec.kernels.ahead_of_time.compile import Compiled, TensorMap, compile_launch
from moec.kernels.launches import prefill as launch_prefill
from moec.kernels.launches.descriptors import block_shapes
from moec.kernels.launches.few_tokens import few_moe
from moec.kernels.launches.launch import SHARED, Buffers, Launch
from moec.kernels.sizes import MOST_TOKENS, Sizes
from moec.spec.data import DTYPES
from moec.spec.errors import refuse

MAGIC, VERSION = b"moecprog", 1
#: the buffers that the caller gives: the layer's inputs in order, then its output
GIVEN = ("x", "router", "gate_up", "gate_up_scale", "down", "down_scale", "out")
#: arguments of a norm before the layer, which a program does not have: they are null
ABSENT = ("skip", "gain", "total")
#: a grid size that stands for the number of the GPU's multiprocessors
EVERY = -1
#: numbers of tokens after which a quantity's steps repeat: 16 share a program, 128 share a tile
PERIODS = (1, 16, 128)
#: bytes of an element
BYTES = {each.triton: each.bits // 8 for each in DTYPES if each.triton}
NUMBERS = {"i1": 1, "i32": 4, "i64": 8}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that depends on the tokens: add + the sum of mul * ((tokens + shift) // period).

    A program holds it as add, period, and n of (mul, shift).
    """

    add: int
    period: int = 1
    terms: tuple[tuple[int, int], ...] = ()

    def at(self, tokens: int) -> int:
        """Its value for this number of tokens."""
        return self.add + sum(mul * ((tokens + shift) // self.period) for mul, shift in self.terms)

    def integers(self) -> list[int]:
        """The integers that stand for it in a program."""
        return [self.add, self.period, len(self.terms), *chain(*self.terms)]


@dataclass(frozen=True, slots=True)
class Variant:
    """The launches for `first` to `last` tokens: the same kernels, on grids that depend on tokens.

    `grids` replaces the grids of `launches`. `bytes` is the size of each buffer. `rows` and
    `columns` are those of every matrix that has a descriptor.
    """

    first: int
    last: int
    launches: tuple[Launch, ...]
    grids: tuple[tuple[Quantity, Quantity, Quantity], ...]
    bytes: dict[str, Quantity]
    rows: dict[str, Quantity]
    columns: dict[str, int]


def build_program(sizes: Sizes, most: int, architectures: Sequence[int]) -> bytes:
    """The program of a layer of these sizes, for `architectures` such as 90.

    A run takes up to `most` tokens, which decides how much scratch it needs. A layer that the
    kernels for many tokens do not fit takes up to 64.

    Raises:
        MoecError: no architecture, one without kernels, or sizes that the kernels do not take.
    """
    unknown = sorted(set(architectures) - SHARED.keys())
    if unknown or not architectures:
        refuse(
            "compute capabilities of kernels",
            ", ".join(map(str, unknown)) or "none",
            " or ".join(map(str, SHARED)),
            "choose among those",
        )
    if most < 1:
        refuse("tokens of a program", most, "at least 1", "choose more")
    most = most if launch_prefill.fits(sizes) else min(most, MOST_TOKENS)
    data = _Data()
    targets = [
        _target(architecture, sizes, most, data) for architecture in sorted(set(architectures))
    ]
    row = {"x": 2 * sizes.dim, "out": 2 * sizes.dim}
    given = [[data.name(name), row.get(name, 0)] for name in GIVEN]
    integers = [
        sizes.dim,
        sizes.hidden,
        sizes.experts,
        most,
        *_many(data.names.values()),
        *_many(given),
        *_many(data.kernels),
        *_many(targets),
    ]
    integers += [0] * (-len(integers) % 8)  # so that data is aligned, and what follows it
    content = data.bytes + bytes(-len(data.bytes) % 64)
    body = struct.pack(f"<3q{len(integers)}q", VERSION, len(integers), len(content), *integers)
    body += content
    return MAGIC + sha256(body).digest() + body


def identity(program: bytes) -> str:
    """The SHA-256 that identifies a program, in hexadecimal."""
    return program[len(MAGIC) :][:32].hex()


class _Data:
    """The names and kernels added so far, each once, and the bytes that hold them."""

    def __init__(self) -> None:
        self.bytes = b""
        self.names: dict[str, list[int]] = {}
        self.kernels: list[list[int]] = []
        self._places: dict[bytes, int] = {}

    def name(self, text: str) -> int:
        if text not in self.names:
            self.names[text] = self._place(text.encode())
        return list(self.names).index(text)

    def kernel(self, made: Compiled) -> int:
        found = [self.name(made.name), *self._place(made.cubin), made.block, made.shared]
        if found not in self.kernels:
            self.kernels.append(found)
        return self.kernels.index(found)

    def _place(self, content: bytes) -> list[int]:
        """Offset and length of `content`, aligned to 16 bytes: a driver reads it in place."""
        if content not in self._places:
            self._places[content] = len(self.bytes)
            self.bytes += content + bytes(-len(content) % 16)
        return [self._places[content], len(content)]


def _many(items: Iterable[Iterable[int]]) -> list[int]:
    found = list(items)
    return [len(found), *chain(*found)]


def _target(architecture: int, sizes: Sizes, most: int, data: _Data) -> list[int]:
    found = variants(sizes, most, architecture)
    return [architecture, *_many([_variant(each, architecture, data) for each in found])]


def _variant(variant: Variant, architecture: int, data: _Data) -> list[int]:
    slots = {name: i for i, name in enumerate((*GIVEN, *variant.bytes))}
    slots |= dict.fromkeys(ABSENT, -1)
    buffers = [[data.name(name), *each.integers()] for name, each in variant.bytes.items()]
    launches = []
    for i, (each, grid) in enumerate(zip(variant.launches, variant.grids, strict=True)):
        made = _compiled(each, architecture)
        # The first launch must not start early: a kernel of another library ahead of it may not
        # have waited for those before it.
        overlap = int(made.overlap and i > 0)
        parameters = _parameters(made, variant, slots)
        axes = chain(*(axis.integers() for axis in grid))
        launches.append([data.kernel(made), overlap, *axes, *_many(parameters)])
    return [variant.first, variant.last, *_many(buffers), *_many(launches)]


def _compiled(each: Launch, architecture: int) -> Compiled:
    """Compile without line information, which would hold this machine's paths."""
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        return compile_launch(each, architecture)


def _parameters(made: Compiled, variant: Variant, slots: dict[str, int]) -> Iterator[list[int]]:
    maps = {each.name: each for each in made.maps}
    for each in made.parameters:
        if each.type == "map":
            yield [2, slots[each.name], *_map(maps[each.name], variant)]
        elif each.type[0] == "*":
            yield [0, slots[each.name]]
        else:
            found = _number(each.name, each.part, variant)
            yield [1, NUMBERS[each.type], *found.integers()]


def _map(each: TensorMap, variant: Variant) -> list[int]:
    return [
        *variant.rows[each.name].integers(),
        variant.columns[each.name],
        each.rows,
        each.columns,
        each.swizzle,
        each.element,
        each.bytes,
    ]


def _number(name: str, part: str, variant: Variant) -> Quantity:
    if not part:
        assert name == "tokens", name
        return Quantity(0, 1, ((1, 0),))
    if part == "rows":
        return variant.rows[name]
    columns = variant.columns.get(name, 0)
    fixed = {"columns": columns, "row stride": columns, "column stride": 1, "padding": 0}
    return Quantity(fixed[part])


def variants(sizes: Sizes, most: int, architecture: int) -> Iterator[Variant]:
    """The launches for 1 to `most` tokens, in as few variants as possible."""
    found = (_launched(sizes, tokens, architecture) for tokens in range(1, most + 1))
    first = 1
    for _, group in groupby(found, _constant):
        alike = list(group)
        rows = [_numbers(*each) for each in alike]
        while rows:
            count, quantities = _longest(first, rows)
            yield _made(first, first + count - 1, *alike[0], quantities)
            first, rows = first + count, rows[count:]


def _launched(
    sizes: Sizes, tokens: int, architecture: int
) -> tuple[tuple[Launch, ...], Buffers, Buffers]:
    """The launches for this number of tokens, their buffers, and all matrices with descriptors."""
    if tokens <= MOST_TOKENS:
        launches, written = few_moe(sizes, tokens, architecture)
    else:
        wide = launch_prefill.tiles_for(architecture, EVERY)
        launches = launch_prefill.prefill_moe(sizes, tokens, wide)
        written = launch_prefill.scratch(sizes, tokens, wide)
    used = {name for each in launches for name in each.arguments} - {*GIVEN, *ABSENT}
    buffers = {name: each for name, each in written.items() if name in used}
    experts = sizes.experts + 1
    weights: Buffers = {
        "gate_up": ((experts * 2 * sizes.hidden, sizes.dim), "fp8e4nv"),
        "down": ((experts * sizes.dim, sizes.hidden), "fp8e4nv"),
    }
    described = {name for each in launches for name in block_shapes(each)}
    matrices = {k: each for k, each in (buffers | weights).items() if k in described}
    return launches, buffers, matrices


def _constant(launched: tuple[tuple[Launch, ...], Buffers, Buffers]) -> object:
    launches, buffers, _ = launched
    return [replace(each, grid=(0, 0, 0)) for each in launches], list(buffers)


def _numbers(launches: tuple[Launch, ...], buffers: Buffers, matrices: Buffers) -> list[int]:
    """The numbers that may differ within a variant: grids, bytes, rows."""
    grids = chain(*(each.grid for each in launches))
    return [*grids, *map(_bytes, buffers.values()), *(shape[0] for shape, _ in matrices.values())]


def _bytes(buffer: tuple[tuple[int, ...], str]) -> int:
    shape, kind = buffer
    size = BYTES[kind]
    for each in shape:
        size *= each
    return size


def _made(
    first: int,
    last: int,
    launches: tuple[Launch, ...],
    buffers: Buffers,
    matrices: Buffers,
    quantities: Sequence[Quantity],
) -> Variant:
    rest = iter(quantities)
    return Variant(
        first,
        last,
        launches,
        grids=tuple((next(rest), next(rest), next(rest)) for _ in launches),
        bytes=dict(zip(buffers, rest, strict=False)),
        rows=dict(zip(matrices, rest, strict=True)),
        columns={name: shape[1] for name, (shape, _) in matrices.items()},
    )


def _longest(first: int, rows: Sequence[Sequence[int]]) -> tuple[int, list[Quantity]]:
    """How many of `rows`, from `first` tokens on, quantities can describe; and the quantities."""
    count = len(rows)
    if not _fit_all(first, rows):
        count = bisect_left(
            range(1, count), True, key=lambda few: _fit_all(first, rows[:few]) is None
        )
    found = _fit_all(first, rows[:count])
    assert found is not None
    return count, found


def _fit_all(first: int, rows: Sequence[Sequence[int]]) -> list[Quantity] | None:
    found = []
    for column in zip(*rows, strict=True):
        each = fit(first, column)
        if each is None:
            return None
        found.append(each)
    return found


def fit(first: int, values: Sequence[int]) -> Quantity | None:
    """The quantity with exactly these values from `first` tokens on; None if there is none."""
    for period in PERIODS:
        steps: dict[int, int] = {}  # by the remainder of the number of tokens
        for tokens, (before, after) in enumerate(pairwise(values), first + 1):
            steps.setdefault(tokens % period, after - before)
        terms = tuple((step, -at % period) for at, step in steps.items() if step)
        start = Quantity(0, period, terms).at(first)
        found = Quantity(values[0] - start, period, terms)
        if all(found.at(tokens) == each for tokens, each in enumerate(values, first)):
            return found
    return None
