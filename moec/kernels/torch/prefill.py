"""The prefill MoE kernels on torch tensors: one layer for any number of tokens."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moec.kernels.launches.launch import Launch
from moec.kernels.launches.prefill import Tiles, prefill_moe, scratch, tiles_for
from moec.kernels.sizes import Sizes
from moec.kernels.torch.launch import architecture, buffers, run


class PrefillMoe:
    """One layer; `weights` as in `DecodeMoe`. Calls may be captured in a CUDA graph."""

    def __init__(
        self, sizes: Sizes, weights: Mapping[str, Tensor], tiles: Tiles | None = None
    ) -> None:
        self.sizes, self.weights = sizes, weights
        self.tiles = tiles or tiles_of(weights["gate_up"].device)

    def __call__(self, x: Tensor) -> Tensor:
        """x bf16 [tokens, D] -> bf16 [tokens, D]."""
        out: Tensor = self.run(self.values(x))["out"]
        return out

    def launches(self, tokens: int) -> tuple[Launch, ...]:
        """The launches of a call, in order."""
        return prefill_moe(self.sizes, tokens, self.tiles)

    def values(self, x: Tensor) -> dict[str, Any]:
        """The arguments of all launches by name, with new scratch."""
        made = buffers(scratch(self.sizes, len(x), self.tiles), x.device)
        return {**made, **self.weights, "x": x, "tokens": len(x)}

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run all launches on `values`, and return them; then "out" is bf16 [tokens, D]."""
        for launch in self.launches(values["tokens"]):
            run(launch, values)
        return values


@cache
def tiles_of(device: torch.device) -> Tiles:
    """The tiles for a device."""
    if device.type != "cuda":
        return tiles_for(0, 4)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return tiles_for(architecture(device), programs)
