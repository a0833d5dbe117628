"""Compile launches ahead of time, on a machine without a GPU: cubins, and how to launch them."""

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moec.kernels.launch import TYPES, Launch

#: compute capabilities that kernels are compiled for
ARCHITECTURES = (89, 90, 120)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel for one architecture.

    To launch it with the driver's API: `arguments` in order, then two null pointers (scratch that
    these kernels do not use); `block` threads; `shared` bytes of dynamic shared memory.
    """

    name: str
    architecture: int
    cubin: bytes
    arguments: tuple[tuple[str, str], ...]
    grid: tuple[int, int, int]
    block: int
    shared: int


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """The cubin of `launch` for compute capability `architecture`, such as 90."""
    function: Any = launch.kernel
    types = [TYPES[name] for name in launch.arguments]
    parameters = list(function.arg_names)
    signature = dict(zip(parameters, types, strict=False))
    signature |= dict.fromkeys(launch.constants, "constexpr")
    constants = {(parameters.index(name),): value for name, value in launch.constants.items()}
    # All memory comes from an allocator that aligns: without saying so, loads go byte by byte.
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind.startswith("*")
    }
    built = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, **launch.options},
    )
    return Compiled(
        name=built.metadata.name,
        architecture=architecture,
        cubin=built.asm["cubin"],
        arguments=tuple(zip(launch.arguments, types, strict=True)),
        grid=launch.grid,
        block=32 * launch.warps,
        shared=built.metadata.shared,
    )
