"""Compile launches to cubins, on a machine without a GPU, and say how to launch those."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from moec.kernels.launches.descriptors import block_shapes, signature
from moec.kernels.launches.launch import SHARED, Launch
from moec.spec.errors import refuse

#: element type in a descriptor's metadata, as Triton numbers it -> the driver's CUtensorMapDataType
ELEMENTS = {0: 0, 10: 9}  # bytes, bf16


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a cubin.

    `type` is "*..." for a pointer, "map" for a `TensorMap` by value, and i1 (a byte), i32 or i64
    for a number. `part` says which number of the matrix `name` the parameter is: "rows", "columns",
    "row stride" or "column stride", in elements, or "padding", which is 0. An empty `part` means
    `name` itself.
    """

    name: str
    type: str
    part: str = ""


@dataclass(frozen=True, slots=True)
class TensorMap:
    """The arguments of `cuTensorMapEncodeTiled` for the matrix `name`; a tile is rows by columns.

    The driver takes the inner dimension first. Element strides are 1, with no interleave, promotion
    to 128 bytes in L2, and no fill. The map itself takes 128 bytes, aligned to 64.
    """

    name: str
    rows: int
    columns: int
    swizzle: int
    element: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel that is compiled for one architecture, and runs on no other.

    To launch it with the driver's API, pass `parameters` in order, then two null pointers (scratch
    that these kernels do not use). It runs with `block` threads and `shared` bytes of dynamic
    shared memory; above 48 KiB the function's attribute must be raised first. It uses no cluster
    and is not cooperative. With `overlap` it is a programmatic dependent launch (the attribute is
    programmatic stream serialization).
    """

    name: str
    architecture: int
    cubin: bytes
    parameters: tuple[Parameter, ...]
    maps: tuple[TensorMap, ...]
    grid: tuple[int, int, int]
    block: int
    shared: int
    overlap: bool


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """The cubin of `launch` for compute capability `architecture`, such as 90.

    Raises:
        MoecError: the kernel needs more shared memory than the architecture has.
    """
    built = build(launch, architecture)
    found, limit = built.metadata, SHARED[architecture]
    if found.shared > limit:
        refuse(
            f"{launch.name} for sm_{architecture}",
            f"{found.shared} bytes of shared memory",
            f"at most {limit}",
            "choose smaller tiles",
        )
    unused = found.global_scratch_size, found.profile_scratch_size, found.num_ctas
    assert unused == (0, 0, 1) and not found.launch_cooperative_grid, unused
    maps = tuple(_maps(launch, found.tensordesc_meta))
    return Compiled(
        name=found.name,
        architecture=architecture,
        cubin=built.asm["cubin"],
        parameters=tuple(_parameters(launch, {each.name for each in maps})),
        maps=maps,
        grid=launch.grid,
        block=32 * found.num_warps,  # Gluon's kernels may add warps
        shared=found.shared,
        overlap=found.launch_pdl,
    )


def build(launch: Launch, architecture: int) -> Any:
    """`launch` as Triton compiles it: the text of each stage in `asm`, and `metadata`."""
    function: Any = launch.kernel
    types, names = signature(launch), list(function.arg_names)
    source = GluonASTSource if function.is_gluon() else ASTSource
    # Every allocator aligns to 16 bytes. Unless Triton is told, it loads byte by byte.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*"}
    return triton.compile(
        source(
            function,
            dict(zip(names, types, strict=False)) | dict.fromkeys(launch.constants, "constexpr"),
            {(names.index(name),): value for name, value in launch.constants.items()},
            aligned,
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **launch.options},
    )


def _maps(launch: Launch, found: list[dict[str, Any]]) -> Iterator[TensorMap]:
    """A tensor map for each descriptor; before sm_90 descriptors are plain pointers."""
    described = [name for name in launch.arguments if name in block_shapes(launch)]
    for name, each in zip(described, found, strict=True) if found else ():
        assert not each["fp4_padded"]
        rows, columns = each["block_size"]
        element, size = ELEMENTS[each["elem_type"]], each["elem_size"]
        yield TensorMap(name, rows, columns, each["swizzle"], element, size)


def _parameters(launch: Launch, mapped: set[str]) -> Iterator[Parameter]:
    """The parameters of all arguments; a descriptor becomes several."""
    shapes = block_shapes(launch)
    extents, strides = ("rows", "columns"), ("row stride", "column stride")
    for name, kind in zip(launch.arguments, signature(launch), strict=True):
        if name not in shapes:
            yield Parameter(name, kind)
            continue
        if name in mapped:
            yield Parameter(name, "map")
        else:
            yield Parameter(name, "*" + kind.removeprefix("tensordesc<").partition("[")[0])
            for part in (*extents, *strides):
                yield Parameter(name, "i64", part)
            yield Parameter(name, "i1", "padding")
        for part in extents:
            yield Parameter(name, "i32", part)
        for part in strides:
            yield Parameter(name, "i64", part)
