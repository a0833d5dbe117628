"""The MoE kernels of any routing on torch tensors."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moec.kernels.launches import prefill
from moec.kernels.launches.launch import Buffers, Launch
from moec.kernels.launches.routed import TILES, Tiles, most_tokens, routed_moe
from moec.kernels.launches.routed_prefill import BLOCK, routed_prefill_moe
from moec.kernels.sizes import RoutedSizes
from moec.kernels.torch.launch import architecture, buffers, run
from moec.kernels.torch.prefill import tiles_of


class RoutedMoe:
    """One layer, for any number of tokens.

    Every call has scratch of its own, and may be captured in a CUDA graph.

    `weights`: router bf16 [E, D]; gate_up E4M3 [E + n, 2F, D] and down [E + n, D, F], the n shared
    experts last. gate_up_scale [E + n, 2F] and down_scale [E + n, D] are float32; with blocks they
    are [E + n, 2F / B, D / B] and [E + n, D / B, F / B]. bias, float32 [E], if the routing has one.
    """

    def __init__(
        self,
        sizes: RoutedSizes,
        weights: Mapping[str, Tensor],
        tiles: Tiles = TILES,
        many: prefill.Tiles | None = None,
    ) -> None:
        self.device = weights["gate_up"].device
        self.sizes, self.tiles = sizes, tiles
        self.many = many or tiles_of(self.device)
        self.weights = {"bias": torch.empty(1, device=self.device), **weights}

    def __call__(self, x: Tensor) -> Tensor:
        """x bf16 [tokens, D] -> bf16 [tokens, D]."""
        out: Tensor = self.run(self.values(x))["out"]
        return out

    def launches(self, tokens: int) -> tuple[Launch, ...]:
        """The launches of a call, in order."""
        return self._launched(tokens)[0]

    def values(self, x: Tensor) -> dict[str, Any]:
        """The arguments of all launches by name, with new scratch."""
        made = buffers(self._launched(len(x))[1], self.device)
        counted = {"tokens": len(x), "blocks": -(-len(x) // BLOCK)}
        return {**made, **self.weights, "x": x, **counted}

    def _launched(self, tokens: int) -> tuple[tuple[Launch, ...], Buffers]:
        if tokens > most_tokens(self.sizes):
            return _many(self.sizes, tokens, self.many)
        return _few(self.sizes, tokens, architecture(self.device), self.tiles)

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        """Run all launches on `values`, and return them; then "out" is bf16 [tokens, D]."""
        for launch in self.launches(values["tokens"]):
            run(launch, values)
        return values


#: what is launched for sizes, tokens and options, described once for all layers
_few, _many = cache(routed_moe), cache(routed_prefill_moe)
