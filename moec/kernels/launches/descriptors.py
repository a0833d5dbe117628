"""What a launch's arguments are to Triton: types, and those that are tiled for the copy engine."""

from typing import Any

from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language import NVMMASharedLayout

from moec.kernels.hopper import products as products_hopper
from moec.kernels.hopper import stream as stream_hopper
from moec.kernels.launches.launch import TYPES, Launch
from moec.kernels.triton import moe_prefill

#: kernel -> the arguments that it has as descriptors, for the engine that copies tiles; their tiles
DESCRIPTORS: dict[Any, dict[str, tuple[Any, ...]]] = {
    moe_prefill.gate_up: {
        "rows": ("TILE", "DEPTH"),
        "gate_up": ("COLUMNS", "DEPTH"),
        "act": ("TILE", "COLUMNS"),
    },
    moe_prefill.down: {
        "act_codes": ("TILE", "DEPTH"),
        "down": ("COLUMNS", "DEPTH"),
        "products": ("TILE", "COLUMNS"),
    },
    products_hopper.gate_up: {
        "rows": ("TILE", "DEPTH"),
        "gate_up": ("COLUMNS", "DEPTH"),
        "act": (64, "COLUMNS"),
    },
    products_hopper.down: {
        "act_codes": ("TILE", "DEPTH"),
        "down": ("COLUMNS", "DEPTH"),
        "products": (64, "COLUMNS"),
    },
    stream_hopper.linear: {"codes": ("COLUMNS", "DEPTH"), "weight": ("ROWS", "DEPTH")},
    stream_hopper.gate_up: {"codes": ("COLUMNS", "DEPTH"), "gate_up": ("ROWS", "DEPTH")},
    stream_hopper.down: {"act_codes": ("COLUMNS", "DEPTH"), "down": ("ROWS", "DEPTH")},
}


def block_shapes(launch: Launch) -> dict[str, tuple[int, ...]]:
    """The tile of each argument that is a descriptor."""
    return {
        name: tuple(launch.constants.get(each, each) for each in axes)
        for name, axes in DESCRIPTORS.get(launch.kernel, {}).items()
    }


def layouts(launch: Launch) -> dict[str, Any]:
    """How Gluon's kernels have the tiles of their descriptors in shared memory."""
    if not isinstance(launch.kernel, GluonJITFunction):
        return {}
    size = {"*fp8e4nv": 1, "*bf16": 2}
    return {
        name: NVMMASharedLayout(min(128, shape[-1] * size[TYPES[name]]), 8 * size[TYPES[name]], 2)
        for name, shape in block_shapes(launch).items()
    }


def signature(launch: Launch) -> tuple[str, ...]:
    """The types of a launch's arguments, as Triton says them."""
    shapes, laid = block_shapes(launch), layouts(launch)
    found = []
    for name in launch.arguments:
        kind = TYPES[name]
        if name in shapes:
            tail = f",{laid[name]!r}" if laid else ""
            kind = f"tensordesc<{kind[1:]}{list(shapes[name])}{tail}>"
        found.append(kind)
    return tuple(found)
