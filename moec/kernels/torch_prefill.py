"""The prefill MoE kernels on torch tensors: one layer for any number of tokens."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from moec.kernels.launch import Launch
from moec.kernels.launch_prefill import (
    Tiles,
    block_shapes,
    layouts,
    prefill_moe,
    scratch,
    tiles_for,
)
from moec.kernels.sizes import Sizes
from moec.kernels.torch_launch import buffers, run


class PrefillMoe:
    """One layer; `weights` as `DecodeMoe` has them. Calls may be captured in a CUDA graph."""

    def __init__(
        self, sizes: Sizes, weights: Mapping[str, Tensor], tiles: Tiles | None = None
    ) -> None:
        self.sizes, self.weights = sizes, weights
        self.tiles = tiles or _tiles(weights["gate_up"].device)

    def __call__(self, x: Tensor) -> Tensor:
        """x bf16 [tokens, D] -> bf16 [tokens, D]."""
        values = self.values(x)
        for each in self.launches(x):
            self.launch(each, values)
        out: Tensor = values["out"]
        return out

    def launches(self, x: Tensor) -> tuple[Launch, ...]:
        """What a call launches."""
        return prefill_moe(self.sizes, len(x), self.tiles)

    def values(self, x: Tensor) -> dict[str, Any]:
        """All arguments by name, with scratch of their own."""
        made = buffers(scratch(self.sizes, len(x), self.tiles), x.device)
        return {**made, **self.weights, "x": x, "tokens": len(x)}

    def launch(self, each: Launch, values: Mapping[str, Any]) -> None:
        """One of the launches by itself, on what the ones before have left."""
        laid = layouts(each)
        described = {
            name: _descriptor(values[name], shape, laid.get(name))
            for name, shape in block_shapes(each).items()
        }
        run(each, {**values, **described})


@cache
def _tiles(device: torch.device) -> Tiles:
    found = torch.cuda.get_device_properties(device)
    return tiles_for(10 * found.major + found.minor, found.multi_processor_count)


def _descriptor(tensor: Tensor, block: tuple[int, ...], layout: Any) -> Any:
    flat = tensor.flatten(0, -2)
    shape, strides = list(flat.shape), list(flat.stride())
    if layout is None:
        return TensorDescriptor(flat, shape, strides, list(block))
    return hopper.TensorDescriptor(flat, shape, strides, list(block), layout)
