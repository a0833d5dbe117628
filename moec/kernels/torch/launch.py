"""Run launches on torch tensors."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from moec.kernels.launches.descriptors import block_shapes, layouts
from moec.kernels.launches.launch import Buffers, Launch
from moec.spec.data import dtypes

#: types of torch by those of Triton
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, theirs) for name, theirs in dtypes("triton", "torch").items()
}


def run(launch: Launch, values: Mapping[str, Any]) -> None:
    """Start a launch on `values`: tensors and numbers, by the names of its arguments."""
    laid = layouts(launch)
    described = {
        name: _descriptor(values[name], shape, laid.get(name))
        for name, shape in block_shapes(launch).items()
    }
    given = {**values, **described}
    launch.kernel[launch.grid](
        *(given[name] for name in launch.arguments),
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.options,
    )


def _descriptor(tensor: Tensor, block: tuple[int, ...], layout: Any) -> Any:
    flat = tensor.flatten(0, -2)
    shape, strides = list(flat.shape), list(flat.stride())
    if layout is None:
        return TensorDescriptor(flat, shape, strides, list(block))
    return hopper.TensorDescriptor(flat, shape, strides, list(block), layout)


def buffers(wanted: Buffers, device: torch.device) -> dict[str, Tensor]:
    """New tensors for `wanted`, without initial values."""
    return {
        name: torch.empty(shape, dtype=DTYPES[kind], device=device)
        for name, (shape, kind) in wanted.items()
    }


@cache
def architecture(device: torch.device) -> int:
    """The compute capability of `device`, such as 90; 0: no GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def overlaps(device: torch.device) -> bool:
    """Whether a launch on `device` may start before the previous one ends."""
    return architecture(device) >= 90
