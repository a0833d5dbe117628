"""The MoE kernels of any routing on torch tensors."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moec.kernels.launches.launch import Launch
from moec.kernels.launches.routed import TILES, Tiles, routed_moe
from moec.kernels.sizes import RoutedSizes
from moec.kernels.torch.launch import buffers, overlaps, run

#: what is launched for sizes, tokens and options, described once for all layers
_launched = cache(routed_moe)


class RoutedMoe:
    """One layer. Every call has scratch of its own, and may be captured in a CUDA graph.

    `weights`: router bf16 [E, D]; gate_up E4M3 [E + n, 2F, D] and down [E + n, D, F], the n shared
    experts last. gate_up_scale [E + n, 2F] and down_scale [E + n, D] are float32; with blocks they
    are [E + n, 2F / B, D / B] and [E + n, D / B, F / B]. bias, float32 [E], if the routing has one.
    """

    def __init__(
        self, sizes: RoutedSizes, weights: Mapping[str, Tensor], tiles: Tiles = TILES
    ) -> None:
        self.device = weights["gate_up"].device
        self.sizes, self.tiles = sizes, tiles
        self.weights = {"bias": torch.empty(1, device=self.device), **weights}

    def __call__(self, x: Tensor) -> Tensor:
        """x bf16 [tokens, D] -> bf16 [tokens, D]."""
        out: Tensor = self.run(self.values(x))["out"]
        return out

    def launches(self, tokens: int) -> tuple[Launch, ...]:
        """The launches of a call, in order."""
        return _launched(self.sizes, tokens, overlaps(self.device), self.tiles)[0]

    def values(self, x: Tensor) -> dict[str, Any]:
        """The arguments of all launches by name, with new scratch."""
        written = _launched(self.sizes, len(x), overlaps(self.device), self.tiles)[1]
        return {**buffers(written, self.device), **self.weights, "x": x, "tokens": len(x)}

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run all launches on `values`, and return them; then "out" is bf16 [tokens, D]."""
        for launch in self.launches(values["tokens"]):
            run(launch, values)
        return values
