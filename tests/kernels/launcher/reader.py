"""Reads a program as its format says, to see what is in one."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moec.kernels.ahead_of_time.quantities import VARIABLES, Quantity


@dataclass
class Kernel:
    name: str
    offset: int
    cubin: bytes
    threads: int
    shared: int


@dataclass
class Launch:
    kernel: Kernel
    overlap: bool
    grid: list[Quantity]
    parameters: list[tuple[Any, ...]]


@dataclass
class Variant:
    ranges: dict[str, tuple[int, int]]
    buffers: dict[str, Quantity]
    launches: list[Launch]


@dataclass
class Given:
    name: str
    role: int
    continues: int
    type: int
    shape: list[int | str]


@dataclass
class Program:
    operation: str
    constants: str
    most: int
    given: list[Given]
    kernels: list[Kernel]
    targets: dict[int, list[Variant]]

    def variant(self, architecture: int, **values: int) -> Variant:
        found = [
            each
            for each in self.targets[architecture]
            if all(first <= values[of] <= last for of, (first, last) in each.ranges.items())
        ]
        assert len(found) == 1
        return found[0]

    def slots(self, variant: Variant) -> list[str]:
        return [*(each.name for each in self.given), *variant.buffers]


def read(program: bytes) -> Program:
    assert program[:8] == b"moecprog"
    version, count, size = struct.unpack_from("<3q", program, 40)
    assert version == 2 and len(program) == 64 + 8 * count + size and len(program) % 64 == 0
    numbers = iter(struct.unpack_from(f"<{count}q", program, 64))
    start = 64 + 8 * count
    take = numbers.__next__

    def many(one: Callable[[], Any]) -> list[Any]:
        return [one() for _ in range(take())]

    def data() -> tuple[int, bytes]:
        offset, length = start + take(), take()
        assert offset + length <= len(program)
        return offset, program[offset : offset + length]

    def quantity() -> Quantity:
        of, add, period = take(), take(), take()
        return Quantity(add, period, tuple(many(lambda: (take(), take()))), of)

    def parameter() -> tuple[Any, ...]:
        kind = take()
        if kind == 0:
            return "pointer", take()
        if kind == 1:
            return "number", take(), quantity()
        return "map", take(), quantity(), *(take() for _ in range(6))

    def size() -> int | str:
        found = take()
        return found if found >= 0 else VARIABLES[-1 - found]

    names = [text.decode() for _, text in many(data)]
    head = names[take()], names[take()], take()
    given = many(lambda: Given(names[take()], take(), take(), take(), many(size)))
    kernels = many(lambda: Kernel(names[take()], *data(), take(), take()))

    def launch() -> Launch:
        kernel, overlap = kernels[take()], take()
        return Launch(kernel, bool(overlap), [quantity() for _ in range(3)], many(parameter))

    def variant() -> Variant:
        ranges = dict(many(lambda: (VARIABLES[take()], (take(), take()))))
        buffers = dict(many(lambda: (names[take()], quantity())))
        return Variant(ranges, buffers, many(launch))

    targets = dict(many(lambda: (take(), many(variant))))
    assert not any(numbers)
    return Program(*head, given, kernels, targets)


def programs(content: bytes) -> Iterator[bytes]:
    """Each of a file with several."""
    while content:
        _, count, size = struct.unpack_from("<3q", content, 40)
        end = 64 + 8 * count + size
        yield content[:end]
        content = content[end:]
