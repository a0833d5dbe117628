"""The types of a launch's arguments as Triton writes them, and the arguments that are descriptors.

A descriptor lets the TMA unit, the GPU's copy engine, copy tiles of a matrix.
"""

from typing import Any

from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language import NVMMASharedLayout

from moec.kernels.hopper import attend_many as attend_many_hopper
from moec.kernels.hopper import linear as linear_hopper
from moec.kernels.hopper import many_linear as many_linear_hopper
from moec.kernels.hopper import moe_decode as moe_decode_hopper
from moec.kernels.hopper import moe_prefill as moe_prefill_hopper
from moec.kernels.hopper import routed_one as routed_one_hopper
from moec.kernels.launches.launch import TYPES, Launch
from moec.kernels.triton import blocks_prefill, moe_prefill
from moec.kernels.triton.prefill import many_linear

#: kernel -> its arguments that are descriptors -> their tile: constants of the launch, or numbers
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
    blocks_prefill.gate_up: {
        "rows": ("TILE", "DEPTH"),
        "gate_up": ("COLUMNS", "DEPTH"),
        "act": ("TILE", "COLUMNS"),
    },
    blocks_prefill.down: {
        "act_codes": ("TILE", "DEPTH"),
        "down": ("COLUMNS", "DEPTH"),
        "products": ("TILE", "COLUMNS"),
    },
    moe_prefill_hopper.gate_up: {
        "rows": ("TILE", "DEPTH"),
        "gate_up": ("COLUMNS", "DEPTH"),
        "act": (64, "COLUMNS"),
    },
    moe_prefill_hopper.down: {
        "act_codes": ("TILE", "DEPTH"),
        "down": ("COLUMNS", "DEPTH"),
        "products": (64, "COLUMNS"),
    },
    attend_many_hopper.attend_many: {
        "q": (64, "SIZE"),
        "key": ("KEYS", "SIZE"),
        "value": ("KEYS", "SIZE"),
    },
    many_linear.many_linear: {
        "codes": ("TILE", "DEPTH"),
        "weight": ("COLUMNS", "DEPTH"),
        "out": ("TILE", "COLUMNS"),
    },
    many_linear_hopper.many_linear: {
        "codes": ("TILE", "DEPTH"),
        "weight": ("COLUMNS", "DEPTH"),
        "out": (64, "COLUMNS"),
    },
    linear_hopper.linear: {"codes": ("COLUMNS", "DEPTH"), "weight": ("ROWS", "DEPTH")},
    moe_decode_hopper.gate_up: {"codes": ("COLUMNS", "DEPTH"), "gate_up": ("ROWS", "DEPTH")},
    moe_decode_hopper.down: {"act_codes": ("COLUMNS", "DEPTH"), "down": ("ROWS", "DEPTH")},
    routed_one_hopper.gate_up: {"codes": ("COLUMNS", "DEPTH"), "gate_up": ("ROWS", "DEPTH")},
    routed_one_hopper.down: {"down": ("ROWS", "DEPTH")},
}


def block_shapes(launch: Launch) -> dict[str, tuple[int, ...]]:
    """The tile of each argument that is a descriptor."""
    return {
        name: tuple(launch.constants.get(each, each) for each in axes)
        for name, axes in DESCRIPTORS.get(launch.kernel, {}).items()
    }


def layouts(launch: Launch) -> dict[str, Any]:
    """The layout of each descriptor's tile in shared memory, which Gluon's kernels must be told."""
    if not isinstance(launch.kernel, GluonJITFunction):
        return {}
    size = {"*fp8e4nv": 1, "*bf16": 2}
    return {
        name: NVMMASharedLayout(min(128, shape[-1] * size[TYPES[name]]), 8 * size[TYPES[name]], 2)
        for name, shape in block_shapes(launch).items()
    }


def signature(launch: Launch) -> tuple[str, ...]:
    """The types of a launch's arguments, as Triton writes them."""
    shapes, laid = block_shapes(launch), layouts(launch)
    found = []
    for name in launch.arguments:
        kind = launch.types.get(name) or TYPES[name]
        if name in shapes:
            tail = f",{laid[name]!r}" if laid else ""
            kind = f"tensordesc<{kind[1:]}{list(shapes[name])}{tail}>"
        found.append(kind)
    return tuple(found)
