"""A program: all that runs one operation, for calls of any size, where there is no Python.

It is bytes for a launcher in another language (`moec/kernels/launcher`). Integers are
little-endian, signed, and 8 bytes each:

    magic (8 bytes), SHA-256 of all that follows (32 bytes), VERSION
    the number of integers, the number of bytes of data; then both, padded to 64 bytes

The integers follow in this order; "n of" stands for a count and then that many items:

    n of names          offset and length in the data
    name of the operation, name of its constants as text, most tokens of a part (0: no parts)
    n of given          name; 0: an input, 1: an output, 2: an input that is left out; the place
                        among the given of the input that it continues, or -1; type;
                        n of sizes: a number, or -1 - the index of a variable
    n of kernels        name, offset and length of a cubin, threads, bytes of shared memory
    n of targets        compute capability, then
      n of variants     n of ranges (variable, first, last), then
        n of buffers    name, bytes (a quantity)
        n of launches   kernel, 1 if it may start early, grid (three quantities), then
          n of          0, slot                       a pointer
                        1, bytes, quantity            a number
                        2, slot, rows (a quantity), columns, tile rows, tile columns, swizzle,
                        element, bytes of an element  a tensor map

A slot is -1 for null, or an index into given, or, counting on, into the variant's buffers. A type
is ONNX's number for it. Variables and quantities depend on the sizes of a call: see
`moec.kernels.ahead_of_time.variants` and `.quantities`. After its parameters every kernel takes two
null pointers.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from itertools import chain

from triton import knobs

from moec.kernels.ahead_of_time.compile import Compiled, TensorMap, compile_launch
from moec.kernels.ahead_of_time.quantities import VARIABLES, Quantity, multiple
from moec.kernels.ahead_of_time.variants import Given, Operation, Step, Variant
from moec.kernels.launcher.build import MAGIC
from moec.kernels.launches.launch import SHARED, Launch
from moec.kernels.sizes import constants_text
from moec.spec.errors import refuse

VERSION = 2
#: Triton's name of a type -> ONNX's number, which ONNX Runtime's C API has too
TYPES = {"fp32": 1, "i32": 6, "i64": 7, "fp16": 10, "bf16": 16, "fp8e4nv": 17}
NUMBERS = {"i1": 1, "i32": 4, "i64": 8}


#: the kernels of launches, by all that a kernel depends on
Kernels = Mapping[str, Compiled]


def build_program(operation: Operation, architectures: Sequence[int]) -> bytes:
    """The program of `operation` for compute capabilities `architectures`, such as 90.

    Raises:
        MoecError: no architecture, or one without kernels.
    """
    return build_programs((operation,), architectures)[0]


def build_programs(operations: Iterable[Operation], architectures: Sequence[int]) -> list[bytes]:
    """The programs of `operations`, whose kernels are compiled on all of the machine's cores.

    Raises:
        MoecError: no architecture, or one without kernels.
    """
    unknown = sorted(set(architectures) - SHARED.keys())
    if unknown or not architectures:
        refuse(
            "compute capabilities of kernels",
            ", ".join(map(str, unknown)) or "none",
            " or ".join(map(str, SHARED)),
            "choose among those",
        )
    targets = [
        (each, {target: list(each.variants(target)) for target in sorted(set(architectures))})
        for each in operations
    ]
    kernels = _compiled(
        (step.launch, target)
        for _, found in targets
        for target, variants in found.items()
        for variant in variants
        for step in variant.steps
    )
    return [_program(operation, found, kernels) for operation, found in targets]


def _compiled(launches: Iterable[tuple[Launch, int]]) -> Kernels:
    """The kernels of launches for compute capabilities."""
    wanted = {_key(*each): each for each in launches}
    # Line information would hold this machine's paths. Triton's compiler leaves Python's lock.
    with knobs.compilation.scope(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        knobs.compilation.disable_line_info = True
        found = pool.map(lambda each: compile_launch(*each), wanted.values())
        return dict(zip(wanted, found, strict=True))


def _key(launch: Launch, architecture: int) -> str:
    return f"{architecture} {replace(launch, grid=(0, 0, 0))}"


def _program(
    operation: Operation, variants: Mapping[int, Sequence[Variant]], kernels: Kernels
) -> bytes:
    data = _Data()
    given = tuple(each or Given("", "fp32", ()) for each in operation.inputs) + operation.outputs
    targets = [
        [target, *_many([_variant(each, target, given, data, kernels) for each in found])]
        for target, found in variants.items()
    ]
    listed = [_given(each, i, operation, given, data) for i, each in enumerate(given)]
    head = [
        data.name(operation.name),
        data.name(constants_text(operation.constants)),
        operation.most,
    ]
    integers = [
        *_many(data.names.values()),
        *head,
        *_many(listed),
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


def _given(
    each: Given, at: int, operation: Operation, given: Sequence[Given], data: _Data
) -> list[int]:
    inputs = len(operation.inputs)
    role = 1 if at >= inputs else 2 if operation.inputs[at] is None else 0
    names = [one.name for one in given[:inputs]]
    source = names.index(each.continues) if each.continues else -1
    sizes = [[n if isinstance(n, int) else -1 - VARIABLES.index(n)] for n in each.shape]
    return [data.name(each.name), role, source, TYPES[each.dtype], *_many(sizes)]


def _variant(
    variant: Variant, architecture: int, given: Sequence[Given], data: _Data, kernels: Kernels
) -> list[int]:
    slots = {each.name: i for i, each in enumerate(given) if each.name}
    slots |= {each.continues: slots[each.name] for each in given if each.continues}
    slots |= {name: i for i, name in enumerate(variant.bytes, len(given))}
    ranges = [[VARIABLES.index(name), *ends] for name, ends in variant.ranges.items()]
    buffers = [[data.name(name), *each.integers()] for name, each in variant.bytes.items()]
    launches = []
    for step, grid in zip(variant.steps, variant.grids, strict=True):
        made = kernels[_key(step.launch, architecture)]
        parameters = _parameters(made, step, variant, slots)
        axes = chain(*(axis.integers() for axis in grid))
        launches.append([data.kernel(made), int(made.overlap), *axes, *_many(parameters)])
    return [*_many(ranges), *_many(buffers), *_many(launches)]


def _parameters(
    made: Compiled, step: Step, variant: Variant, slots: dict[str, int]
) -> Iterator[list[int]]:
    maps = {each.name: each for each in made.maps}
    for each in made.parameters:
        buffer = step.buffer(each.name)
        if each.type == "map":
            yield [2, slots[str(buffer)], *_map(maps[each.name], str(buffer), variant)]
        elif each.type[0] == "*":
            yield [0, -1 if buffer is None else slots[buffer]]
        else:
            found = _number(str(buffer), each.part, variant)
            yield [1, NUMBERS[each.type], *found.integers()]


def _map(each: TensorMap, buffer: str, variant: Variant) -> list[int]:
    return [
        *variant.rows[buffer].integers(),
        variant.columns[buffer],
        each.rows,
        each.columns,
        each.swizzle,
        each.element,
        each.bytes,
    ]


def _number(name: str, part: str, variant: Variant) -> Quantity:
    if not part:
        return multiple(name)
    if part == "rows":
        return variant.rows[name]
    columns = variant.columns.get(name, 0)
    fixed = {"columns": columns, "row stride": columns, "column stride": 1, "padding": 0}
    return Quantity(fixed[part])
