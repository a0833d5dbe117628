"""Run launches on torch tensors."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moec.kernels.launch import SHARED, Buffers, Launch

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "fp8e4nv": torch.float8_e4m3fn,
}


def run(launch: Launch, values: Mapping[str, Any]) -> None:
    """Start a launch on `values`, tensors and numbers by the names of its arguments."""
    launch.kernel[launch.grid](
        *(values[name] for name in launch.arguments), **launch.constants,
        num_warps=launch.warps, num_stages=launch.stages, **launch.options,
    )  # fmt: skip


def buffers(wanted: Buffers, device: torch.device) -> dict[str, Tensor]:
    """New memory for `wanted`."""
    return {
        name: torch.empty(shape, dtype=DTYPES[kind], device=device)
        for name, (shape, kind) in wanted.items()
    }


@cache
def shared(device: torch.device) -> int:
    """Bytes of shared memory that a program on `device` may have."""
    if device.type != "cuda":
        return SHARED[90]
    major, minor = torch.cuda.get_device_capability(device)
    return SHARED.get(10 * major + minor, min(SHARED.values()))


@cache
def overlaps(device: torch.device) -> bool:
    """Whether launches on `device` may start before the ones before them end."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
