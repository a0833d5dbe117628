"""Compile launches ahead of time, on a machine without a GPU: cubins, and how to launch them."""

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

#: a type of Triton's in a descriptor's metadata -> the driver's CUtensorMapDataType
ELEMENTS = {0: 0, 10: 9}  # bytes, bf16


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a cubin.

    `type` is "*..." for a pointer, "map" for a `TensorMap` by value, else of a number: i1 (a byte),
    i32 or i64. `part` says which number of the matrix `name` it is: "rows", "columns", "row stride"
    or "column stride", in elements, or "padding", which is 0. Without one it is `name` itself.
    """

    name: str
    type: str
    part: str = ""


@dataclass(frozen=True, slots=True)
class TensorMap:
    """What `cuTensorMapEncodeTiled` wants to know of the matrix `name`, rows by columns.

    The driver has the inner dimension first. Element strides are 1, no interleave, promotion to
    128 bytes in L2, no fill; the map is 128 bytes, aligned to 64.
    """

    name: str
    rows: int
    columns: int
    swizzle: int
    element: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel for one architecture: code for that and no other.

    To launch it with the driver's API: `parameters` in order, then two null pointers (scratch that
    these kernels do not use); `block` threads; `shared` bytes of dynamic shared memory, for which
    the function must ask first where it is above 48 KiB. No cluster, not cooperative. With
    `overlap` as a programmatic dependent launch, by programmatic stream serialization.
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
        MoecError: it needs more shared memory than that has.
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
        block=32 * found.num_warps,  # Gluon's kernels may have more than they were launched with
        shared=found.shared,
        overlap=found.launch_pdl,
    )


def build(launch: Launch, architecture: int) -> Any:
    """What Triton makes of `launch`: each stage's text in `asm`, and `metadata`."""
    function: Any = launch.kernel
    types, names = signature(launch), list(function.arg_names)
    source = GluonASTSource if function.is_gluon() else ASTSource
    # All memory comes from an allocator that aligns: without saying so, loads go byte by byte.
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
    """A map for each descriptor; before sm_90 there are none, and descriptors are pointers."""
    described = [name for name in launch.arguments if name in block_shapes(launch)]
    for name, each in zip(described, found, strict=True) if found else ():
        assert not each["fp4_padded"]
        rows, columns = each["block_size"]
        element, size = ELEMENTS[each["elem_type"]], each["elem_size"]
        yield TensorMap(name, rows, columns, each["swizzle"], element, size)


def _parameters(launch: Launch, mapped: set[str]) -> Iterator[Parameter]:
    """The arguments, and for those that are descriptors all that Triton makes of one."""
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
